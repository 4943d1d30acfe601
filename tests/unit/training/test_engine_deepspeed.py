"""The DeepSpeed engine in one process; several ranks are in tests/distributed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.engines import engine_settings, with_zero_stage
from support.tiny_tasks import (
    build_autoregressive_task,
    build_tokenizer_task,
    draw_codes,
    draw_images,
    load_tiny,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fqgan_dist.errors import CheckpointError, ClusterError, ConfigError, NumericsError
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.training.engines import build_engine
from fqgan_dist.training.process_group import process_group
from fqgan_dist.training.step_layout import Slot, StepLayout, build_step_layout
from fqgan_dist.world import World

CPU = torch.device("cpu")
SLOT = Slot(0, is_idle=False)
FINITE = torch.zeros(1)
STAGES = (0, 1, 2, 3)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs) * self.scale


@pytest.fixture
def world() -> Iterator[World]:
    with process_group(World(), CPU):
        yield World()


def build(
    world: World, zero_stage: int, module: nn.Module | None = None, *, answer: str = "skip"
) -> Any:
    settings = engine_settings(
        zero_stage=zero_stage,
        layout=build_step_layout(1, world),
        anomalies={"on_not_finite": answer},
    )
    return deepspeed_engine(zero_stage, module or Network(), settings)


def train(engine: Any, *, steps: int = 1, factor: float = 1.0, losses: Tensor = FINITE) -> Tensor:
    norm = FINITE
    for step in range(steps):
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        engine.backward(factor * engine.forward(inputs).square().mean(), SLOT)
        norm = engine.step(lr=0.01, losses=losses)
    return norm


def weights(engine: Any) -> dict[str, Tensor]:
    with engine.whole_weights() as module:
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing(world: World, zero_stage: int, what: str) -> None:
    engine = build(world, zero_stage, answer="stop")
    train(engine, steps=2)
    before, state = weights(engine), engine.state_dict()["optimizer"]
    moments = {name: engine_value(value).clone() for name, value in state.items()}
    bad: dict[str, Any] = {
        "loss": {"losses": torch.tensor([0.0, torch.nan])},
        "gradient": {"factor": float("nan")},
    }[what]
    train(engine, **bad)
    with pytest.raises(NumericsError, match=r"network: a loss or gradient is not finite"):
        engine.raise_if_not_finite()
    train(engine)
    assert engine.refused
    assert is_equal(weights(engine), before)
    after = engine.state_dict()["optimizer"]
    assert is_equal({name: engine_value(value) for name, value in after.items()}, moments)


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_after_a_step_that_is_skipped_training_goes_on_as_if_it_had_not_been(
    world: World, zero_stage: int, what: str
) -> None:
    engine, calm = build(world, zero_stage), build(world, zero_stage)
    for other in (engine, calm):
        train(other, steps=2)
    if what == "loss":
        train(engine, losses=torch.tensor([0.0, torch.nan]))
    else:
        train(engine, factor=float("nan"))
    for other in (engine, calm):
        train(other, steps=2)
    assert not engine.refused
    assert is_equal(weights(engine), weights(calm))
    ours, theirs = (each.state_dict()["optimizer"] for each in (engine, calm))
    assert is_equal(*({k: engine_value(v) for k, v in each.items()} for each in (ours, theirs)))


def engine_value(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.tensor


@pytest.mark.parametrize("zero_stage", STAGES)
def test_other_weights_are_evaluated_and_training_goes_on_with_its_own(
    world: World, zero_stage: int
) -> None:
    engine, plain = build(world, zero_stage), build(world, zero_stage)
    for other in (engine, plain):
        train(other, steps=2)
    doubled = {name: 2 * value for name, value in engine.local_parameters().items()}
    own = weights(engine)
    inputs = torch.randn(3, 4)
    with engine.whole_weights(doubled) as module, torch.inference_mode():
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, 2 * own[name])
        module(inputs)
        with pytest.raises(RuntimeError, match="evaluation failed"), engine.whole_weights(doubled):
            raise RuntimeError("evaluation failed")
    assert is_equal(weights(engine), own)
    for other in (engine, plain):
        train(other, steps=2)
    assert is_equal(weights(engine), weights(plain))


@pytest.mark.parametrize("zero_stage", STAGES)
def test_advancing_is_taking_steps_of_zero_gradient(world: World, zero_stage: int) -> None:
    engine, stepped = build(world, zero_stage), build(world, zero_stage)
    engine.advance(3)
    for _ in range(3):
        train(stepped, factor=0.0)
    train(engine)
    train(stepped)
    assert is_equal(weights(engine), weights(stepped))


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_checkpoint_of_another_model_is_refused(world: World, zero_stage: int) -> None:
    engine = build(world, zero_stage)
    whole = weights(engine)
    whole["layers.0.weight"] = torch.zeros(5, 3)
    with pytest.raises(CheckpointError, match=r"layers.0.weight is float32 \(5, 3\), expected"):
        engine.load_state_dict({"weights": whole, "optimizer": {}})


def test_zero_3_refuses_a_frozen_parameter(world: World) -> None:
    module = Network()
    module.layers[0].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"frozen parameter layers\.0\.weight"):
        build(world, 3, module)


def test_one_process_needs_a_process_group_too() -> None:
    assert not dist.is_initialized()
    with pytest.raises(ClusterError, match="found no process group"):
        build(World(), 1)


@pytest.mark.parametrize("time", [1, 2])
def test_another_world_may_follow_in_one_process(world: World, time: int) -> None:
    assert time
    assert train(build(world, 2)).isfinite()


def test_the_discriminator_must_be_frozen_while_the_tokenizer_s_loss_flows_through_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_tiny("tokenizer.losses.discriminator_start_step=1")
    task = build_tokenizer_task(config, world, engine_type=functools.partial(deepspeed_engine, 1))
    monkeypatch.setattr(task.discriminator_engine, "frozen", nullcontext)
    with pytest.raises(NumericsError, match="discriminator is trainable while another model's"):
        task.train_step(draw_images(config, 1, [0, 1]), 1)


def deepspeed_engine(zero_stage: int, module: nn.Module, settings: EngineSettings) -> Any:
    # Importing DeepSpeed takes seconds, and the library must import without it.
    engine = importlib.import_module("fqgan_dist.training.engine_deepspeed")
    return engine.DeepSpeedEngine(module, with_zero_stage(settings, zero_stage))


class CodeLookups(TorchDispatchMode):
    """The dtypes of products of vectors (n, D) with a transposed codebook (D, V)."""

    def __init__(self, code_dim: int, codebook_size: int) -> None:
        super().__init__()
        self.shape = (code_dim, codebook_size)
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and tuple(args[1].shape) == self.shape:
            self.seen |= {args[0].dtype, args[1].dtype}
        return func(*args, **(kwargs or {}))


class Dtypes:
    """The dtypes of what layers of a kind return."""

    def __init__(self, module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]):
        self.seen: set[torch.dtype] = set()
        for layer in module.modules():
            if isinstance(layer, kind):
                layer.register_forward_hook(lambda *values: self.seen.add(values[2].dtype))


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_dtypes_of_the_tokenizer_under_bf16(world: World, zero_stage: int) -> None:
    config = load_tiny("tokenizer.training.precision=bf16")
    engine_type = functools.partial(deepspeed_engine, zero_stage)
    task = build_tokenizer_task(config, world, engine_type=engine_type)
    products = Dtypes(task.model, (nn.Linear, nn.Conv2d))
    model = config.tokenizer.model
    with CodeLookups(model.code_dim, model.codebook_size) as lookups:
        task.train_step(draw_images(config, 1, [0, 1]), 1)
    assert products.seen == {torch.bfloat16}
    assert lookups.seen == {torch.float32}
    assert_all_fp32(task.engine)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_dtypes_of_the_generator_under_bf16(world: World, zero_stage: int) -> None:
    config = load_tiny("autoregressive.training.precision=bf16")
    engine_type = functools.partial(deepspeed_engine, zero_stage)
    task = build_autoregressive_task(config, world, engine_type=engine_type)
    products = Dtypes(task.model, nn.Linear)
    task.train_step(draw_codes(config, 1, [0, 1]), 1)
    assert products.seen == {torch.bfloat16}
    assert_all_fp32(task.engine)


def assert_all_fp32(engine: Any) -> None:
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    assert {p.dtype for p in engine.local_parameters().values()} == {torch.float32}
    state = engine.state_dict()
    for part in state.values():
        kinds = {engine_value(value).dtype for value in part.values()}
        assert kinds == {torch.float32}


@pytest.mark.parametrize("kind", ["plain", "deepspeed"])
def test_the_engine_that_a_training_asks_for_is_built(world: World, kind: str) -> None:
    training = load_tiny(f"tokenizer.training.engine={kind}").tokenizer.training
    layout = StepLayout.of(training, world)
    settings = EngineSettings(training=training, name="network", layout=layout, device=CPU)
    engine = build_engine(Network(), settings)
    assert isinstance(engine, PlainEngine) == (kind == "plain")

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.engines import engine_settings
from torch import Tensor, nn

from fqgan_dist.errors import CheckpointError, NumericsError
from fqgan_dist.loss_group import LossGroup
from fqgan_dist.training.config import OptimizerConfig
from fqgan_dist.training.engine import accumulate
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.step_layout import Slot, build_step_layout
from fqgan_dist.training.task import Parts
from fqgan_dist.world import World

NUM_MICRO_BATCHES = 3
LAYOUT = build_step_layout(NUM_MICRO_BATCHES, World())
LR = 0.01
FINITE = torch.zeros(1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs) * self.scale


def build(config: OptimizerConfig | None = None, *, answer: str = "skip") -> PlainEngine:
    torch.manual_seed(0)
    settings = engine_settings(
        optimizer=config or OptimizerConfig(), layout=LAYOUT, anomalies={"on_not_finite": answer}
    )
    return PlainEngine(Network(), settings)


def draw(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator) for _ in range(NUM_MICRO_BATCHES)]


def add_gradients(engine: PlainEngine, seed: int, *, factor: float = 1.0) -> Tensor:
    """Run one step's passes, without the step."""

    def loss_fn(_: Slot, batch: Tensor) -> tuple[Tensor, Tensor]:
        loss = factor * engine.forward(batch).square().mean()
        return loss, loss.detach().reshape(1)

    return accumulate(engine, draw(seed), loss_fn)


def train(engine: PlainEngine, seeds: range) -> None:
    for seed in seeds:
        engine.step(lr=LR, losses=add_gradients(engine, seed))


def snapshot(engine: PlainEngine) -> Parts:
    return copy.deepcopy(engine.state_dict())


def is_equal(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items())
        for part in one
    )


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_a_step_is_torch_s_of_the_mean_over_micro_batches(kind: str) -> None:
    config = OptimizerConfig.model_validate({"kind": kind, "weight_decay": 0.1})
    engine = build(config)
    reference = copy.deepcopy(engine.module)
    optimizer_type = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    optimizer = optimizer_type(
        reference.parameters(), lr=LR, betas=config.betas, eps=config.eps, weight_decay=0.1
    )
    for seed in range(3):
        engine.step(lr=LR, losses=add_gradients(engine, seed))
        torch.stack([reference(batch).square().mean() for batch in draw(seed)]).mean().backward()
        nn.utils.clip_grad_norm_(reference.parameters(), config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(engine.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_metrics_come_back_in_the_order_of_micro_batches() -> None:
    engine = build()
    rows = add_gradients(engine, 0)
    expected = torch.stack([engine.module(batch).square().mean() for batch in draw(0)])
    assert torch.equal(rows[:, 0], expected.detach())


def test_an_idle_slot_adds_nothing() -> None:
    engine = build()
    (batch, *_) = draw(0)
    with engine.micro_batch(is_last=True):
        engine.backward(engine.forward(batch).square().mean(), Slot(0, is_idle=True))
    assert all(
        parameter.grad is not None and not parameter.grad.any()
        for parameter in engine.module.parameters()
    )


@pytest.mark.parametrize(("factor", "is_clipped"), [(1e-3, False), (1e3, True)])
def test_gradients_are_clipped_to_the_configured_norm(factor: float, is_clipped: bool) -> None:
    config = OptimizerConfig(gradient_clip=0.5)
    engine = build(config)
    add_gradients(engine, 0, factor=factor)
    gradients = [parameter.grad.clone() for parameter in engine.module.parameters()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert bool(norm > 0.5) is is_clipped

    reported = engine.step(lr=LR, losses=FINITE)

    torch.testing.assert_close(reported, norm)  # before clipping
    scale = min(1.0, 0.5 / float(norm))
    moments = engine.state_dict()["optimizer"]
    for (name, _), gradient in zip(engine.module.named_parameters(), gradients, strict=True):
        expected = gradient * scale * (1 - config.betas[0])
        torch.testing.assert_close(moments[f"{name}.exp_avg"], expected, rtol=1e-4, atol=1e-9)


def test_gradients_are_cleared_after_a_step() -> None:
    engine = build()
    train(engine, range(1))
    assert all(parameter.grad is None for parameter in engine.module.parameters())


@pytest.mark.parametrize("num_steps_before", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_moves_when_a_number_is_not_finite(
    where: str, value: float, num_steps_before: int
) -> None:
    engine = build(OptimizerConfig(kind="adamw", weight_decay=0.1))
    train(engine, range(num_steps_before))
    before = snapshot(engine)
    losses = add_gradients(engine, 7)
    if where == "loss":
        losses = losses.clone()
        losses[1, 0] = value
    else:
        parameter = next(engine.module.parameters())
        assert parameter.grad is not None
        parameter.grad[0, 0] = value

    engine.step(lr=LR, losses=losses)
    assert engine.refused
    with pytest.raises(NumericsError, match="network: a loss or gradient is not finite"):
        engine.raise_if_not_finite()

    assert is_equal(snapshot(engine), before)


@pytest.mark.parametrize("answer", ["skip", "rollback", "stop"])
def test_later_steps_are_refused_too_unless_one_is_simply_skipped(answer: str) -> None:
    engine, calm = build(answer=answer), build()
    engine.step(lr=LR, losses=torch.tensor([float("nan")]))
    before = snapshot(engine)
    train(engine, range(1))
    train(calm, range(1))
    assert bool(engine.refused) == (answer != "skip")
    assert is_equal(snapshot(engine), snapshot(calm) if answer == "skip" else before)
    engine.load_state_dict(calm.state_dict())  # pyright: ignore[reportArgumentType]
    assert not engine.refused


def test_a_finite_engine_has_nothing_to_raise() -> None:
    engine = build()
    train(engine, range(1))
    engine.raise_if_not_finite()


def test_a_frozen_engine_gets_no_gradient_but_lets_it_through() -> None:
    engine = build()
    inputs = torch.ones(2, 4, requires_grad=True)
    with engine.frozen():
        engine.require_frozen()
        engine.module(inputs).sum().backward()
    assert inputs.grad is not None
    assert inputs.grad.any()
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    assert all(parameter.requires_grad for parameter in engine.module.parameters())


def test_the_guard_names_the_model_that_is_not_frozen() -> None:
    engine = build()
    with pytest.raises(NumericsError, match=r"network is trainable.*engine\.frozen\(\)"):
        engine.require_frozen()


def test_the_guard_sees_a_single_trainable_parameter() -> None:
    engine = build()
    with engine.frozen():
        next(engine.module.parameters()).requires_grad_(True)
        with pytest.raises(NumericsError):
            engine.require_frozen()


def test_an_error_inside_thaws_the_parameters() -> None:
    engine = build()
    with pytest.raises(RuntimeError, match="inside"), engine.frozen():
        raise RuntimeError("inside")
    assert all(parameter.requires_grad for parameter in engine.module.parameters())


def test_parameters_that_are_never_trained_stay_so() -> None:
    module = Network()
    module.layers[0].requires_grad_(False)
    engine = PlainEngine(module, engine_settings())
    with engine.frozen():
        pass
    assert not module.layers[0].weight.requires_grad
    assert "layers.0.weight.exp_avg" not in engine.state_dict()["optimizer"]


def test_advancing_equals_that_many_steps_of_zero_gradient() -> None:
    stepped, advanced = build(), build()
    for seed in range(5):
        stepped.step(lr=LR, losses=add_gradients(stepped, seed, factor=0.0))
    advanced.advance(5)
    assert is_equal(snapshot(stepped), snapshot(advanced))
    train(stepped, range(5, 7))
    train(advanced, range(5, 7))
    assert is_equal(snapshot(stepped), snapshot(advanced))


def test_advancing_matters() -> None:
    fresh, advanced = build(), build()
    advanced.advance(5)
    train(fresh, range(1))
    train(advanced, range(1))
    assert not torch.equal(fresh.module.layers[0].weight, advanced.module.layers[0].weight)


def test_training_continues_from_its_state_bit_for_bit() -> None:
    engine = build(OptimizerConfig(kind="adamw", weight_decay=0.1))
    train(engine, range(3))
    state = snapshot(engine)
    train(engine, range(3, 6))

    resumed = build(OptimizerConfig(kind="adamw", weight_decay=0.1))
    with torch.no_grad():
        for tensor in resumed.module.state_dict().values():
            tensor.fill_(9.0)
    resumed.load_state_dict(state)
    train(resumed, range(3, 6))

    assert is_equal(snapshot(resumed), snapshot(engine))


def test_buffers_are_part_of_the_state() -> None:
    assert "scale" in build().state_dict()["weights"]


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_a_state_with_something_missing_is_refused(part: str) -> None:
    engine = build()
    state = snapshot(engine)
    state[part].popitem()
    with pytest.raises(CheckpointError, match="missing"):
        engine.load_state_dict(state)


def test_groups_keep_their_own_weight_decay() -> None:
    module = Network()
    decayed = [module.layers[0].weight, module.layers[2].weight]
    plain = [module.layers[0].bias, module.layers[2].bias]
    settings = engine_settings(
        optimizer=OptimizerConfig(kind="adamw", weight_decay=0.5),
        layout=LAYOUT,
        parameter_groups=[{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
    )
    engine = PlainEngine(module, settings)
    before = copy.deepcopy(module)
    engine.step(lr=0.1, losses=add_gradients(engine, 0, factor=0.0))
    torch.testing.assert_close(module.layers[0].weight, before.layers[0].weight * (1 - 0.1 * 0.5))
    assert torch.equal(module.layers[0].bias, before.layers[0].bias)


def test_other_weights_are_lent_and_taken_back_after_an_error() -> None:
    engine = build()
    own = snapshot(engine)
    doubled = {name: 2 * value for name, value in engine.local_parameters().items()}

    def use() -> None:
        with engine.whole_weights(doubled) as module:
            assert all(torch.equal(p, doubled[name]) for name, p in module.named_parameters())
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        use()
    assert is_equal(snapshot(engine), own)


def test_its_own_weights_are_the_module_s() -> None:
    engine = build()
    with engine.whole_weights() as module:
        assert module is engine.module


def test_only_the_main_rank_saves() -> None:
    engine = build()
    parameters = engine.local_parameters()
    assert engine.share(parameters).keys() == parameters.keys()
    engine.world = World(rank=1, world_size=2)
    assert engine.share(parameters) == {}
    assert engine.state_dict() == {"weights": {}, "optimizer": {}}


def test_a_pass_of_a_shared_micro_batch_counts_as_its_share() -> None:
    alone = build()
    torch.manual_seed(0)
    layout = replace(LAYOUT, loss_group=LossGroup(size=2))
    shared = PlainEngine(Network(), engine_settings(layout=layout))
    for engine in (alone, shared):
        for slot, batch in zip(LAYOUT.slots, draw(0), strict=True):
            engine.backward(engine.forward(batch).square().mean(), slot)
    for half, whole in zip(shared.module.parameters(), alone.module.parameters(), strict=True):
        assert half.grad is not None
        torch.testing.assert_close(2 * half.grad, whole.grad)

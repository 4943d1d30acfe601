from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_tasks import build_tokenizer_task, draw_images, load_tiny
from torch import Tensor, nn

from fqgan_dist.data.decoding import to_float
from fqgan_dist.errors import NumericsError
from fqgan_dist.randomness import keyed_torch_rng
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.tokenizer_task import TokenizerTask
from fqgan_dist.training.anomalies import AnomalyWatch
from fqgan_dist.training.config import AnomalyConfig
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.step_layout import Slot
from fqgan_dist.training.task import Parts

START = 3
WEIGHTS = {
    "reconstruction": 1.25,
    "perceptual": 0.75,
    "adversarial": 0.5,
    "codebook": 1.5,
    "commitment": 0.2,
    "entropy": 0.03,
    "semantic": 0.4,
    "disentanglement": 0.1,
}
CONFIG = load_tiny(
    f"tokenizer.losses.discriminator_start_step={START}",
    *(f"tokenizer.losses.{name}_weight={weight}" for name, weight in WEIGHTS.items()),
)
CPU = torch.device("cpu")


@pytest.fixture
def task() -> TokenizerTask:
    return build_tokenizer_task(CONFIG)


def train(task: TokenizerTask, steps: range, config: RunConfig = CONFIG) -> dict[str, float]:
    values: dict[str, Tensor] = {}
    for step in steps:
        values = task.train_step(draw_images(config, step, (0, 1)), step)
    return {name: value.item() for name, value in values.items()}


def snapshot(task: TokenizerTask) -> Parts:
    return copy.deepcopy(task.state_dict())


def is_equal(one: Parts, other: Parts, *parts: str) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[part][name])
        for part in parts or one
        for name, tensor in one[part].items()
    )


@pytest.mark.parametrize("last_step", [1, START])
def test_the_total_is_the_weighted_sum_of_the_terms(task: TokenizerTask, last_step: int) -> None:
    values = train(task, range(1, last_step + 1))
    prefix = "tokenizer/loss/"
    terms = {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix) and name not in (f"{prefix}total", f"{prefix}discriminator")
    }
    assert ("adversarial" in terms) is (last_step >= START)
    assert {name.split("/")[0] for name in terms} == WEIGHTS.keys() - (
        set() if last_step >= START else {"adversarial"}
    )
    expected = sum(WEIGHTS[name.split("/")[0]] * value for name, value in terms.items())
    assert values[f"{prefix}total"] == pytest.approx(expected, rel=1e-5)


def test_every_codebook_and_every_teacher_has_its_terms(task: TokenizerTask) -> None:
    values = train(task, range(1, 2))
    for name in ("visual", "semantic_mid", "semantic_high"):
        for term in ("codebook", "commitment", "entropy"):
            assert values[f"tokenizer/loss/{term}/{name}"] != 0
        assert 0 < values[f"tokenizer/codebook_usage/{name}"] <= 1
    assert {name for name in values if "semantic/" in name} == {
        "tokenizer/loss/semantic/semantic_mid",
        "tokenizer/loss/semantic/semantic_high",
    }


def test_without_its_weight_the_entropy_is_not_computed() -> None:
    config = load_tiny("tokenizer.losses.entropy_weight=0")
    values = train(build_tokenizer_task(config), range(1, 2), config)
    assert not [name for name in values if "entropy" in name]


def test_teachers_are_asked_where_no_features_are_stored() -> None:
    asked: list[tuple[int, ...]] = []

    def teachers(images: Tensor) -> dict[str, Tensor]:
        asked.append(tuple(images.shape))
        assert images.min() >= -1
        assert images.max() <= 1
        return {name: torch.ones(len(images), 16) for name in ("dinov2", "clip")}

    task = build_tokenizer_task(CONFIG, teachers=teachers)
    stored = draw_images(CONFIG, 1, (0, 1))
    task.train_step(stored, 1)
    assert asked == []
    without: list[Any] = [copy.copy(batch) for batch in stored]
    for batch in without:
        object.__setattr__(batch, "features", {})
    task.train_step(without, 2)
    assert asked == [(4, 3, 32, 32)] * 2


def test_the_discriminator_rests_before_it_starts(task: TokenizerTask) -> None:
    before = snapshot(task)
    values = train(task, range(1, START))
    assert not [name for name in values if "discriminator" in name or "adversarial" in name]
    after = snapshot(task)
    assert is_equal(before, after, "discriminator", "discriminator_optimizer")
    values = train(task, range(START, START + 1))
    assert values["tokenizer/loss/discriminator"] > 0
    assert not is_equal(after, snapshot(task), "discriminator")


def test_skipping_until_the_start_equals_training_with_zero_weight() -> None:
    """The released recipe steps the discriminator from step 1, with a loss of weight zero."""
    task = build_tokenizer_task(CONFIG)
    reference = copy.deepcopy(task.discriminator).train()
    optimizer_config = CONFIG.tokenizer.training.optimizer
    optimizer = torch.optim.Adam(
        reference.parameters(), betas=optimizer_config.betas, eps=optimizer_config.eps, fused=True
    )
    for step in range(1, START + 3):
        weight = WEIGHTS["adversarial"] if step >= START else 0.0
        batches = draw_images(CONFIG, step, (0, 1))
        tokenizer = copy.deepcopy(task.model).train()
        values = task.train_step(batches, step)
        for batch in batches:
            images = to_float(batch.images)
            with (
                torch.no_grad(),
                keyed_torch_rng(0, "tokenizer", step, batch.micro_batch, device=CPU),
            ):
                fake = tokenizer(images).reconstruction
            hinges = (
                torch.relu(1 - reference(images)).mean(),
                torch.relu(1 + reference(fake)).mean(),
            )
            (weight * 0.5 * (hinges[0] + hinges[1]) / len(batches)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), optimizer_config.gradient_clip)
        optimizer.param_groups[0]["lr"] = float(values["tokenizer/lr"])
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(
        task.discriminator.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)
        state = optimizer.state[theirs]
        named = task.discriminator_engine.state_dict()["optimizer"]
        assert float(named[f"discriminator.{name}.step"]) == float(state["step"]) == START + 2


def test_the_discriminator_is_frozen_while_the_tokenizer_s_loss_flows_through() -> None:
    seen: list[bool] = []

    class Watching(PlainEngine):
        def backward(self, loss: Tensor, slot: Slot) -> None:
            super().backward(loss, slot)
            if self.name == "tokenizer":
                parameters = list(task.discriminator.parameters())
                seen.append(any(p.requires_grad or p.grad is not None for p in parameters))

    task = build_tokenizer_task(CONFIG, engine_type=Watching)
    train(task, range(START, START + 1))
    assert seen == [False, False]
    assert all(parameter.requires_grad for parameter in task.discriminator.parameters())


def test_a_discriminator_that_is_not_frozen_is_noticed(
    task: TokenizerTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do_nothing() -> Any:
        return torch.enable_grad()

    monkeypatch.setattr(task.discriminator_engine, "frozen", do_nothing)
    with pytest.raises(NumericsError, match="discriminator is trainable"):
        train(task, range(START, START + 1))


def test_the_adversarial_loss_reaches_the_tokenizer() -> None:
    gradients: list[Tensor] = []

    class Recording(PlainEngine):
        def step(self, *, lr: float, losses: Tensor) -> Tensor:
            gradients.append(torch.cat([p.grad.flatten() for p in self._parameters]))
            return super().step(lr=lr, losses=losses)

    weights = [f"tokenizer.losses.{name}_weight=0" for name in WEIGHTS if name != "adversarial"]
    config = load_tiny("tokenizer.losses.discriminator_start_step=1", *weights)
    train(build_tokenizer_task(config, engine_type=Recording), range(1, 2), config)
    tokenizer_gradient, discriminator_gradient = gradients
    assert tokenizer_gradient.any()
    assert discriminator_gradient.any()


@pytest.mark.parametrize("step", [1, START])
def test_an_idle_slot_contributes_nothing(
    task: TokenizerTask, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(task)
    slots = tuple(Slot(index, is_idle=True) for index in task.layout.micro_batches)
    layout = replace(task.layout, slots=slots)
    for engine in (task.engine, task.discriminator_engine):
        monkeypatch.setattr(engine, "layout", layout)
    values = train(task, range(step, step + 1))
    assert values["tokenizer/gradient_norm"] == 0
    assert values.get("tokenizer/discriminator/gradient_norm", 0) == 0
    after = snapshot(task)
    parameters = dict(task.model.named_parameters())
    assert all(
        torch.equal(after["tokenizer"][name], before["tokenizer"][name]) for name in parameters
    )


def test_batch_statistics_are_folded_in_the_order_of_passes(task: TokenizerTask) -> None:
    train(task, range(1, START))
    counter = "discriminator.main.3.num_batches_tracked"
    assert int(task.discriminator_engine.state_dict()["weights"][counter]) == 0
    train(task, range(START, START + 1))
    # Per micro-batch one pass for the tokenizer, then a real and a fake one.
    assert int(task.discriminator_engine.state_dict()["weights"][counter]) == 2 + 2 * 2
    assert task.discriminator.take_batch_statistics() == []


def test_randomness_depends_on_step_and_micro_batch_only(task: TokenizerTask) -> None:
    first = train(task, range(1, START + 1))
    torch.rand(13)
    assert train(build_tokenizer_task(CONFIG), range(1, START + 1)) == first


def test_training_continues_from_its_state_to_the_bit(task: TokenizerTask) -> None:
    train(task, range(1, START))
    state = snapshot(task)
    train(task, range(START, START + 3))
    resumed = build_tokenizer_task(CONFIG)
    resumed.load_state_dict(state)
    train(resumed, range(START, START + 3))
    assert is_equal(snapshot(resumed), snapshot(task))


def test_evaluation_leaves_everything_as_it_was(task: TokenizerTask) -> None:
    train(task, range(1, START + 1))
    before = snapshot(task)
    assert task.evaluate(START) == {"tokenizer/validation/training": 0.0}
    assert task.model.training
    assert is_equal(snapshot(task), before)


class BreakingEngine(PlainEngine):
    """Has a gradient that is not finite when it is told so."""

    is_broken = False

    def backward(self, loss: Tensor, slot: Slot) -> None:
        super().backward(loss, slot)
        if self.is_broken and self.name == "tokenizer":
            gradients = [each.grad for each in self._parameters if each.grad is not None]
            gradients[0].view(-1)[0] = float("inf")


@pytest.mark.parametrize("where", ["feature", "image", "loss", "gradient"])
def test_a_step_with_a_number_that_is_not_finite_moves_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = build_tokenizer_task(CONFIG, engine_type=BreakingEngine)
    train(task, range(1, START + 1))
    before = snapshot(task)
    batches = draw_images(CONFIG, START + 1, (0, 1))
    with monkeypatch.context() as patch:
        match where:
            case "feature":
                batches[1].features["clip"][0, 0] = float("nan")
            case "image":
                sick = batches[1].images
                patch.setattr(
                    task,
                    "_to_device",
                    lambda images: to_float(images) * (torch.nan if images is sick else 1.0),
                )
            case "loss":
                patch.setattr(task, "perceptual", lambda image, _: image.sum() * torch.inf)
            case _:
                patch.setattr(BreakingEngine, "is_broken", True)
        task.train_step(batches, START + 1)
    after = snapshot(task)
    # An average over steps goes on in one that moves nothing.
    moved = {part for part in before if not is_equal(after, before, part)}
    assert moved <= {"tokenizer_ema"}
    watch = AnomalyWatch(AnomalyConfig())
    watch.note(START + 1, task.take_evidence())
    (anomaly,) = watch.drain()
    assert anomaly.kind == "not_finite"
    expected = {
        "feature": ("tokenizer/loss/semantic/semantic_high", (1,)),
        "image": ("tokenizer/loss/reconstruction", (1,)),
        "loss": ("tokenizer/loss/perceptual", (0, 1)),
        "gradient": ("tokenizer/gradient_norm", (0, 1)),
    }
    term, micro_batches = expected[where]
    assert term in anomaly.terms
    assert anomaly.micro_batches == micro_batches
    train(task, range(START + 2, START + 4))
    assert all(
        torch.isfinite(tensor).all() for part in snapshot(task).values() for tensor in part.values()
    )

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_tasks import build_autoregressive_task, draw_codes, load_tiny
from torch import Tensor

from fqgan_dist.autoregressive.losses import compute_code_losses
from fqgan_dist.errors import CheckpointError
from fqgan_dist.randomness import keyed_torch_rng
from fqgan_dist.stages.autoregressive_task import AutoregressiveTask
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.step_layout import Slot
from fqgan_dist.training.task import Parts

CONFIG = load_tiny("autoregressive.training.ema_decay=0.5")
CPU = torch.device("cpu")


@pytest.fixture
def task() -> AutoregressiveTask:
    return build_autoregressive_task(CONFIG)


def train(task: AutoregressiveTask, steps: range) -> dict[str, float]:
    values: dict[str, Tensor] = {}
    for step in steps:
        values = task.train_step(draw_codes(CONFIG, step, (0, 1)), step)
    return {name: value.item() for name, value in values.items()}


def snapshot(task: AutoregressiveTask) -> Parts:
    return copy.deepcopy(task.state_dict())


def is_equal(one: Parts, other: Parts) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[part][name])
        for part, tensors in one.items()
        for name, tensor in tensors.items()
    )


def test_metrics_are_means_over_micro_batches_of_each_codebook_s_loss(
    task: AutoregressiveTask,
) -> None:
    model = copy.deepcopy(task.model).train()
    rows = []
    for batch in draw_codes(CONFIG, 1, (0, 1)):
        with keyed_torch_rng(0, "autoregressive", 1, batch.micro_batch, device=CPU):
            rows.append(compute_code_losses(model(batch.codes, batch.labels), batch.codes))
    expected = torch.stack(rows).mean(dim=0).detach()
    values = train(task, range(1, 2))
    names = ("visual", "semantic_mid", "semantic_high")
    assert [values[f"autoregressive/loss/{name}"] for name in names] == pytest.approx(
        expected.tolist()
    )
    assert values["autoregressive/loss/total"] == pytest.approx(float(expected.mean()))


def test_dropout_depends_on_step_and_micro_batch_only(task: AutoregressiveTask) -> None:
    first = train(task, range(1, 2))
    torch.rand(17)  # whatever else draws
    again = train(build_autoregressive_task(CONFIG), range(1, 2))
    assert first == again


def test_the_learning_rate_is_the_schedule_s(task: AutoregressiveTask) -> None:
    assert train(task, range(1, 2))["autoregressive/lr"] == pytest.approx(0.5e-3)
    assert train(task, range(2, 3))["autoregressive/lr"] == pytest.approx(1e-3)


def test_it_learns(task: AutoregressiveTask) -> None:
    before = train(task, range(1, 2))["autoregressive/loss/total"]
    batches = draw_codes(CONFIG, 1, (0, 1))  # the same again and again, at the full rate
    losses = [task.train_step(batches, 3)["autoregressive/loss/total"].item() for _ in range(40)]
    assert losses[-1] < before - 0.1


def test_the_average_follows_the_weights(task: AutoregressiveTask) -> None:
    start = snapshot(task)
    train(task, range(1, 2))
    after = snapshot(task)
    assert not is_equal(start, after)
    for name, average in after["autoregressive_ema"].items():
        expected = (start["autoregressive"][name] + after["autoregressive"][name]) / 2
        torch.testing.assert_close(average, expected)


def test_evaluation_is_of_the_average_in_evaluation_mode(task: AutoregressiveTask) -> None:
    train(task, range(1, 3))
    seen: list[Tensor] = []

    def measure(model: torch.nn.Module) -> dict[str, float]:
        seen.extend(parameter.detach().clone() for parameter in model.parameters())
        return {"autoregressive/validation/training": float(model.training)}

    task.evaluate_fn = measure
    before = snapshot(task)
    assert task.evaluate(2) == {"autoregressive/validation/training": 0.0}
    assert task.model.training
    averages = before["autoregressive_ema"].values()
    assert all(torch.equal(a, b) for a, b in zip(seen, averages, strict=True))
    assert is_equal(snapshot(task), before)


def test_training_continues_from_its_state_to_the_bit(task: AutoregressiveTask) -> None:
    train(task, range(1, 4))
    state = snapshot(task)
    train(task, range(4, 7))
    resumed = build_autoregressive_task(CONFIG)
    resumed.load_state_dict(state)
    train(resumed, range(4, 7))
    assert is_equal(snapshot(resumed), snapshot(task))


def test_nothing_moves_when_a_gradient_is_not_finite() -> None:
    class Breaking(PlainEngine):
        is_broken = False

        def backward(self, loss: Tensor, slot: Slot) -> None:
            super().backward(loss, slot)
            if self.is_broken:
                (parameter, *_) = self._parameters
                assert parameter.grad is not None
                parameter.grad.view(-1)[0] = float("inf")

    task = build_autoregressive_task(CONFIG, engine_type=Breaking)
    train(task, range(1, 3))
    before = snapshot(task)
    Breaking.is_broken = True
    train(task, range(3, 4))
    assert task.engine.refused
    after = snapshot(task)
    # An average over steps goes on in one that moves nothing.
    for part in before.keys() - {"autoregressive_ema"}:
        assert is_equal({part: after[part]}, {part: before[part]})


def test_a_state_without_the_average_is_refused(task: AutoregressiveTask) -> None:
    state = snapshot(task)
    state["autoregressive_ema"].popitem()
    with pytest.raises(CheckpointError, match=r"averaged weights: .*missing"):
        task.load_state_dict(state)

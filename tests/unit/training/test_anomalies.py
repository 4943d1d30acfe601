from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fqgan_dist.training.anomalies import Anomaly, AnomalyPolicy, AnomalyWatch, Answer, Evidence
from fqgan_dist.training.config import AnomalyConfig


def evidence(rows: list[list[float]], norm: float = 1.0) -> list[Evidence]:
    return [Evidence(["a/loss", "b/loss"], torch.tensor(rows), "a/norm", torch.tensor(norm))]


def examine(*steps: list[Evidence], **settings: Any) -> list[Anomaly]:
    watch = AnomalyWatch(AnomalyConfig(**settings))
    for step, each in enumerate(steps, 1):
        watch.note(step, each)
    return watch.drain()


CALM = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def test_finite_numbers_are_none() -> None:
    assert examine(evidence(CALM), evidence(CALM)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_term_and_the_micro_batch_are_named(value: float) -> None:
    (anomaly,) = examine(evidence(CALM), evidence([[1.0, 2.0], [3.0, value], [5.0, 6.0]], value))
    assert (anomaly.step, anomaly.kind) == (2, "not_finite")
    assert anomaly.terms == ("b/loss", "a/norm")
    assert anomaly.micro_batches == (1,)
    assert anomaly.describe() == "step 2: b/loss, a/norm is not finite"


def test_where_a_gradient_alone_tells_all_micro_batches_may_have_done_it() -> None:
    (anomaly,) = examine(evidence(CALM, math.inf))
    assert (anomaly.terms, anomaly.micro_batches) == (("a/norm",), (0, 1, 2))


def test_a_spike_is_one_beyond_the_median_of_enough_steps() -> None:
    calm = [evidence(CALM, 1.0 + 0.1 * (step % 3)) for step in range(4)]
    spike = evidence(CALM, 40.0)
    assert examine(*calm[:1], spike, spike_window=8, spike_factor=10.0) == []
    (anomaly,) = examine(*calm, spike, *calm, spike_window=8, spike_factor=10.0)
    assert (anomaly.step, anomaly.kind, anomaly.terms) == (5, "spike", ("a/norm",))
    assert "40, usually 1.05" in anomaly.describe()


def test_the_history_is_that_of_an_unbroken_run() -> None:
    config = AnomalyConfig(spike_window=8, spike_factor=10.0)
    unbroken, resumed = AnomalyWatch(config), AnomalyWatch(config)
    for step in range(1, 7):
        unbroken.note(step, evidence(CALM, float(step)))
    assert unbroken.drain() == []
    resumed.load_state(unbroken.state())
    for watch in (unbroken, resumed):
        watch.note(7, evidence(CALM, 100.0))
    assert unbroken.drain() == resumed.drain() != []


def not_finite(step: int) -> Anomaly:
    return Anomaly(step=step, kind="not_finite", terms=("a/loss",), micro_batches=(0,))


def spike(step: int) -> Anomaly:
    return Anomaly(step=step, kind="spike", terms=("a/norm",), micro_batches=(0,), detail="9")


@pytest.mark.parametrize(
    ("settings", "anomalies", "answers"),
    [
        ({"on_not_finite": "stop"}, [not_finite(1)], ["stop"]),
        (
            {"max_skips": 2, "max_rollbacks": 1},
            [not_finite(each) for each in range(1, 8)],
            ["skip", "skip", "rollback", "skip", "skip", "stop"],
        ),
        ({"on_not_finite": "rollback"}, [not_finite(1)] * 3, ["rollback", "rollback", "stop"]),
        ({}, [spike(1)] * 9, ["report"] * 9),
        ({"on_spike": "rollback", "max_rollbacks": 1}, [spike(4), spike(5)], ["rollback", "stop"]),
    ],
)
def test_what_does_not_help_is_followed_by_something_stronger(
    settings: dict[str, Any], anomalies: list[Anomaly], answers: list[Answer]
) -> None:
    policy = AnomalyPolicy(AnomalyConfig(**settings))
    given = [policy.answer(each, has_checkpoint=True)[0] for each in anomalies]
    assert given[: len(answers)] == answers


def test_a_checkpoint_past_what_was_bad_is_progress() -> None:
    policy = AnomalyPolicy(AnomalyConfig(on_not_finite="rollback", max_rollbacks=1))
    for step in (5, 15, 25):
        assert policy.answer(not_finite(step), has_checkpoint=True)[0] == "rollback"
        policy.committed(step + 1)
    assert policy.answer(not_finite(35), has_checkpoint=True)[0] == "rollback"
    policy.committed(34)  # before it: the same numbers may come again
    assert policy.answer(not_finite(36), has_checkpoint=True)[0] == "stop"


def test_without_a_checkpoint_there_is_nothing_to_go_back_to() -> None:
    policy = AnomalyPolicy(AnomalyConfig(on_not_finite="rollback"))
    answer, why = policy.answer(not_finite(1), has_checkpoint=False)
    assert answer == "stop"
    assert "no checkpoint yet" in why

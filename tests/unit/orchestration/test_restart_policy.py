"""What is passing is waited for, what is unknown is counted, and progress forgives both."""

from __future__ import annotations

import itertools

import pytest

from fqgan_dist.errors import (
    ClusterError,
    LossError,
    NoCapacityError,
    PassingError,
    StorageOutageError,
)
from fqgan_dist.orchestration.restart_policy import Cause, RestartPolicy
from fqgan_dist.waiting import PatienceConfig


class Training:
    """A clock, the newest commit, and the policy that looks at both."""

    def __init__(self, max_failures: int = 2) -> None:
        self.now = 0.0
        self.commit = 5
        self.policy = RestartPolicy(
            "tokenizer",
            max_failures=max_failures,
            patience=PatienceConfig(storage_s=1000, capacity_s=2000, losses_s=3000),
            newest_commit=lambda: self.commit,
            clock=lambda: self.now,
        )

    def end(self, cause: Cause, *, after_s: float = 1.0) -> float:
        began = self.now
        self.now += after_s
        wait_s = self.policy.wait_after(cause, "what happened", began=began)
        self.now += wait_s
        return wait_s

    def end_forever(self, cause: Cause) -> None:
        for _ in itertools.count():
            self.end(cause)


def test_the_first_wait_is_none_and_the_others_grow_up_to_five_minutes() -> None:
    training = Training()
    waits = [training.end("loss") for _ in range(10)]
    assert waits == [0, 5, 10, 20, 40, 80, 160, 300, 300, 300]


@pytest.mark.parametrize(
    ("cause", "error", "patience_s"),
    [
        ("storage", StorageOutageError, 1000),
        ("capacity", NoCapacityError, 2000),
        ("loss", LossError, 3000),
    ],
)
def test_patience_ends_after_its_time_without_progress(
    cause: Cause, error: type[PassingError], patience_s: float
) -> None:
    training = Training()
    with pytest.raises(error, match=r"no progress for .*patience\.\w+_s.*what happened.*same comm"):
        training.end_forever(cause)
    assert patience_s <= training.now <= patience_s + 310


@pytest.mark.parametrize("cause", ["storage", "capacity", "loss", "unknown"])
def test_progress_forgives_everything(cause: Cause) -> None:
    training = Training(max_failures=1)
    for _ in range(50):
        assert training.end(cause, after_s=900) == 0
        training.commit += 1


def test_the_wait_for_resources_counts_from_its_start() -> None:
    training = Training()
    with pytest.raises(NoCapacityError):
        training.end("capacity", after_s=2000)


def test_unknown_failures_are_counted_and_forgiven() -> None:
    training = Training()
    training.end("unknown")
    training.end("loss")
    training.end("unknown")
    assert training.policy.describe("unknown") == "failure 2 of 2 without a new checkpoint"
    training.commit += 1
    training.end("unknown")
    training.end("unknown")
    with pytest.raises(ClusterError, match=r"failed 3 times .*max_failures: 2") as caught:
        training.end("unknown")
    assert not isinstance(caught.value, PassingError)


def test_planned_restarts_that_saved_wait_for_nothing_and_count_for_nothing() -> None:
    training = Training(max_failures=0)
    for _ in range(50):
        training.commit += 1
        assert training.end("notice", after_s=900) == 0
        assert training.policy.describe("notice") == "progress was saved"


def test_notice_again_and_again_without_progress_is_a_loss() -> None:
    training = Training()
    training.commit += 1
    assert [training.end("notice") for _ in range(4)] == [0, 5, 10, 20]
    assert "without a new checkpoint" in training.policy.describe("notice")
    with pytest.raises(LossError, match=r"patience\.losses_s"):
        training.end_forever("notice")


def test_the_log_says_how_long_is_left() -> None:
    training = Training()
    training.end("loss")
    training.end("loss", after_s=600)
    assert training.policy.describe("loss").startswith("patience.losses_s: 10 min 05 s of 50 min")

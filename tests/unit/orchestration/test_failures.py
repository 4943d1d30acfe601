from __future__ import annotations

import errno
import logging
import pickle
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError

from fqgan_dist.errors import (
    ClusterError,
    DataError,
    HangError,
    NoticeError,
    NumericsError,
    StorageOutageError,
)
from fqgan_dist.orchestration import failures
from fqgan_dist.orchestration.failures import StampedError, explain_failure, stamp_errors

ACTOR_DIED = (
    "The actor died unexpectedly before finishing this task.\n"
    "\tclass_name: RayTrainWorker\n\tpid: 7\n\tip: 10.0.0.3\n"
    "The actor is dead because its node has died."
)


class PollFailedError(Exception):
    """As Ray Train's wrapper of what a poll of a worker raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = cause


class UnpicklableError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@pytest.fixture(autouse=True)
def no_hold_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "HOLD_BACK_S", 0.0)


def stamp(error: Exception, rank: int, moment: float, patch: pytest.MonkeyPatch) -> StampedError:
    """Let a rank fail at a moment; what arrives at the driver has been pickled."""
    patch.setenv("RANK", str(rank))
    patch.setenv("WORLD_SIZE", "4")
    patch.setattr(failures.time, "time", lambda: moment)
    with pytest.raises(StampedError) as caught, stamp_errors():
        raise error
    return pickle.loads(pickle.dumps(caught.value))


def group_error(errors: Mapping[int, Exception]) -> WorkerGroupError:
    return WorkerGroupError("several", dict(errors))


def test_the_first_error_by_time_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    report = explain_failure(
        group_error(
            {
                0: stamp(DataError("shard 7 is missing"), 0, 200.0, monkeypatch),
                3: stamp(NumericsError("loss is not finite"), 3, 100.0, monkeypatch),
            }
        )
    )
    assert report.first.place.startswith("rank 3/4 node0 ")
    assert report.cause == "permanent"
    lines = report.text.splitlines()
    assert "NumericsError: loss is not finite" in lines[0]
    assert "DataError: shard 7 is missing" in lines[1]
    assert isinstance(report.error, NumericsError)
    assert str(report.error).startswith("[rank 3/4 node0 ")


@pytest.mark.parametrize(
    "echo",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.3]"),
        RuntimeError("NCCL communicator was aborted on rank 0."),
        dist.DistBackendError("ncclRemoteError"),
        ConnectionResetError("Connection reset by peer"),
    ],
    ids=lambda error: str(error)[:12],
)
def test_the_echo_of_another_ranks_end_comes_last_whatever_its_clock_says(
    echo: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = explain_failure(
        group_error(
            {
                0: stamp(echo, 0, 1.0, monkeypatch),
                1: stamp(DataError("cannot decode"), 1, 900.0, monkeypatch),
            }
        )
    )
    assert report.first.place.startswith("rank 1/4")
    assert [other.kind for other in report.others] == ["echo"]


def test_a_lost_process_comes_before_its_echo_and_is_not_permanent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died = RayActorError(error_msg=ACTOR_DIED)
    echo = stamp(RuntimeError("gloo: timed out"), 0, 1.0, monkeypatch)
    report = explain_failure(group_error({0: echo, 2: PollFailedError(died)}))
    assert report.first.kind == "lost"
    assert report.cause == "loss"
    assert isinstance(report.error, ClusterError)
    assert report.text.startswith("[rank 2 10.0.0.3] its process or node was lost: ")
    assert "class_name" not in report.text


@pytest.mark.parametrize(
    "failure",
    [
        WorkerGroupStartupFailedError(
            "One of the worker actors failed to initialize due to error:\nTraceback\n  File x\n"
            f"ray.exceptions.ActorDiedError: {ACTOR_DIED}"
        ),
        RayActorError(error_msg=ACTOR_DIED),
    ],
    ids=["failed start", "dead actor"],
)
def test_a_rank_that_is_lost_while_it_starts_is_a_loss_to_be_tried_again(
    failure: Exception,
) -> None:
    error = ControllerError(failure)
    report = explain_failure(error)
    assert report.first.kind == "lost"
    assert report.cause == "loss"
    assert "10.0.0.3] its process or node was lost: " in report.text
    assert "its node has died" in report.text
    assert "Traceback" not in report.text


def test_notice_is_said_once_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [stamp(NoticeError("SIGTERM"), rank, 10.0 + rank, monkeypatch) for rank in range(4)]
    report = explain_failure(group_error(dict(enumerate(errors))))
    assert report.cause == "notice"
    assert report.text.count("NoticeError") == 1
    assert report.time == 10.0


def test_notice_excuses_no_error_of_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    notice = stamp(NoticeError("SIGTERM"), 0, 10.0, monkeypatch)
    wrong = stamp(NumericsError("loss is not finite"), 3, 20.0, monkeypatch)
    report = explain_failure(group_error({0: notice, 3: wrong}))
    assert report.cause == "permanent"
    assert isinstance(report.error, NumericsError)


def test_notice_explains_the_node_that_is_gone_since(monkeypatch: pytest.MonkeyPatch) -> None:
    notice = stamp(NoticeError("Ray drains node 10.0.0.3"), 0, 10.0, monkeypatch)
    died = PollFailedError(RayActorError(error_msg=ACTOR_DIED))
    assert explain_failure(group_error({0: notice, 2: died})).cause == "notice"


def test_a_group_without_room_is_no_loss() -> None:
    assert explain_failure(ControllerError(WorkerGroupStartupTimeoutError(8))).cause == "capacity"


def test_an_error_of_no_rank_is_explained_too() -> None:
    report = explain_failure(WorkerGroupError("NCCL hangs", {}))
    assert "NCCL hangs" in report.text


def test_a_hang_is_a_loss_and_said_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = [stamp(HangError("rank 1 is it"), rank, 9.0 - rank, monkeypatch) for rank in (0, 2)]
    lost = PollFailedError(RayActorError(error_msg=ACTOR_DIED))
    report = explain_failure(group_error({0: hangs[0], 1: lost, 2: hangs[1]}))
    assert report.cause == "loss"
    first, second = report.text.splitlines()
    assert first.startswith("[rank 2/4")
    assert "HangError: rank 1 is it" in first
    assert "then [rank 1 10.0.0.3] its process or node was lost" in second


def test_an_echo_alone_is_a_loss_to_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    report = explain_failure(
        group_error({0: stamp(RuntimeError("Broken pipe"), 0, 1.0, monkeypatch)})
    )
    assert report.cause == "loss"
    assert isinstance(report.error, ClusterError)


def test_an_error_of_ours_that_names_a_connection_is_no_echo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = stamp(DataError("s3://b: connection reset; check the network"), 1, 1.0, monkeypatch)
    report = explain_failure(group_error({1: error}))
    assert report.first.kind == "own"
    assert report.cause == "permanent"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (TypeError("a mistake"), "permanent"),
        (KeyError("a mistake"), "permanent"),
        (DataError("cannot decode"), "permanent"),
        (StorageOutageError("s3://b: 503"), "storage"),
        (torch.OutOfMemoryError("CUDA out of memory"), "unknown"),
        (MemoryError(), "unknown"),
        (OSError("No space left on device"), "unknown"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "unknown"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_come_again_is_permanent(
    error: Exception, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = explain_failure(group_error({0: stamp(error, 0, 1.0, monkeypatch)}))
    assert report.cause == cause
    assert type(report.error) is type(error)
    assert any("rank 0/4" in note for note in report.error.__notes__)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "storage"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/runs/x"), "storage"),
        (OSError(errno.ETIMEDOUT, "Connection timed out", "/runs/x"), "storage"),
        (PermissionError(errno.EACCES, "Permission denied", "/runs/x"), "permanent"),
        # Of a socket: it follows from another rank's end.
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "loss"),
    ],
    ids=str,
)
def test_raw_errors_of_disks_are_told_from_others(
    error: OSError, cause: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = explain_failure(group_error({0: stamp(error, 0, 1.0, monkeypatch)}))
    assert report.cause == cause
    assert "Traceback" not in caplog.text
    if cause == "storage":
        assert isinstance(report.error, StorageOutageError)


def test_an_error_that_cannot_be_pickled_still_tells_its_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = stamp(UnpicklableError("bad", "thing"), 0, 1.0, monkeypatch)
    report = explain_failure(group_error({0: error}))
    assert "UnpicklableError: bad thing" in report.text


def test_errors_that_no_rank_stamped_are_explained() -> None:
    died = explain_failure(RayActorError(error_msg=ACTOR_DIED))
    assert died.text.startswith("[an actor 10.0.0.3] its process or node was lost")
    task_error = RayTaskError("process", "traceback", DataError("cannot decode"))
    explained = explain_failure(task_error)
    assert explained.cause == "permanent"
    assert isinstance(explained.error, DataError)


def test_a_rank_logs_its_error_and_an_echo_only_as_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stamp(DataError("cannot decode"), 1, 1.0, monkeypatch)
    stamp(RuntimeError("Broken pipe"), 0, 2.0, monkeypatch)
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    assert caplog.messages[0] == "DataError: cannot decode"


def test_no_error_is_no_error() -> None:
    with stamp_errors():
        pass

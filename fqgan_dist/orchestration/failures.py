"""Why a training failed: the first failing rank's own error, before what followed from it.

When one rank fails the others do soon after, in a collective that lost its partner, and Ray Train
reports whichever it sees, by rank. So every rank stamps its error with time and place; an error
that is the echo of another rank's end is held back until Ray has seen that end, and reported last.
"""

from __future__ import annotations

import logging
import re
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError, RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError

from fqgan_dist.errors import ClusterError, FqganError, HangError, NoticeError, PassingError
from fqgan_dist.orchestration.pool_actor import Failure
from fqgan_dist.orchestration.ray_train_configs import POLL_S
from fqgan_dist.orchestration.restart_policy import Cause
from fqgan_dist.storage.disk_errors import explain_if_of_disk
from fqgan_dist.telemetry.log_files import publish_log
from fqgan_dist.world import World

# How long an echo is held back: until Ray Train has polled the worker that failed first, and once
# more in case that poll came to nothing.
HOLD_BACK_S = 3 * POLL_S

FailureKind = Literal["own", "lost", "echo"]
"""`own`: the rank's own error. `lost`: its process or node is gone. `echo`: of another's end."""

_ORDER: tuple[FailureKind, ...] = ("own", "lost", "echo")
_ECHO_TYPES = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
_ECHO_TEXT = re.compile(
    r"gloo|nccl|process ?group|connection (was )?(closed|reset|refused)|broken pipe|timed out",
    re.IGNORECASE,
)
_NODE_ADDRESS = re.compile(r"^\tip: (\S+)$", re.MULTILINE)
_LOSS_CHARACTERS = 400
# Mistakes of the program: they would come again.
_PROGRAM_ERRORS = (
    "ArithmeticError",
    "AssertionError",
    "AttributeError",
    "ImportError",
    "LookupError",
    "NameError",
    "TypeError",
    "ValueError",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """One rank's end, as plain data."""

    place: str
    """For example `rank 1/2 node0`."""
    kind: FailureKind
    failure: Failure | None
    """None where the process was lost with it."""
    text: str
    """Its type and message on one line."""
    time: float = 0.0
    """Unix seconds of the rank's own clock; 0 where it is not known."""

    @property
    def cause(self) -> Cause:
        """What kind of failure it is to whoever decides about another start."""
        if self.kind != "own" or self.failure is None:
            # An echo is first where nobody has an error of its own: a partner did not answer.
            return "loss"
        names = set(self.failure.type_names)
        if NoticeError.__name__ in names:
            return "notice"
        if self.is_hang:
            return "loss"
        if PassingError.__name__ in names:
            return "storage"
        if WorkerGroupStartupTimeoutError.__name__ in names:
            return "capacity"
        is_permanent = FqganError.__name__ in names or bool(names & set(_PROGRAM_ERRORS))
        return "permanent" if is_permanent else "unknown"

    @property
    def is_hang(self) -> bool:
        """Whether its watchdog ended it; those of all ranks do, and say the same."""
        return self.failure is not None and HangError.__name__ in self.failure.type_names

    def __str__(self) -> str:
        return f"[{self.place}] {self.text}"


class StampedError(Exception):
    """What leaves a train worker in place of its error; survives pickling whatever it was."""

    def __init__(self, rank_failure: RankFailure) -> None:
        super().__init__(rank_failure)
        self.rank_failure = rank_failure

    def __str__(self) -> str:
        return str(self.rank_failure)


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """Why a worker group ended."""

    first: RankFailure
    """The cause."""
    others: tuple[RankFailure, ...] = ()
    """What followed, in the order of time."""

    @property
    def cause(self) -> Cause:
        return self.first.cause

    @property
    def time(self) -> float | None:
        """Unix seconds of the first error whose time is known."""
        times = [each.time for each in (self.first, *self.others) if each.time]
        return min(times, default=None)

    @property
    def text(self) -> str:
        if self.cause == "notice":  # all ranks say the same
            return str(self.first)
        return "\n  then ".join(str(failure) for failure in (self.first, *self.others))

    @property
    def error(self) -> Exception:
        """The cause as an exception of its own type where that is one of ours or of Python."""
        failure = self.first.failure
        if failure is None or self.first.kind != "own":
            return ClusterError(self.text)
        error = failure.restore()
        if isinstance(error, FqganError):
            error = type(error)(f"[{self.first.place}] {failure.message}")
        error.add_note(f"on {self.first.place}:\n{failure.traceback_text}")
        return error


@contextmanager
def stamp_errors() -> Iterator[None]:
    """Log what leaves the block of a train worker, and raise it with time and place.

    Raises:
        StampedError: in place of any exception.
    """
    try:
        yield
    except Exception as raw:
        error = explain_if_of_disk(raw)
        stamped = _stamp(error)
        if stamped.kind == "echo":
            logger.warning("%s (follows from another rank's end)", stamped.text)
        elif isinstance(error, NoticeError):
            logger.info("%s", stamped.text)
        else:
            # Our own messages say what to change; of others' errors the place matters.
            is_ours = isinstance(error, FqganError)
            logger.error("%s", stamped.text, exc_info=None if is_ours else error)
        publish_log()
        if stamped.kind == "echo":
            time.sleep(HOLD_BACK_S)
        raise StampedError(stamped) from None


def explain_failure(error: BaseException) -> FailureReport:
    """Find the first cause in what Ray raised."""
    if isinstance(error, ControllerError):
        first = _examine(error.controller_failure, place="a rank that started")
        return FailureReport(first=first)
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return FailureReport(first=_examine(error, place="an actor"))
    failures = [
        _examine(failure, place=f"rank {rank}") for rank, failure in error.worker_failures.items()
    ]
    # Stable: where times are not known, the order of ranks. Notice excuses no other error.
    failures.sort(key=lambda each: (_ORDER.index(each.kind), each.cause == "notice", each.time))
    first, *others = failures
    if first.is_hang:
        others = [failure for failure in others if not failure.is_hang]
    return FailureReport(first=first, others=tuple(others))


def describe_loss(error: BaseException) -> str:
    """Write Ray's many lines about a lost actor on one, without ids that say nothing to a user."""
    # Ray Train writes a whole traceback before what has happened.
    text = str(error).rpartition("\nray.exceptions.")[2].partition("Some common causes")[0]
    lines = [line for line in text.splitlines() if not line.startswith("\t")]
    return textwrap.shorten(" ".join(lines), _LOSS_CHARACTERS, placeholder=" ...")


def _stamp(error: Exception) -> RankFailure:
    address = ray.util.get_node_ip_address()
    return _describe(error, place=f"{World.from_environment()} {address}", moment=time.time())


def _examine(error: BaseException, *, place: str) -> RankFailure:
    """Describe one rank's error; `place` is used where the error itself names none."""
    # Ray Train's wrapper of a poll that failed: RayActorError if the process is gone.
    inner = getattr(error, "health_check_failure", None)
    if isinstance(inner, BaseException):
        error = inner
    if isinstance(error, StampedError):
        return error.rank_failure
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return _examine(error.cause, place=place)
    is_lost = isinstance(error, RayActorError | WorkerGroupStartupFailedError)
    if is_lost or not isinstance(error, Exception):
        text = f"its process or node was lost: {describe_loss(error)}"
        if found := _NODE_ADDRESS.search(str(error)):
            place = f"{place} {found[1]}"
        return RankFailure(place=place, kind="lost", failure=None, text=text)
    return _describe(error, place=place, moment=0.0)


def _describe(error: Exception, *, place: str, moment: float) -> RankFailure:
    error = explain_if_of_disk(error)
    failure = Failure.of(error)
    return RankFailure(
        place=place,
        kind="echo" if _is_echo(error) else "own",
        failure=failure,
        text=" ".join(str(failure).split()),
        time=moment,
    )


def _is_echo(error: Exception) -> bool:
    if isinstance(error, FqganError):
        return False
    if isinstance(error, _ECHO_TYPES):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_ECHO_TEXT.search(str(error)))

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
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2.api.exceptions import ControllerError

from fqgan_dist.errors import ClusterError, FqganError
from fqgan_dist.orchestration.pool_actor import Failure
from fqgan_dist.telemetry.log_files import publish_log
from fqgan_dist.world import World

# How long an echo is held back: Ray Train polls its workers every 2 s.
HOLD_BACK_S = 5.0

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
    def is_permanent(self) -> bool:
        if self.kind != "own" or self.failure is None:
            return False
        names = set(self.failure.type_names)
        return FqganError.__name__ in names or bool(names & set(_PROGRAM_ERRORS))

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
    def is_permanent(self) -> bool:
        return self.first.is_permanent

    @property
    def text(self) -> str:
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
    except Exception as error:
        stamped = _stamp(error)
        if stamped.kind == "echo":
            logger.warning("%s (follows from another rank's end)", stamped.text)
        else:
            # Our own messages say what to change; of others' errors the place matters.
            is_ours = isinstance(error, FqganError)
            logger.error("%s", stamped.text, exc_info=None if is_ours else error)
        publish_log()
        if stamped.kind == "echo":
            time.sleep(HOLD_BACK_S)
        raise StampedError(stamped) from None


def is_loss(error: ControllerError) -> bool:
    """Whether a group of train workers did not start because a process or node of it was lost."""
    return isinstance(error.controller_failure, RayActorError | WorkerGroupStartupFailedError)


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
    # Stable: where times are not known, the order of ranks.
    failures.sort(key=lambda failure: (_ORDER.index(failure.kind), failure.time))
    return FailureReport(first=failures[0], others=tuple(failures[1:]))


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

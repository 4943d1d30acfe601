"""Actor pools: chunks of work on processes of a Ray cluster that may come, go and die.

The driver hands each actor one chunk at a time, so nothing piles up anywhere: what is in flight is
bounded by the number of actors, and an answer is a few bytes, as actors commit outputs themselves.
Ray restarts nothing: the driver sees every loss, lets the chunk wait again unless its output is
committed already, and starts another actor. All actors die with the driver.

Every actor reserves its own resources, so a pool needs no placement group: what does not fit is
pending, and pending actors are what an autoscaler sees as demand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayActorError, RayError

from fqgan_dist.chunks import ChunkWork, RunChunks, process_pending
from fqgan_dist.errors import ClusterError
from fqgan_dist.orchestration.config import PoolConfig
from fqgan_dist.orchestration.pool_actor import (
    ActorPlace,
    Failure,
    PoolActor,
    PoolTask,
    PoolWatch,
)
from fqgan_dist.orchestration.pool_queue import ChunkQueue, count_wanted_actors
from fqgan_dist.orchestration.pool_shortage import describe_shortage
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.waiting import PatienceConfig

logger = logging.getLogger(__name__)

# Longest wait for an answer before the driver looks at what is pending.
_WAIT_S = 1.0
_SHORTAGE_WARNING_S = 10.0
_SLOW_START_WARNING_S = 60.0
_WARNING_INTERVAL_S = 60.0
# What actors that are let go have to finish their logs.
_GRACE_S = 10.0


@contextmanager
def open_pool(
    name: str,
    config: PoolConfig,
    *,
    observer: Observer,
    check_node: Callable[[], None] | None = None,
    patience: PatienceConfig | None = None,
    watch: PoolWatch | None = None,
) -> Iterator[RunChunks]:
    """Keep a pool of actors of the connected Ray for a block, which gives it work.

    What is given processes every chunk of some work that is not done. It is called for one piece
    of work after another, and actors, whose start takes seconds of imports, serve them all: at
    most `min_actors` wait between two, and the end of the block ends all. `check_node` is called
    once in every actor before its first chunk; picklable; raises on a node that cannot take part.
    `patience` is the run's. By `watch` an actor that hangs is ended, and its chunk waits again.

    Raises:
        FqganError: the first that a chunk or `check_node` raised; the rest is stopped at once.
        ClusterError: a chunk lost its actor too often, or no actor can be started.
        Exception: any other that a chunk raised, as it is a mistake of the program.
    """
    if not ray.is_initialized():
        raise ClusterError(f"{name}: no Ray is connected - expected one - call ray.init first")

    setup = partial(PoolTask, check_node=check_node, patience=patience, watch=watch or PoolWatch())
    with _Pool(name, config, setup) as pool:
        yield lambda work: process_pending(
            work, pool.run, observer, fields=lambda: {"actors": pool.num_ready}
        )


@dataclass(eq=False)
class _Member:
    """An actor as the driver sees it: pending, loading, idle, busy with a chunk, or parked.

    A parked one waits for chunks that may come. Nobody would hear of its death, so it loads before
    it works again: no chunk is blamed.
    """

    number: int
    handle: Any
    ref: Any
    """The answer that is due; None while idle or parked."""
    asked_at: float = field(default_factory=time.monotonic)
    """When it was started, or was asked to load."""
    place: ActorPlace | None = None
    """None while its resources are pending."""
    job: int | None = None
    """Number of the work that it has loaded or is loading."""
    has_started: bool = False
    """Whether it has ever loaded some work."""
    is_ready: bool = False
    """Whether it takes chunks of the present work."""
    chunk: int | None = None

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.chunk is None

    @property
    def is_parked(self) -> bool:
        return self.ref is None and not self.is_ready

    def __str__(self) -> str:
        return f"actor {self.number} ({self.place or 'pending'})"


@dataclass(frozen=True)
class _Job:
    number: int
    """In its pool."""
    work: ChunkWork
    queue: ChunkQueue
    task: Any
    """Ray's reference to the pickled `PoolTask`."""


class _Pool:
    """The actors of one stage; leaving the block ends them all."""

    def __init__(
        self,
        name: str,
        config: PoolConfig,
        build_task: Callable[[ChunkWork], PoolTask],
    ) -> None:
        self._name = name
        self._config = config
        self._build_task = build_task
        self._actor_class: Any = ray.remote(PoolActor).options(
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            resources=dict(config.custom),
            max_restarts=0,
            max_task_retries=0,
        )
        self._members: list[_Member] = []
        self._leaving: list[_Member] = []
        self._num_jobs = 0
        self._num_started = 0
        self._num_lost_starts = 0
        self._last_loss = ""
        self._next_warning = 0.0

    def __enter__(self) -> _Pool:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            for member in self._members:
                self._let_go(member)
            self._members.clear()
            self._end_finished(timeout_s=_GRACE_S)
        self._kill_all()

    @property
    def num_ready(self) -> int:
        return sum(member.is_ready for member in self._members)

    def run(self, work: ChunkWork, chunks: Sequence[int]) -> Iterator[int]:
        """Give every chunk once, when its output is committed; raises as `open_pool`."""
        if not chunks:
            return
        job = self._open_job(work, chunks)
        try:
            while job.queue or self._busy:
                self._hand_out(job)
                self._resize(job)
                self._end_finished(timeout_s=0)
                self._warn_of_pending(work)
                chunk = self._await_answer(job)
                if chunk is not None:
                    yield chunk
            self._resize(job)
            self._end_finished(timeout_s=_GRACE_S)
        except BaseException:
            self._kill_all()  # what they do belongs to no work any more
            raise

    def _open_job(self, work: ChunkWork, chunks: Sequence[int]) -> _Job:
        task = self._build_task(work)
        data = cloudpickle.dumps(task)  # pyright: ignore[reportPrivateImportUsage] it is public
        queue = ChunkQueue(
            chunks,
            description=work.description,
            max_failures=self._config.max_failures_per_chunk,
        )
        number, self._num_jobs = self._num_jobs, self._num_jobs + 1
        self._num_lost_starts = 0
        return _Job(number, work, queue, ray.put(data))

    @property
    def _busy(self) -> list[_Member]:
        return [member for member in self._members if member.chunk is not None]

    def _hand_out(self, job: _Job) -> None:
        for member in self._members:
            if not job.queue:
                return
            if member.is_parked:
                self._load(member, job)
            elif member.is_idle:
                member.chunk = job.queue.take()
                member.ref = member.handle.process.remote(member.chunk)

    def _load(self, member: _Member, job: _Job) -> None:
        member.job, member.asked_at = job.number, time.monotonic()
        member.ref = member.handle.load.remote(job.task, job=job.number)

    def _resize(self, job: _Job) -> None:
        waiting = len(job.queue)
        wanted = count_wanted_actors(
            self._config,
            waiting=waiting,
            busy=len(self._busy),
            located=sum(member.place is not None for member in self._members),
            present=len(self._members),
        )
        allowed = (self._config.max_failures_per_chunk + 1) * self._config.min_actors
        while len(self._members) < wanted and self._num_lost_starts < allowed:
            self._start()
        if not self._members and waiting:
            raise ClusterError(
                f"{job.work.description}: {self._num_lost_starts} actors died while they "
                f"started, the last one of: {self._last_loss} - expected that one of them lives - "
                f"look at the actors' logs and the nodes' memory; what is finished stays, and the "
                f"same command goes on"
            )
        # Pending ones first, then the newest: what was asked for last comes last.
        spare = [member for member in reversed(self._members) if member.chunk is None]
        spare.sort(key=lambda member: member.place is not None)
        for member in spare[: max(0, len(self._members) - wanted)]:
            self._members.remove(member)
            self._let_go(member)
        if not waiting:
            for member in self._members:
                member.is_ready = member.chunk is not None

    def _start(self) -> None:
        number, self._num_started = self._num_started, self._num_started + 1
        handle = self._actor_class.remote(self._name, number=number, gpus=self._config.gpus)
        self._members.append(_Member(number, handle, handle.locate.remote()))

    def _let_go(self, member: _Member) -> None:
        # It has no chunk: so its node may go too.
        if member.has_started:
            member.ref = member.handle.finish.remote()
            self._leaving.append(member)
        else:
            ray.kill(member.handle)

    def _kill_all(self) -> None:
        for member in [*self._members, *self._leaving]:
            ray.kill(member.handle)
        self._members.clear()
        self._leaving.clear()

    def _end_finished(self, timeout_s: float) -> None:
        # Ray's gentle end takes 4 s of a process that has loaded torch, during which it holds
        # memory that Ray counts as free already; a kill takes 50 ms (both measured).
        if not self._leaving:
            return
        refs = [member.ref for member in self._leaving]
        finished = set(ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0])
        for member in [member for member in self._leaving if member.ref in finished]:
            self._leaving.remove(member)
            ray.kill(member.handle)

    def _await_answer(self, job: _Job) -> int | None:
        """Wait for one answer, not long; return the chunk that is finished, if one is."""
        members = {member.ref: member for member in self._members if not member.is_parked}
        ready, _ = ray.wait(list(members), num_returns=1, timeout=_WAIT_S)
        if not ready:
            return None
        member = members[ready[0]]
        answer = _fetch(ready[0])
        if isinstance(answer, RayError):
            return self._replace(member, job, _describe_loss(answer), counts=not _is_drain(answer))
        if isinstance(answer, ActorPlace):
            member.place = answer
            self._load(member, job)
            return None
        if member.job != job.number:
            member.ref = None  # it was loading former work when that ended
            member.has_started |= answer is None
            return None
        if isinstance(answer, Failure):
            if not answer.is_of_process:
                raise self._explain(answer, member, job)
            return self._replace(member, job, str(answer), counts=True)
        self._num_lost_starts = 0
        if not member.has_started:
            logger.info("%s: %s is ready", job.work.description, member)
        chunk, member.chunk, member.ref = member.chunk, None, None
        member.has_started = member.is_ready = True
        return chunk

    def _replace(self, member: _Member, job: _Job, cause: str, *, counts: bool) -> int | None:
        """Forget an actor that was lost; return its chunk if its output was committed before.

        Another one is started by `_resize`, if one is still wanted.
        """
        ray.kill(member.handle)  # it may live, and be out of reach or out of memory
        self._members.remove(member)
        self._last_loss = cause
        chunk, name = member.chunk, job.work.description
        if chunk is None:
            self._num_lost_starts += not member.has_started
            logger.warning("%s: lost %s: %s", name, member, cause)
            return None
        if job.work.is_done(chunk):
            logger.warning("%s: lost %s after chunk %d: %s", name, member, chunk, cause)
            return chunk
        logger.warning("%s: lost %s, chunk %d waits again: %s", name, member, chunk, cause)
        job.queue.put_back(chunk, cause, counts=counts)
        return None

    def _explain(self, failure: Failure, member: _Member, job: _Job) -> Exception:
        """Return the exception of an actor, with the place that it comes from as a note."""
        error = failure.restore()
        doing = "its start" if member.chunk is None else f"chunk {member.chunk}"
        error.add_note(f"in {doing} of {job.work.description}, {member}:\n{failure.traceback_text}")
        return error

    def _warn_of_pending(self, work: ChunkWork) -> None:
        """Say now and then what actors wait for: an autoscaler may bring it, or nobody."""
        now = time.monotonic()
        if now < self._next_warning:
            return
        pending = [member for member in self._members if member.place is None]
        loading = [
            member
            for member in self._members
            if member.place and not member.is_ready and not member.is_parked
        ]
        if _longest_wait(pending, now) >= _SHORTAGE_WARNING_S:
            slow, state = pending, f"wait for resources: {describe_shortage(self._config)}"
        elif _longest_wait(loading, now) >= _SLOW_START_WARNING_S:
            slow, state = loading, "have resources and still load; look at their nodes' load"
        else:
            return
        self._next_warning = now + _WARNING_INTERVAL_S
        logger.warning(
            "%s: since %.0f s %d of %d actors %s",
            work.description,
            _longest_wait(slow, now),
            len(slow),
            len(self._members),
            state,
        )


def _longest_wait(members: list[_Member], now: float) -> float:
    return max((now - member.asked_at for member in members), default=0.0)


def _fetch(ref: Any) -> ActorPlace | Failure | RayError | None:
    # An exception means that the actor is lost.
    try:
        return ray.get(ref)
    except RayError as error:
        return error


def _is_drain(error: RayError) -> bool:
    # The node was taken away with notice: no chunk is to blame.
    return isinstance(error, RayActorError) and error.preempted


def _describe_loss(error: RayError) -> str:
    """Write Ray's many lines about a lost actor on one, without ids and common advice."""
    text = str(error).removeprefix(RayActorError.BASE_ERROR_MSG)
    text = text.removeprefix(ActorDiedError.BASE_ERROR_MSG).partition("Some common causes")[0]
    lines = [line for line in text.splitlines() if not line.startswith("\t")]
    return " ".join(" ".join(lines).split()) or type(error).__name__

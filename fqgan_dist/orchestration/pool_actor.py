"""One actor of a pool: a process on some node that makes chunks of work, one at a time.

Exceptions of the work come back as values, `Failure`: what Ray raises then means that the process
or its node was lost, and nothing else.

Torch takes seconds to import, so it is imported in the first `load`: an actor says where it is as
soon as its process runs, and the driver can tell who waits for resources from who loads.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import ray

from fqgan_dist import errors
from fqgan_dist.activity import ACTIVITY, WatchdogConfig
from fqgan_dist.chunks import ChunkWork
from fqgan_dist.errors import FqganError
from fqgan_dist.orchestration.heartbeats import BoardExchange
from fqgan_dist.storage.disk_errors import explain_if_of_disk
from fqgan_dist.telemetry.log_files import publish_log
from fqgan_dist.telemetry.watchdog import Watchdog, WatchedProcess
from fqgan_dist.waiting import PatienceConfig, apply_patience

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActorPlace:
    """Where an actor runs."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"


@dataclass(frozen=True)
class Failure:
    """An exception as plain data, as not every exception survives pickling."""

    type_names: tuple[str, ...]
    """Names of its classes, the most special first."""
    message: str
    traceback_text: str
    """Where it came from, with its causes."""
    pickled: bytes | None
    """The exception; None if it cannot be pickled or restored."""
    is_of_process: bool
    """Whether another process may well succeed."""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Describe an exception; what the operating system says of a disk in our words."""
        error = explain_if_of_disk(error)
        return cls(
            type_names=tuple(item.__name__ for item in type(error).__mro__),
            message=str(error),
            traceback_text="".join(traceback.format_exception(error)).rstrip(),
            pickled=_pickle_checked(error),
            is_of_process=_is_of_process(error),
        )

    def __str__(self) -> str:
        return f"{self.type_names[0]}: {self.message}" if self.message else self.type_names[0]

    def restore(self) -> Exception:
        """Return the exception, or if it did not survive the nearest one that says the same."""
        if self.pickled is not None:
            return pickle.loads(self.pickled)
        for name in self.type_names:
            known = getattr(errors, name, None)
            if isinstance(known, type) and issubclass(known, FqganError):
                return known(self.message)
        return RuntimeError(str(self))


@dataclass(frozen=True)
class PoolWatch:
    """How the actors of a pool are watched."""

    config: WatchdogConfig = field(default_factory=WatchdogConfig)
    exchange: BoardExchange | None = None
    """Where they tell how they are; None: nobody notices that one is stopped."""


@dataclass(frozen=True)
class PoolTask:
    """What all actors of a pool are given for one piece of work."""

    work: ChunkWork
    check_node: Callable[[], None] | None
    """Raises on a node that cannot take part; asked once in each process."""
    patience: PatienceConfig | None = None
    """Of the run; None: that of a command."""
    watch: PoolWatch = field(default_factory=PoolWatch)
    """How it is noticed that an actor hangs."""


class PoolActor:
    """Makes chunks of one piece of work after another.

    Nothing is done in the constructor, as exceptions there would only come back as Ray's text.
    """

    def __init__(self, pool: str, *, number: int, gpus: float) -> None:
        """Keep what `load` needs; `number` counts the actors of a pool from 0."""
        self._pool = pool
        self._number = number
        self._work: ChunkWork | None = None
        self._job: int | None = None
        self._is_configured = False
        self._watchdog: Watchdog | None = None
        if gpus == 0:
            # Ray 2.60 hides no GPU from who has reserved none: `device: auto` would take one.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def __repr__(self) -> str:
        return f"{self._pool} {self._number}"  # Ray puts it before lines on the console

    def locate(self) -> ActorPlace:
        """Say where this is, which is known as soon as the resources are there."""
        return ActorPlace(socket.gethostname(), os.getpid())

    def load(self, pickled_task: bytes, *, job: int) -> Failure | None:
        """Unpack the next work, which chooses the device of this process; at first set it up.

        Loading the job of the same number again does nothing.
        """
        if job == self._job:
            return None
        try:
            self._drop_work()
            task: PoolTask = pickle.loads(pickled_task)
            if not self._is_configured:
                if task.patience is not None:
                    apply_patience(task.patience)
                if task.check_node is not None:
                    task.check_node()
                task.work.set_up_process(f"{self._pool} actor", self._number)
                self._watch(task.watch)
                self._is_configured = True
            logger.info("%s", task.work.description)
            ACTIVITY.forget_pace()
            self._work, self._job = task.work, job
        except Exception as error:  # noqa: BLE001  the entry point of this process
            return Failure.of(error)
        return None

    def process(self, chunk: int) -> Failure | None:
        assert self._work is not None, "a chunk comes after its work"
        ACTIVITY.begin_unit()
        ACTIVITY.enter(f"chunk {chunk}", pace="steady", counts_storage=True)
        try:
            self._work.process(chunk)
        except Exception as error:
            # Not an error yet: the driver shows it, unless another actor succeeds.
            logger.info("chunk %d failed", chunk, exc_info=True)
            publish_log()
            return Failure.of(error)
        finally:
            ACTIVITY.end_unit()
            ACTIVITY.rest()
        logger.info("chunk %d is done", chunk)
        return None

    def finish(self) -> None:
        """Be ready to be killed: no line of the log is lost."""
        publish_log()

    def _watch(self, watch: PoolWatch) -> None:
        # To the end of the process, by its own hand if a chunk hangs: the pool gives it to another.
        process = WatchedProcess(
            name=f"{self._pool} actor {self._number}",
            group="here" if watch.exchange is None else watch.exchange.group,
            number=self._number,
            world_size=0,
            node=ray.get_runtime_context().get_node_id(),
            exchange=watch.exchange,
            warns=False,  # the driver tells
        )
        self._watchdog = Watchdog(process, watch.config)
        self._watchdog.__enter__()

    def _drop_work(self) -> None:
        if self._work is None:
            return
        import torch

        self._work = self._job = None
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _is_of_process(error: Exception) -> bool:
    """Whether a fresh process may be free of it: short memory, a GPU's sticky error state."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError)


def _pickle_checked(error: Exception) -> bytes | None:
    # None where it cannot be restored.
    try:
        data = pickle.dumps(error)
        restored = pickle.loads(data)
    except Exception:  # noqa: BLE001  an exception's own code can raise anything here
        return None
    return data if isinstance(restored, Exception) else None

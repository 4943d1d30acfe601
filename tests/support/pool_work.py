"""Small work for actor pools, told by files under its storage root what to do."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray

from fqgan_dist.chunks import ChunkWork
from fqgan_dist.config import load_config
from fqgan_dist.devices import select_device
from fqgan_dist.errors import DataError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import RunContext, RunWork
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

TINY = Path(__file__).parent / "tiny.yaml"
_POLL_S = 0.02
_WAIT_S = 120.0


def open_context(root: Path) -> RunContext:
    """A run whose root is empty."""
    config = load_config(TINY, [f"storage.root={root}"], RunConfig)
    device = select_device(config.device, World())
    return RunContext(config=config, storage=Storage(root), world=World(), device=device)


class FileWork(RunWork):
    """Writes `files/<chunk>`: where it was made, by which process."""

    description = "files"
    unit = "files"

    def __init__(self, root: Path, count: int) -> None:
        self.context = open_context(root)
        self.root = root
        self.count = count

    def chunks(self) -> range:
        return range(self.count)

    def size(self, chunk: int) -> int:
        return 1 + chunk

    def is_done(self, chunk: int) -> bool:
        return self.context.storage.exists(f"files/{chunk}")

    def process(self, chunk: int) -> None:
        self.count_try(chunk)
        self.write(chunk)

    def write(self, chunk: int) -> None:
        content = {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
        self.context.storage.write_bytes(f"files/{chunk}", json.dumps(content).encode())

    def count_try(self, chunk: int) -> int:
        """Note that a chunk is tried, and return how often it was before."""
        before = len(self.tries(chunk))
        self.context.storage.write_bytes(f"tries/{chunk}/{before}", str(os.getpid()).encode())
        return before

    def tries(self, chunk: int) -> list[int]:
        """The process ids that tried a chunk."""
        storage = self.context.storage
        names = storage.list(f"tries/{chunk}")
        return [int(storage.read_bytes(f"tries/{chunk}/{name}")) for name in names]

    def outputs(self) -> list[dict[str, str | int]]:
        storage = self.context.storage
        return [json.loads(storage.read_bytes(f"files/{chunk}")) for chunk in self.chunks()]


class GatedWork(FileWork):
    """A chunk waits for the file `gates/<chunk>`."""

    def process(self, chunk: int) -> None:
        self.count_try(chunk)
        wait_until((self.root / "gates" / str(chunk)).exists)
        self.write(chunk)

    def open_gates(self, *chunks: int) -> None:
        for chunk in chunks:
            self.context.storage.write_bytes(f"gates/{chunk}", b"")


class DeadlyWork(FileWork):
    """Kills its process at a chunk, the first `times`, before or after the commit."""

    def __init__(
        self, root: Path, count: int, *, chunk: int, times: int, after_commit: bool = False
    ) -> None:
        super().__init__(root, count)
        self.chunk, self.times, self.after_commit = chunk, times, after_commit

    def process(self, chunk: int) -> None:
        is_deadly = self.count_try(chunk) < self.times and chunk == self.chunk
        if self.after_commit:
            self.write(chunk)
        if is_deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        self.write(chunk)


class HangingWork(FileWork):
    """Stands still at a chunk, the first time: its process is stopped, or only sleeps."""

    def __init__(self, root: Path, count: int, *, chunk: int, is_stopped: bool) -> None:
        super().__init__(root, count)
        self.chunk, self.is_stopped = chunk, is_stopped

    def process(self, chunk: int) -> None:
        if self.count_try(chunk) == 0 and chunk == self.chunk:
            if self.is_stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)
        self.write(chunk)


class Ballast:
    """What some work loads at its first chunk."""


class BallastWork(FileWork):
    """Writes how many ballasts its process holds."""

    ballast: Ballast | None = None

    def process(self, chunk: int) -> None:
        self.ballast = self.ballast or Ballast()
        # By name: a class that travels as code need not be one class.
        count = sum(type(item).__name__ == Ballast.__name__ for item in gc.get_objects())
        self.context.storage.write_bytes(f"loaded/{chunk}", str(count).encode())
        self.write(chunk)

    def num_loaded(self) -> list[int]:
        storage = self.context.storage
        return [int(storage.read_bytes(f"loaded/{chunk}")) for chunk in self.chunks()]


class WrongWork(FileWork):
    """Raises at a chunk."""

    def __init__(self, root: Path, count: int, *, chunk: int, error: Callable[[], Exception]):
        super().__init__(root, count)
        self.chunk, self.error = chunk, error

    def process(self, chunk: int) -> None:
        if chunk == self.chunk and self.count_try(chunk) == 0:
            raise self.error()
        self.write(chunk)


def list_files(folder: Path) -> list[Path]:
    """List a folder's files without those that a killed writer has not finished."""
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


class Leash:
    """Lets work commit only so many files, however many processes do it."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Start without a limit.

        `path` holds the limit, `folder` the files that count.
        """
        self.path, self.folder = path, folder
        self.set_limit(sys.maxsize)

    def set_limit(self, count: int) -> None:
        temporary = self.path.with_suffix(".new")
        temporary.write_text(str(count))
        temporary.replace(self.path)

    def wait(self) -> None:
        wait_until(lambda: self.count() < int(self.path.read_text()))

    def count(self) -> int:
        return len(list_files(self.folder))


class LeashedWork:
    """Other work, each chunk of which waits for a leash."""

    def __init__(self, work: ChunkWork, leash: Leash) -> None:
        self.work, self.leash = work, leash
        self.description, self.unit = work.description, work.unit
        self.local_reason = work.local_reason

    def chunks(self) -> Sequence[int]:
        return self.work.chunks()

    def size(self, chunk: int) -> int:
        return self.work.size(chunk)

    def is_done(self, chunk: int) -> bool:
        return self.work.is_done(chunk)

    def process(self, chunk: int) -> None:
        self.leash.wait()
        self.work.process(chunk)

    def set_up_process(self, role: str, number: int) -> None:
        self.work.set_up_process(role, number)


class UnpicklableError(DataError):
    """Does not survive the way to another process."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__(f"{file}: line {line} is wrong")
        self.lock = threading.Lock()  # no pickle takes that


def wait_until(is_so: Callable[[], bool], timeout_s: float = _WAIT_S) -> None:
    """Wait for something that another process or thread does."""
    end = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s:g} s")
        time.sleep(_POLL_S)

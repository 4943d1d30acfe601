"""Ways to save the state of a training: a copy in memory, PyTorch's three, and ours.

All save the same tensors, sync what they write to the disk (but for `torch.save` alone), and
replace the save before: ours by rotation, the others by writing over it. So each save frees the
space of one checkpoint while it is timed. What a contender allocates it keeps from save to save.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save, save

from benchmarks.paired import WrongResultError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore, Fragment, LoadedCheckpoint
from fqgan_dist.training.checkpoint_transfer import TRANSFER_THREADS
from fqgan_dist.training.config import RetentionPolicy
from fqgan_dist.training.writer_process import WriterProcess

State = dict[str, dict[str, Tensor]]
"""Part -> name -> tensor."""

COPY = "memory copy"
TORCH_UNSYNCED = "torch.save"
TORCH = "torch.save + fsync"
DCP = "DCP save"
DCP_ASYNC = "DCP async_save"
OURS = "ours"
_LEAST_LAYERS = 12
_PREFIX = "checkpoints"


def make_state(num_parameters: int) -> State:
    """Make weights and the moments of Adam for them, as those of a transformer: wide matrices.

    Widths are powers of two, as those of real models are even: copies then run aligned.
    """
    width = 2 ** int(math.log2(max(2, num_parameters / _LEAST_LAYERS) ** 0.5))
    layers = max(1, round(num_parameters / (width * (width + 1))))
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (width, width), "bias": (width,)}
    parts = {"weights": ("",), "optimizer": ("exp_avg.", "exp_avg_sq.")}
    return {
        part: {
            f"{kind}layers.{layer}.{name}": torch.rand(shape, generator=generator)
            for kind in kinds
            for layer in range(layers)
            for name, shape in shapes.items()
        }
        for part, kinds in parts.items()
    }


def count_bytes(state: State) -> int:
    """Give the bytes of all tensors."""
    return sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())


def empty_like(state: State) -> State:
    """Allocate memory for a copy of a state."""
    return {
        part: {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        for part, tensors in state.items()
    }


class Contender(Protocol):
    """Saves the state that it was made with."""

    def save(self) -> None:
        """Return when training may go on and change the state."""
        ...

    def wait(self) -> None:
        """Return when the last save is whole and durable, as far as it ever will be."""
        ...

    def read_back(self) -> State:
        """Read the last save, as a restart would."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class MemoryCopy:
    """The least that a save has to do before training may go on."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._copy = empty_like(state)

    def save(self) -> None:
        for part, tensors in self._state.items():
            for name, tensor in tensors.items():
                self._copy[part][name].copy_(tensor)

    def wait(self) -> None:
        pass

    def read_back(self) -> State:
        return self._copy

    def close(self) -> None:
        pass


class TorchSave:
    """One pickle, written beside the former one and renamed, as the reference's script might."""

    def __init__(self, state: State, folder: Path, *, is_synced: bool) -> None:
        folder.mkdir()
        self._state = state
        self.path = folder / "checkpoint.pt"
        self._is_synced = is_synced

    def save(self) -> None:
        temporary = self.path.with_suffix(".new")
        torch.save(self._state, temporary)
        if self._is_synced:
            sync(temporary)
        temporary.replace(self.path)
        if self._is_synced:
            sync(self.path.parent)

    def wait(self) -> None:
        # Else the disk is still busy with it while the next contender is timed.
        sync(self.path)

    def read_back(self) -> State:
        return torch.load(self.path)

    def close(self) -> None:
        pass


class DcpSave:
    """`torch.distributed.checkpoint.save`, with as many threads as ours has."""

    def __init__(self, state: State, folder: Path) -> None:
        self._state = state
        self._folder = folder

    def save(self) -> None:
        save(self._state, storage_writer=self._writer(), no_dist=True)

    def wait(self) -> None:
        pass

    def read_back(self) -> State:
        found = empty_like(self._state)
        load(found, storage_reader=FileSystemReader(self._folder), no_dist=True)
        return found

    def close(self) -> None:
        pass

    def _writer(self) -> FileSystemWriter:
        return FileSystemWriter(self._folder, thread_count=TRANSFER_THREADS)


class DcpAsyncSave(DcpSave):
    """`async_save`, which copies into buffers that it keeps and writes in a thread."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        # The stager that `async_save` makes itself lets go of its buffers after each save.
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._running: Future[Any] | None = None

    def save(self) -> None:
        answer = async_save(
            self._state, storage_writer=self._writer(), async_stager=self._stager, no_dist=True
        )
        is_staged_behind = isinstance(answer, AsyncSaveResponse)
        self._running = answer.upload_completion if is_staged_behind else answer

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()

    def close(self) -> None:
        self.wait()
        self._stager.close()


class Ours:
    """`Attempt.save`, keeping one checkpoint."""

    def __init__(self, state: State, folder: Path) -> None:
        self._state = state
        self._root = folder
        self._store = CheckpointStore(
            Storage(folder),
            _PREFIX,
            retention=RetentionPolicy(keep_last=1),
            make_writer=WriterProcess,  # as runs have it
        )
        self._attempt = self._store.begin_attempt()
        self._step = 0

    def save(self) -> None:
        self._step += 1
        self._attempt.save(
            self._step,
            tensors=self._state,
            state={"step": self._step},
            metrics={},
            config={},
            dataset_id="none",
        )

    def wait(self) -> None:
        self._attempt.wait()

    def read_back(self) -> State:
        found = self._store.read_newest(lambda loaded: loaded.read_parts({}))
        if found is None:
            raise WrongResultError(f"{OURS}: nothing was committed")
        return {part: _whole(tensors) for part, tensors in found.items()}

    def close(self) -> None:
        self._attempt.close()

    def files(self) -> list[Path]:
        """Name the files of tensors of the newest checkpoint, each of which is needed whole."""
        loaded = self._store.read_newest(_keep)
        if loaded is None:
            raise WrongResultError(f"{OURS}: nothing was committed")
        names = {file.file for file in loaded.manifest.files}
        return sorted(path for path in self._root.rglob("*.safetensors") if path.name in names)


def build_contenders(state: State, folder: Path) -> dict[str, Contender]:
    """Make all of them, in folders of their own."""
    return {
        COPY: MemoryCopy(state),
        TORCH_UNSYNCED: TorchSave(state, folder / "torch-unsynced", is_synced=False),
        TORCH: TorchSave(state, folder / "torch", is_synced=True),
        DCP: DcpSave(state, folder / "dcp"),
        DCP_ASYNC: DcpAsyncSave(state, folder / "dcp-async"),
        OURS: Ours(state, folder / "ours"),
    }


def check(name: str, contender: Contender, state: State) -> None:
    """Save, and compare what is read back, to the bit; buffers are warm from then on.

    Raises:
        WrongResultError: it is not the state.
    """
    contender.save()
    contender.wait()
    compare(name, contender.read_back(), state)


def compare(name: str, found: State, state: State) -> None:
    """Compare what a contender gives back.

    Raises:
        WrongResultError: it is not the state.
    """
    for part, tensors in state.items():
        for key, tensor in tensors.items():
            if not torch.equal(found[part][key], tensor):
                raise WrongResultError(f"{name}: {part} {key} is read back otherwise")


@contextmanager
def quiet_dcp() -> Iterator[None]:
    """Keep DCP from saying at every save that it is one process and writes over the one before."""
    with warnings.catch_warnings():
        for message in ("torch.distributed is disabled", "Detected an existing checkpoint"):
            warnings.filterwarnings("ignore", message=message)
        yield


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep(loaded: LoadedCheckpoint) -> LoadedCheckpoint:
    return loaded


def _whole(tensors: dict[str, Tensor | Fragment]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}

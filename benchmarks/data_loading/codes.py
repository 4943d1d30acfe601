"""Stored codes: our packed parquet files against the files that the reference keeps.

The reference stores, for every image, the codes of ten views as one int64 array (1, 10, 256) in a
.npy file per codebook, and the label in one more; its dataset opens these four files for every
sample and picks a view. Both sides end with batches of int64 codes and labels. Samples per CPU
second of one process, everything in the page cache, one epoch per round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.data_loading.measured_process import wait_for_rest
from benchmarks.data_loading.settings import Settings
from benchmarks.data_loading.synthetic import make_image, make_table, publish, write_table
from benchmarks.paired import Finding, WrongResultError, run_rounds
from fqgan_dist.data.batches import CodeBatch
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.loader import CodeLoader
from fqgan_dist.data.record_stores import CodeStore
from fqgan_dist.data.views import CropRecord
from fqgan_dist.storage.storage import Storage

SUBJECT = "codes"
PACKED, FILES = "packed parquet", "four .npy files per image"
_SAMPLES_TARGET, _BYTES_TARGET = 10.0, 0.26
_CODEBOOKS = ("visual", "semantic_mid", "semantic_high")
_NUM_VIEWS, _GRID, _CODEBOOK_SIZE = 10, 16, 16384
_SHARD_IMAGES = 1000
_BATCH_SIZE = 100
_UNIT = "samples/s per core"
_FINGERPRINT = "0" * 16


def measure(settings: Settings, folder: Path) -> list[Finding]:
    """Compare speed and size.

    Raises:
        WrongResultError: a side gives other codes than were stored.
    """
    count = max(_BATCH_SIZE, settings.code_images // _BATCH_SIZE * _BATCH_SIZE)
    shape = (count, _NUM_VIEWS, len(_CODEBOOKS), _GRID, _GRID)
    codes = np.random.default_rng(0).integers(_CODEBOOK_SIZE, size=shape, dtype=np.uint16)
    packed_bytes = write_packed(codes, folder / "packed")
    files_bytes = write_files(codes, folder / "files")
    loader = open_packed(folder / "packed")
    ours, theirs = loader.batches(0, [0]), read_files(folder / "files", count)
    num_batches = count // _BATCH_SIZE
    # Whole epochs from here on: reading a shard's codes falls on some batches of it only.
    check_epoch([batch for (batch,) in (next(ours) for _ in range(num_batches))], codes)
    check_views(np.concatenate([next(theirs)[0].numpy() for _ in range(num_batches)]), codes)
    rounds = run_rounds(
        {FILES: _time_epoch(theirs, num_batches), PACKED: _time_epoch(ours, num_batches)},
        control=FILES,
        rounds=settings.rounds,
    )
    ours.close()
    ratio = packed_bytes / files_bytes
    return [
        rounds.show(FILES, unit=_UNIT, subject=SUBJECT),
        rounds.compare(PACKED, over=FILES, target=_SAMPLES_TARGET, unit=_UNIT, subject=SUBJECT),
        Finding(
            subject=SUBJECT,
            what="bytes of packed codes / of the .npy files",
            value=ratio,
            target=f"<= {_BYTES_TARGET}",
            verdict="met" if ratio <= _BYTES_TARGET else "missed",
            note=f"{packed_bytes / count:,.0f} and {files_bytes / count:,.0f} bytes per image, in "
            f"{-(-count // _SHARD_IMAGES)} and {4 * count} files; random codes, which do not "
            "compress",
        ),
    ]


def write_packed(codes: np.ndarray, folder: Path) -> int:
    """Write codes (n, views, K, h, w) as our stage does; the label of image i is i mod 1000.

    Returns:
        Bytes of the files of codes.
    """
    folder.mkdir()
    store, image = CodeStore(Storage(folder), "codes", _FINGERPRINT), make_image()
    entries = []
    for first in range(0, len(codes), _SHARD_IMAGES):
        chosen = codes[first : first + _SHARD_IMAGES]
        keys = [_key(first + row) for row in range(len(chosen))]
        table = make_table(keys, np.arange(len(keys)) * len(image), image)
        entry = write_table(folder, f"shard-{len(entries):06d}.tar", table, b"")
        crops = [[CropRecord(0, 0, 281, 281, flip=False)] * _NUM_VIEWS] * len(keys)
        store.write(entry, keys=keys, crops=crops, codes=chosen, codebooks=_CODEBOOKS)
        entries.append(entry)
    publish(folder, entries)
    return sum(path.stat().st_size for path in (folder / "codes").rglob("*.parquet"))


def write_files(codes: np.ndarray, folder: Path) -> int:
    """Write codes as the reference does, a file per image and codebook and one for the label.

    Returns:
        Bytes of all files.
    """
    for name in (*_CODEBOOKS, "labels"):
        (folder / name).mkdir(parents=True)
    flat = codes.reshape(*codes.shape[:3], -1)
    for number in range(len(codes)):
        for book, name in enumerate(_CODEBOOKS):
            values = flat[number, :, book][np.newaxis].astype(np.int64)
            np.save(folder / name / f"{number}.npy", values)
        label = np.array([_label(number)], np.int64)
        np.save(folder / "labels" / f"{number}.npy", label)
    return sum(path.stat().st_size for path in folder.rglob("*.npy"))


def open_packed(folder: Path) -> CodeLoader:
    """Open packed codes for training."""
    return CodeLoader(
        Dataset.open(Storage(folder)),
        codes=CodeStore(Storage(folder), "codes", _FINGERPRINT),
        seed=0,
        micro_batch_size=_BATCH_SIZE,
        micro_batches_per_step=1,
        window_shards=8,
        loader_workers=0,
        max_damaged_in_a_row=1,
    )


def read_files(folder: Path, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches without end as the reference's dataset and collation make them.

    Codes are (B, K, 256) int64, labels (B, 1) int64.
    """
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for first in range(0, count, _BATCH_SIZE):
            rows = order[first : first + _BATCH_SIZE]
            yield default_collate([_read_sample(folder, row, generator) for row in rows])


def check_epoch(batches: Sequence[CodeBatch], codes: np.ndarray) -> None:
    """Check that batches hold every image once, with the codes of the view that they name.

    Raises:
        WrongResultError: they do not.
    """
    keys = [key for batch in batches for key in batch.keys]
    if sorted(keys) != [_key(row) for row in range(len(codes))]:
        raise WrongResultError(f"{PACKED}: an epoch does not hold every image once")
    for batch in batches:
        rows = [int(key.removeprefix("image")) for key in batch.keys]
        if not np.array_equal(batch.codes.numpy(), codes[rows, batch.views]):
            raise WrongResultError(f"{PACKED}: a batch holds other codes than were stored")


def check_views(found: np.ndarray, codes: np.ndarray) -> None:
    """Check that an epoch (n, K, 256) of the reference holds one view of every image.

    Raises:
        WrongResultError: it does not.
    """
    stored = codes.reshape(*codes.shape[:3], -1).transpose(1, 0, 2, 3)
    firsts = {row.tobytes() for view in stored for row in view[:, 0].astype(np.int64)}
    if len(found) != len(codes) or any(row.tobytes() not in firsts for row in found[:, 0]):
        raise WrongResultError(f"{FILES}: a batch holds other codes than were stored")


def _read_sample(folder: Path, row: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    view = int(torch.randint(_NUM_VIEWS, (1,), generator=generator))
    books = [
        torch.from_numpy(np.load(folder / name / f"{row}.npy"))[0, view] for name in _CODEBOOKS
    ]
    return torch.stack(books), torch.from_numpy(np.load(folder / "labels" / f"{row}.npy"))


def _time_epoch(batches: Iterator[object], num_batches: int) -> Callable[[], float]:
    def run() -> float:
        # The clock is of all threads, and a loader's work ahead: each round ends as it began.
        start = time.process_time()
        for _ in range(num_batches):
            next(batches)
        wait_for_rest(time.process_time)
        return (time.process_time() - start) / (num_batches * _BATCH_SIZE)

    return run


def _key(row: int) -> str:
    return f"image{row:07d}"


def _label(row: int) -> int:
    return row % _SHARD_IMAGES

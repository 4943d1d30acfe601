"""A dataset of 10,000 shards and 12 million samples: opening it, and starting at any step.

Each run is a fresh process, as after a restart; its imports do not count. Memory is the growth of
the process's resident set from before the dataset is opened to its greatest value while it is.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.data_loading.settings import Settings
from benchmarks.data_loading.synthetic import write_linked_shards
from benchmarks.paired import (
    CONTROL_RANGE,
    Finding,
    WrongResultError,
    judge_limit,
    measure_contention,
)
from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.loader import ImageLoader
from fqgan_dist.storage.storage import Storage

SUBJECT = "scale"
_OPEN_S, _OPEN_MB, _START_S = 2.0, 200.0, 1.0
_BATCH_SIZE = 32
_IMAGE_SIZE = 32
_CLEAR_PEAK = Path("/proc/self/clear_refs")
_FIRST_STEPS = (0.0, 0.37, 0.999_99, 3.5)
"""Where training starts, in epochs: the beginning, the middle, the last batches, a later epoch."""


@dataclass(frozen=True)
class Run:
    """What one fresh process measured."""

    open_s: float
    """Seconds to open the dataset."""
    growth_mb: float
    """Greatest growth of memory meanwhile, 10^6 bytes."""
    start_s: list[float]
    """Seconds to the first batch from each starting step."""
    num_samples: int
    """Samples in the dataset."""
    contention: float
    """Wall time over CPU time of a loop; 1 on a free machine."""


def measure(settings: Settings, folder: Path) -> list[Finding]:
    """Open the dataset in fresh processes.

    Raises:
        WrongResultError: the dataset has another size than it should.
    """
    dataset = folder / "dataset"
    write_linked_shards(dataset, settings.shards, settings.samples_per_shard)
    expected = settings.shards * settings.samples_per_shard
    runs = [_run_alone(dataset) for _ in range(settings.repeats)]
    if any(run.num_samples != expected for run in runs):
        raise WrongResultError(f"{runs[0].num_samples} samples; expected {expected}")
    quiet = all(run.contention <= CONTROL_RANGE[1] for run in runs)
    what = f"{settings.shards:,} shards, {expected:,} samples: "
    starts = np.array([run.start_s for run in runs])
    return [
        judge_limit(
            SUBJECT, what + "open", [run.open_s for run in runs],
            unit="s", at_most=_OPEN_S, quiet=quiet,
        ),
        judge_limit(
            SUBJECT, what + "memory to open", [run.growth_mb for run in runs],
            unit="MB", at_most=_OPEN_MB, quiet=quiet,
        ),
        judge_limit(
            SUBJECT, what + "start at any step", starts.max(axis=1).tolist(),
            unit="s", at_most=_START_S, quiet=quiet,
            note=f"the slowest of starts at epochs {', '.join(map(str, _FIRST_STEPS))}, to a batch "
            f"of {_BATCH_SIZE}; index.json has {(dataset / 'index.json').stat().st_size:,} bytes",
        ),
    ]  # fmt: skip


def run_once(dataset: Path) -> Run:
    """Open a dataset and start at several steps; to be called once in a process."""
    _CLEAR_PEAK.write_text("5", encoding="ascii")  # the greatest value so far is of the imports
    before = _read_memory_mb("VmRSS")
    start = time.perf_counter()
    loader = _open(dataset)
    open_s = time.perf_counter() - start
    growth = _read_memory_mb("VmHWM") - before
    steps = [int(loader.num_samples * epochs) // _BATCH_SIZE for epochs in _FIRST_STEPS]
    starts = [_start(_open(dataset), step) for step in steps]
    return Run(open_s, growth, starts, loader.num_samples, measure_contention())


def _run_alone(dataset: Path) -> Run:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(run_once, dataset).result()


def _open(dataset: Path) -> ImageLoader:
    return ImageLoader(
        Dataset.open(Storage(dataset)),
        seed=0,
        view=ViewConfig(policy="random_crop_flip", image_size=_IMAGE_SIZE),
        num_views=None,
        micro_batch_size=_BATCH_SIZE,
        micro_batches_per_step=1,
        window_shards=8,
        loader_workers=0,
        max_damaged_in_a_row=1,
    )


def _start(loader: ImageLoader, step: int) -> float:
    start = time.perf_counter()
    batches = loader.batches(step, [0])
    (batch,) = next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    if tuple(batch.images.shape) != (_BATCH_SIZE, 3, _IMAGE_SIZE, _IMAGE_SIZE):
        raise WrongResultError(f"step {step}: a batch of {tuple(batch.images.shape)}")
    return seconds


def _read_memory_mb(name: str) -> float:
    match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match is not None, "Linux says so"
    return int(match[1]) * 1024 / 1e6

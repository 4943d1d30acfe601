"""Loaders end to end: from the same images on a local disk to batches of uint8 crops.

What counts is images per CPU second of the loader's process and all its workers, which neither the
number of cores nor other work on the machine changes much. Ours must beat the best peer with its
own decoder; with our crop function in the peers too, all do the same to an image, and what is left
is the difference of the loaders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_loading.contestants import (
    CropBy,
    load_litdata,
    load_ours,
    load_streaming,
    load_webdataset,
)
from benchmarks.data_loading.decode import time_decoding
from benchmarks.data_loading.images import (
    SourceImage,
    make_shards,
    read_images,
    select_typical,
    write_tree,
)
from benchmarks.data_loading.measured_process import Build, MeasuredProcess
from benchmarks.data_loading.peers import (
    HOW_TO_INSTALL,
    is_installed,
    write_litdata,
    write_mds,
)
from benchmarks.data_loading.settings import Settings
from benchmarks.paired import Finding, Rounds, WrongResultError, run_rounds
from fqgan_dist.data.decoding import decode_image

SUBJECT = "loaders"
OURS = "ours"
DECODING = "decoding alone"
_TARGET = 1.2
_UNIT = "images/CPU s"
_SHARDS = 20
_WARMUP = 1
_AHEAD_PER_WORKER = 2
"""Batches that torch's DataLoader loads ahead, for each worker."""
_LEAST_CORRELATION = 0.7
_PEERS: dict[str, Build] = {
    "webdataset": load_webdataset,
    "streaming": load_streaming,
    "litdata": load_litdata,
}
_NOTES: dict[CropBy, str] = {
    "torchvision": "the best peer with torchvision's decoder and crop; all decode with "
    "libjpeg-turbo, peers whole images, as decoding alone does, ours the crop",
    "ours": "the best peer with our crop function: no target, since nearly all work is the same",
}
_WAYS: tuple[CropBy, ...] = ("torchvision", "ours")


def measure(settings: Settings, folder: Path) -> list[Finding]:
    """Compare ours with every peer that is installed, for each number of loader workers.

    Raises:
        WrongResultError: a loader gives something else than crops of the images of its labels.
    """
    images = select_typical(read_images(settings.images, settings.max_images))
    write_datasets(images, folder, count_copies(settings, len(images)))
    findings: list[Finding] = []
    for workers in settings.workers:
        findings += _measure_with(settings, folder, images, workers)
    missing = [peer for peer in _PEERS if not is_installed(peer)]
    return findings + [
        Finding(subject=SUBJECT, what=peer, verdict="not run", note=HOW_TO_INSTALL)
        for peer in missing
    ]


def count_copies(settings: Settings, num_images: int) -> int:
    """Count how often each image must be in the dataset, so that an epoch outlasts all rounds.

    At the end of an epoch peers stop loading ahead: the batches then drawn would seem to cost
    nothing, and the next ones twice as much.
    """
    drawn = 1 + (_WARMUP + settings.rounds) * settings.batches_per_round
    ahead = _AHEAD_PER_WORKER * max(settings.workers)
    # Each worker drops its last, incomplete batch.
    dropped = max(1, *settings.workers)
    return -(-(drawn + ahead + dropped) * settings.batch_size // num_images)


def write_datasets(images: Sequence[SourceImage], folder: Path, copies: int) -> None:
    """Write the same files as our shards (webdataset reads them too) and in the peers' formats."""
    tree = folder / "tree"
    write_tree(images, tree, copies=copies)
    per_shard = -(-len(images) * copies // _SHARDS)
    make_shards(tree, folder / OURS, f"samples_per_shard={per_shard}")
    files = [
        (path, label)
        for label, class_folder in enumerate(sorted(tree.iterdir()))
        for path in sorted(class_folder.iterdir())
    ]
    # A fixed permutation: neighbours in the peers' files are no copies of one image either.
    files = [files[row] for row in np.random.default_rng(0).permutation(len(files))]
    if is_installed("streaming"):
        write_mds(files, folder / "streaming")
        # Two processes may not open one local MDS folder with different settings.
        (folder / "streaming-ours").symlink_to(folder / "streaming", target_is_directory=True)
    if is_installed("litdata"):
        write_litdata(files, folder / "litdata")


def check_batch(
    what: str, batch: tuple[np.ndarray, np.ndarray], images: Sequence[SourceImage], size: int
) -> None:
    """Check that a batch holds crops of the images that its labels name.

    The crops' mean colours must follow those of the images; so must the differences of their
    channels, which finds channels in the wrong order.

    Raises:
        WrongResultError: they do not.
    """
    crops, labels = batch
    if crops.shape[1:] != (3, size, size) or crops.dtype != np.uint8:
        raise WrongResultError(
            f"{what}: batches of {crops.shape} {crops.dtype}; expected (B, 3, {size}, {size}) uint8"
        )
    found = _describe_colours(crops.mean(axis=(2, 3)))
    expected = _describe_colours(
        np.stack([_mean_colour(images[label].data) for label in labels.tolist()])
    )
    for name, ours, theirs in zip(("brightness", "red - blue"), found, expected, strict=True):
        correlation = float(np.corrcoef(ours, theirs)[0, 1])
        if not correlation > _LEAST_CORRELATION:
            raise WrongResultError(
                f"{what}: the crops' {name} has correlation {correlation:.2f} with that of the "
                f"images of their labels; expected above {_LEAST_CORRELATION}"
            )


def _measure_with(
    settings: Settings, folder: Path, images: Sequence[SourceImage], workers: int
) -> list[Finding]:
    encoded = [image.data for image in images]
    with ExitStack() as stack:
        processes: dict[str, MeasuredProcess] = {}
        for name, build, arguments in _list_contestants(settings, folder, workers):
            processes[name] = MeasuredProcess(build, *arguments)
            stack.callback(processes[name].close)
        stack.callback(lambda: [process.ask_to_stop() for process in processes.values()])
        for name, process in processes.items():
            check_batch(name, process.wait_until_ready(), images, settings.image_size)
        rounds = run_rounds(
            {
                DECODING: partial(time_decoding, encoded),
                **{
                    name: _time(process, settings.batches_per_round, settings.batch_size)
                    for name, process in processes.items()
                },
            },
            control=OURS,
            rounds=settings.rounds,
            warmup=_WARMUP,
        )
    return describe(rounds, workers)


def describe(rounds: Rounds, workers: int) -> list[Finding]:
    """Compare our loader with each peer; the target is for the best one with its own decoder."""
    subject = f"{SUBJECT}, {workers} workers"
    findings = [rounds.show(name, unit=_UNIT, subject=subject) for name in rounds.costs]
    for way in _WAYS:
        peers = [name for name in rounds.costs if name.endswith(f"({way})")]
        if not peers:
            continue
        findings.append(
            rounds.compare(
                OURS,
                over=rounds.best(peers),
                target=_TARGET if way == "torchvision" else None,
                unit=_UNIT,
                subject=subject,
                note=_NOTES[way],
            )
        )
    return findings


def _list_contestants(
    settings: Settings, folder: Path, workers: int
) -> list[tuple[str, Build, tuple[Any, ...]]]:
    common = (settings.image_size, settings.batch_size, workers)
    contestants: list[tuple[str, Build, tuple[Any, ...]]] = [
        (OURS, load_ours, (folder / OURS, *common))
    ]
    for peer, build in _PEERS.items():
        for way in _WAYS if is_installed(peer) else ():
            data = folder / (OURS if peer == "webdataset" else peer)
            if peer == "streaming" and way == "ours":
                data = folder / "streaming-ours"
            contestants.append((f"{peer} ({way})", build, (data, *common, way)))
    return contestants


def _time(process: MeasuredProcess, num_batches: int, batch_size: int) -> Callable[[], float]:
    return lambda: process.measure(num_batches) / batch_size


def _mean_colour(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, name="image")).mean(axis=(0, 1))


def _describe_colours(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return colours.mean(axis=1), colours[:, 0] - colours[:, 2]

"""What the loaders give: micro-batches of images or of codes, and an account of the loading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.data.batch_memory import BatchMemory
from fqgan_dist.data.consumption import Consumed


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """A damaged sample, and the one that is trained on instead."""

    position: int
    """Of the damaged sample in the endless stream, from 0."""
    shard: str
    """Tar file of the damaged sample."""
    key: str
    """Key of the damaged sample."""
    replacement_key: str
    """Key of the sample instead."""
    reason: str
    """What is wrong with the damaged sample."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values, as `damaged_samples.jsonl` has them."""
        values = asdict(self)
        # The name that the position has in the files of former runs.
        return {"slot": values.pop("position")} | values


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a loader did for the batches that it handed out in a while."""

    replacements: tuple[Replacement, ...] = ()
    """One for each damaged sample that was due, in the order of the stream."""
    consumed: tuple[Consumed, ...] = ()
    """Which positions of the stream the batches hold; some may be there more than once."""
    samples_read: int = 0
    """Encoded images that were read."""
    cached_samples: int = 0
    """Of these, images that the shard cache had."""
    bytes_read: int = 0
    """Size of the encoded images."""
    retries: int = 0
    """Requests to the dataset's store that were made again."""
    waited_s: float = 0.0
    """Seconds in which such requests waited, summed over processes."""


def merge_reports(reports: Iterable[LoadReport]) -> LoadReport:
    """Add the reports of several times or ranks; a replacement that several made is named once."""
    parts = list(reports)
    by_position = {each.position: each for part in parts for each in part.replacements}
    return LoadReport(
        replacements=tuple(by_position[position] for position in sorted(by_position)),
        consumed=tuple(each for part in parts for each in part.consumed),
        samples_read=sum(part.samples_read for part in parts),
        cached_samples=sum(part.cached_samples for part in parts),
        bytes_read=sum(part.bytes_read for part in parts),
        retries=sum(part.retries for part in parts),
        waited_s=sum(part.waited_s for part in parts),
    )


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """One micro-batch of images."""

    images: Tensor
    """(B, 3, H, W) uint8. Their memory is another batch's once nothing shares it any more: neither
    this tensor, nor a view of it."""
    labels: Tensor
    """(B,) int64."""
    keys: list[str]
    """Sample keys."""
    views: list[int]
    """View of each sample."""
    features: dict[str, Tensor]
    """By teacher: stored features of these views, (B, F) float32; empty where none are stored."""
    micro_batch: int
    """Index in the global batch."""
    report: LoadReport = LoadReport()
    """Which samples stand in for damaged ones, and what was read."""


class SentImageBatch:
    """An `ImageBatch` on its way from a loader worker, in one message.

    Of each tensor torch would make a file of shared memory, which takes it longer than the rest.
    """

    def __init__(self, batch: ImageBatch, *, place: int | None) -> None:
        """Pack a batch.

        Args:
            batch: what is sent.
            place: where its images are in a `BatchMemory` that the receiver has too; None: they are
                sent.
        """
        self._place = place
        self._images = batch.images.numpy() if place is None else None
        self._labels = batch.labels.numpy()
        self._features = {name: values.numpy() for name, values in batch.features.items()}
        self._rest = (batch.keys, batch.views, batch.micro_batch, batch.report)

    def unpack(self, memory: BatchMemory) -> ImageBatch:
        """Give the batch; its images lie in this memory."""
        images = memory.array(self._place) if self._place is not None else self._images
        keys, views, micro_batch, report = self._rest
        assert images is not None, "they are in the memory or in here"
        return ImageBatch(
            images=torch.from_numpy(images),
            labels=torch.from_numpy(self._labels),
            keys=keys,
            views=views,
            features={name: torch.from_numpy(each) for name, each in self._features.items()},
            micro_batch=micro_batch,
            report=report,
        )


@dataclass(frozen=True, eq=False)
class CodeBatch:
    """One micro-batch of codes."""

    codes: Tensor
    """(B, K, h, w) int64."""
    labels: Tensor
    """(B,) int64."""
    keys: list[str]
    """Sample keys."""
    views: list[int]
    """View of each sample."""
    micro_batch: int
    """Index in the global batch."""
    report: LoadReport = LoadReport()
    """Which samples stand in for damaged ones."""

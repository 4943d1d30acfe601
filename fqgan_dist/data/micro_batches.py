"""Loading one micro-batch: its samples' places, images by their offsets, features and codes.

A shard's tables are read when one of its samples is due, and kept while the order's window needs
them, so memory is bounded by the window. Safe to call from several threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fqgan_dist.data.batches import CodeBatch, ImageBatch
from fqgan_dist.data.decoding import decode_image
from fqgan_dist.data.index import DatasetIndex, SampleTable, load_samples
from fqgan_dist.data.order import SampleLocations, SampleOrder
from fqgan_dist.data.prefetch import BoundedCache
from fqgan_dist.data.records import CodeStore, FeatureStore
from fqgan_dist.data.storage import Storage
from fqgan_dist.data.views import ViewConfig, apply_view
from fqgan_dist.errors import DataError
from fqgan_dist.randomness import derive_seed


class MicroBatchIndex(NamedTuple):
    """Which samples of the endless stream are loaded together."""

    step: int
    """From 0."""
    micro_batch: int
    """Index in the step's global batch."""
    member: int = 0
    """Which of `num_members` equal runs of the micro-batch's samples."""
    num_members: int = 1
    """Ranks that share the micro-batch; 1: all its samples are loaded."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How the endless stream of samples is cut into micro-batches."""

    seed: int
    """Keys the order, the random crops and the choice of views."""
    window_shards: int
    """Shards that are mixed with each other."""
    micro_batch_size: int
    """Samples per micro-batch (B)."""
    micro_batches_per_step: int
    """Micro-batches per global batch (M)."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.micro_batches_per_step < 1:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size}, micro_batches_per_step "
                f"{self.micro_batches_per_step}: expected at least 1 each"
            )

    def slots(self, index: MicroBatchIndex) -> range:
        """Give the slots of the sample order that a micro-batch, or a member's run of it, holds."""
        micro_batch = index.step * self.micro_batches_per_step + index.micro_batch
        count = self.micro_batch_size // index.num_members
        start = micro_batch * self.micro_batch_size + index.member * count
        return range(start, start + count)


class _Samples:
    """What both sources share: the order of a dataset and the tables of its shards."""

    def __init__(
        self,
        dataset: Storage,
        index: DatasetIndex,
        plan: BatchPlan,
    ) -> None:
        self.order = SampleOrder(
            [shard.count for shard in index.shards],
            dataset_id=index.dataset_id,
            seed=plan.seed,
            window_shards=plan.window_shards,
        )
        self.dataset = dataset
        self.shards = index.shards
        self.plan = plan
        # A batch may straddle two windows.
        self.cached_shards = 2 * plan.window_shards
        self._tables = BoundedCache(self._load_table, self.cached_shards)

    def locate(self, index: MicroBatchIndex) -> SampleLocations:
        """Find the samples of a micro-batch."""
        return self.order.locate(self.plan.slots(index))

    def table(self, shard: int) -> SampleTable:
        """Give a shard's table of samples."""
        return self._tables.get(shard)

    def keys_and_labels(self, places: SampleLocations) -> tuple[list[str], torch.Tensor]:
        """Give the keys and labels of samples."""
        pairs = list(zip(places.shards.tolist(), places.rows.tolist(), strict=True))
        keys = [self.table(shard).keys[row] for shard, row in pairs]
        labels = [int(self.table(shard).labels[row]) for shard, row in pairs]
        return keys, torch.tensor(labels, dtype=torch.int64)

    def _load_table(self, shard: int) -> SampleTable:
        return load_samples(self.dataset, "", self.shards[shard])


class ImageSource(_Samples):
    """Loads micro-batches of image crops."""

    def __init__(
        self,
        dataset: Storage,
        index: DatasetIndex,
        plan: BatchPlan,
        *,
        view: ViewConfig,
        num_views: int | None,
        features: FeatureStore | None,
    ) -> None:
        super().__init__(dataset, index, plan)
        self._view = view
        self._num_views = num_views
        self._features = features
        self._feature_tables = BoundedCache(self._load_features, self.cached_shards)

    def __call__(self, index: MicroBatchIndex) -> ImageBatch:
        """Read, decode and crop a micro-batch's images."""
        places = self.locate(index)
        keys, labels = self.keys_and_labels(places)
        epochs: list[int] = places.epochs.tolist()
        views = epochs if self._num_views is None else [e % self._num_views for e in epochs]
        crops = [
            self._crop(data, shard, key, view)
            for data, shard, key, view in zip(
                self._read_images(places), places.shards.tolist(), keys, views, strict=True
            )
        ]
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
        features = self._gather_features(places, views) if self._features else {}
        return ImageBatch(images, labels, keys, views, features, micro_batch=index.micro_batch)

    def _read_images(self, places: SampleLocations) -> list[bytes]:
        ranges: list[tuple[str, int, int]] = []
        for shard, row in zip(places.shards.tolist(), places.rows.tolist(), strict=True):
            table = self.table(shard)
            file = self.shards[shard].file
            ranges.append((file, int(table.offsets[row]), int(table.sizes[row])))
        try:
            return self.dataset.read_ranges(ranges)
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename}: no such file; the dataset is not complete"
            ) from error

    def _crop(self, data: bytes, shard: int, key: str, view: int) -> np.ndarray:
        name = f"{self.dataset.uri(self.shards[shard].file)}: sample {key!r}"
        image = decode_image(data, name=name)
        pixels, _ = apply_view(image, self._view, seed=self.plan.seed, key=key, view=view)
        return pixels

    def _gather_features(
        self, places: SampleLocations, views: list[int]
    ) -> dict[str, torch.Tensor]:
        rows = [
            {name: values[row] for name, values in self._feature_tables.get((shard, view)).items()}
            for shard, row, view in zip(
                places.shards.tolist(), places.rows.tolist(), views, strict=True
            )
        ]
        return {
            name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.float32))
            for name in rows[0]
        }

    def _load_features(self, shard_and_view: tuple[int, int]) -> dict[str, np.ndarray]:
        assert self._features is not None, "asked for only with a feature store"
        shard, view = shard_and_view
        return self._features.read(self.shards[shard], view, self.table(shard).keys).columns


class CodeSource(_Samples):
    """Loads micro-batches of codes."""

    def __init__(
        self,
        dataset: Storage,
        index: DatasetIndex,
        plan: BatchPlan,
        *,
        codes: CodeStore,
    ) -> None:
        super().__init__(dataset, index, plan)
        self._codes = codes
        self._drawn = BoundedCache(self._draw_codes, self.cached_shards)

    def __call__(self, index: MicroBatchIndex) -> CodeBatch:
        """Gather a micro-batch's codes."""
        places = self.locate(index)
        keys, labels = self.keys_and_labels(places)
        codes, views = [], []
        for epoch, shard, row in zip(
            places.epochs.tolist(), places.shards.tolist(), places.rows.tolist(), strict=True
        ):
            shard_codes, shard_views = self._drawn.get((epoch, shard))
            codes.append(shard_codes[row])
            views.append(int(shard_views[row]))
        stacked = torch.from_numpy(np.stack(codes).astype(np.int64))
        return CodeBatch(stacked, labels, keys, views, micro_batch=index.micro_batch)

    def _draw_codes(self, epoch_and_shard: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Read a shard's codes and keep one view of each sample, (n, K, h, w), and its number."""
        epoch, shard = epoch_and_shard
        keys = self.table(shard).keys
        stored = self._codes.read(self.shards[shard], keys)
        views = np.array(
            [derive_seed(self.plan.seed, "code_view", key, epoch) % stored.shape[1] for key in keys]
        )
        return stored[np.arange(len(keys)), views], views

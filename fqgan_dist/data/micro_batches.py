"""Loading one micro-batch: its samples, images by their offsets, features and codes.

A shard's tables are read when one of its samples is due, and kept while the order's window needs
them, so memory is bounded by the window. Safe to call from several threads.

A sample whose bytes are not those of the dataset, or cannot be decoded, is damaged, and so is one
that was when its features or codes were made: another one of the dataset, fixed by the position
alone, is loaded in its stead, and the batch says so.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from fqgan_dist.data.batches import CodeBatch, ImageBatch, LoadReport, Replacement
from fqgan_dist.data.config import ShardCacheConfig, ViewConfig
from fqgan_dist.data.consumption import Consumed, consume
from fqgan_dist.data.damage import find_stand_in
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import SampleTable, load_samples
from fqgan_dist.data.node_copies import NodeCopies
from fqgan_dist.data.order import SampleOrder
from fqgan_dist.data.prefetch import BoundedCache
from fqgan_dist.data.record_stores import CodeStore, DrawnCodes, FeatureStore
from fqgan_dist.data.records import RecordTable
from fqgan_dist.data.sample_reader import ReadCounts, SampleReader
from fqgan_dist.data.view_loading import load_view
from fqgan_dist.errors import DataError
from fqgan_dist.randomness import derive_seed

_LONGEST_FIRST_WAIT_S = 10.0
"""How long after its start a loader may wait for shards that a cold cache fetches. 16
connections of 90 MB/s fetch the first window, 8 shards of 128 MiB, in 0.8 s."""


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
class Batching:
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
        if min(self.micro_batch_size, self.micro_batches_per_step, self.window_shards) < 1:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size}, micro_batches_per_step "
                f"{self.micro_batches_per_step}, window_shards {self.window_shards}: expected at "
                "least 1 each"
            )

    def positions(self, index: MicroBatchIndex) -> range:
        """Give the positions in the stream of a micro-batch, or of a member's run of it."""
        micro_batch = index.step * self.micro_batches_per_step + index.micro_batch
        count = self.micro_batch_size // index.num_members
        start = micro_batch * self.micro_batch_size + index.member * count
        return range(start, start + count)


class DueSample(NamedTuple):
    """A sample of the endless stream."""

    position: int
    """Its number there, from 0."""
    epoch: int
    """Epoch of the position, from 0."""
    shard: int
    """Index of the shard in the dataset's index."""
    row: int
    """Row of the sample in its shard."""


class _Image(NamedTuple):
    sample: DueSample
    key: str
    label: int
    view: int
    features: Mapping[str, np.ndarray]
    """By teacher, (F,); empty where none are stored."""


class _Codes(NamedTuple):
    sample: DueSample
    key: str
    label: int
    view: int
    codes: np.ndarray
    """(K, h, w)"""


_LoadedT = TypeVar("_LoadedT", _Image, _Codes)


class _Samples:
    """What both sources share: the order of a dataset and the tables of its shards."""

    def __init__(
        self,
        dataset: Dataset,
        batching: Batching,
        *,
        max_damaged_in_a_row: int,
    ) -> None:
        self._max_damaged = max_damaged_in_a_row
        self.order = SampleOrder(
            [shard.count for shard in dataset.index.shards],
            dataset_id=dataset.id,
            seed=batching.seed,
            window_shards=batching.window_shards,
        )
        self.dataset = dataset
        self.shards = dataset.index.shards
        self.batching = batching
        # A batch straddles two windows, or more where shards are small.
        counts = sorted(shard.count for shard in self.shards)
        num_windows = 2 + batching.micro_batch_size // sum(counts[: batching.window_shards])
        self.cached_shards = num_windows * batching.window_shards
        self._tables = BoundedCache(self._load_table, self.cached_shards)

    def close(self) -> None:
        """End what works in the background; loading is still allowed."""

    def locate(self, positions: range) -> list[DueSample]:
        """Find the samples of positions."""
        found = self.order.locate(positions)
        columns = (found.epochs.tolist(), found.shards.tolist(), found.rows.tolist())
        return [DueSample(*values) for values in zip(positions, *columns, strict=True)]

    def tables(self, samples: Sequence[DueSample]) -> dict[int, SampleTable]:
        """Give the tables of the shards that samples are in, by shard."""
        return self._tables.get_many(sample.shard for sample in samples)

    def table(self, shard: int) -> SampleTable:
        """Give the table of a shard."""
        return self._tables.get(shard)

    def candidates(self, position: int) -> Iterator[tuple[int, int]]:
        """Give the samples that may stand in for a position's, as shard and row, best first.

        They depend on nothing but the dataset, the seed and the position. None is in the position's
        micro-batch, and none is a candidate for two positions of one micro-batch: ranks that share
        it need not know of each other's damaged samples.
        """
        size = self.batching.micro_batch_size
        first = position - position % size
        taken = {(sample.shard, sample.row) for sample in self.locate(range(first, first + size))}
        # All positions of a micro-batch deal out one walk, keyed by the first of them: position i
        # takes every size-th sample from the i-th on, so that no two take the same one.
        free = (pair for pair in self.order.walk(first) if pair not in taken)
        return itertools.islice(free, position - first, None, size)

    def fill(
        self,
        samples: Sequence[DueSample],
        load: Callable[[Sequence[DueSample]], list[_LoadedT | DataError]],
    ) -> tuple[list[_LoadedT], list[Replacement]]:
        """Load samples, each a DataError if it is damaged, and others in the damaged ones' stead.

        Raises:
            DataError: too many samples in a row are damaged.
        """
        loaded: list[_LoadedT] = []
        replacements: list[Replacement] = []
        for sample, found in zip(samples, load(samples), strict=True):
            if isinstance(found, DataError):
                stand_in = self._load_stand_in(sample, found, load)
                replacements.append(self._describe(sample, found, stand_in.key))
                loaded.append(stand_in)
            else:
                loaded.append(found)
        return loaded, replacements

    def _load_stand_in(
        self,
        sample: DueSample,
        damage: DataError,
        load: Callable[[Sequence[DueSample]], list[_LoadedT | DataError]],
    ) -> _LoadedT:
        def load_candidate(shard: int, row: int) -> _LoadedT | DataError:
            (found,) = load([sample._replace(shard=shard, row=row)])
            return found

        return find_stand_in(
            damage,
            self.candidates(sample.position),
            load_candidate,
            max_damaged_in_a_row=self._max_damaged,
            shortage="the dataset has no further sample outside the micro-batch to take instead",
        )

    def _describe(self, sample: DueSample, damage: DataError, stand_in: str) -> Replacement:
        return Replacement(
            position=sample.position,
            shard=self.shards[sample.shard].file,
            key=self.table(sample.shard).keys[sample.row],
            replacement_key=stand_in,
            reason=str(damage),
        )

    def _load_table(self, shard: int) -> SampleTable:
        return load_samples(self.dataset.folder, self.shards[shard])


class ImageSource(_Samples):
    """Loads micro-batches of image crops."""

    def __init__(
        self,
        dataset: Dataset,
        batching: Batching,
        *,
        view: ViewConfig,
        num_views: int | None,
        features: FeatureStore | None,
        max_damaged_in_a_row: int,
        cache: ShardCacheConfig | None,
    ) -> None:
        super().__init__(dataset, batching, max_damaged_in_a_row=max_damaged_in_a_row)
        self._reader = SampleReader(dataset, load_table=self.table, cache=cache)
        self._is_cached = cache is not None
        self._upcoming: list[int] = []
        self._waits_until: float | None = None
        self._lock = threading.Lock()
        self._reported = (0, 0.0)
        self._view = view
        self._num_views = num_views
        self._features = features
        self._copies = NodeCopies(cache) if features is not None and cache is not None else None
        self._feature_tables = BoundedCache(self._load_features, self.cached_shards)

    def __call__(self, index: MicroBatchIndex, images: np.ndarray | None = None) -> ImageBatch:
        """Read, decode and crop a micro-batch's images.

        Args:
            index: which one.
            images: (B, 3, H, W) uint8, where the crops are written, and stay; None: to new memory.

        Raises:
            DataError: too many samples in a row are damaged, or a file is missing or damaged.
        """
        positions = self.batching.positions(index)
        samples = self.locate(positions)
        self._request_next_window(positions[-1])
        self._wait_for_first_shards(samples)
        if images is None:
            images = np.empty((len(positions), *self._view.shape), np.uint8)
        counts = ReadCounts()
        load = partial(self._load_images, images=images, first=positions.start, counts=counts)
        loaded, replacements = self.fill(samples, load)
        retries, waited_s = self._take_repeats()
        return ImageBatch(
            images=torch.from_numpy(images),
            labels=torch.tensor([image.label for image in loaded], dtype=torch.int64),
            keys=[image.key for image in loaded],
            views=[image.view for image in loaded],
            features=_stack_features([image.features for image in loaded]),
            micro_batch=index.micro_batch,
            report=LoadReport(
                replacements=tuple(replacements),
                consumed=(_consume(samples, loaded),),
                samples_read=counts.samples,
                cached_samples=counts.cached,
                bytes_read=counts.bytes,
                retries=retries,
                waited_s=waited_s,
            ),
        )

    def close(self) -> None:
        """Fetch no more shards into the cache, and let other jobs evict the dataset."""
        self._reader.close()

    def _load_images(
        self,
        samples: Sequence[DueSample],
        *,
        images: np.ndarray,
        first: int,
        counts: ReadCounts,
    ) -> list[_Image | DataError]:
        """Load views of samples, each a DataError where the sample is damaged.

        Args:
            samples: which.
            images: crops of a micro-batch; theirs are written to their places.
            first: position of the micro-batch's first sample.
            counts: what is read is added to them.
        """
        tables = self.tables(samples)
        encoded = self._reader.read([(sample.shard, sample.row) for sample in samples], counts)
        loaded = [
            self._crop(sample, tables[sample.shard], data, images[sample.position - first])
            for sample, data in zip(samples, encoded, strict=True)
        ]
        return self._add_features(loaded) if self._features else loaded

    def _crop(
        self, sample: DueSample, table: SampleTable, data: bytes | DataError, out: np.ndarray
    ) -> _Image | DataError:
        if isinstance(data, DataError):
            return data
        key = table.keys[sample.row]
        view = sample.epoch if self._num_views is None else sample.epoch % self._num_views
        name = f"{self.dataset.folder.uri(self.shards[sample.shard].file)}: sample {key!r}"
        try:
            load_view(
                data, self._view, seed=self.batching.seed, key=key, view=view, name=name, out=out
            )
        except DataError as error:
            return error
        return _Image(sample, key, int(table.labels[sample.row]), view, {})

    def _request_next_window(self, position: int) -> None:
        """Ask the cache for the shards that come next, once for each window."""
        if not self._is_cached:
            return
        upcoming = self.order.upcoming_shards(position)
        with self._lock:
            is_new, self._upcoming = upcoming != self._upcoming, upcoming
        if is_new:
            self._reader.prefetch(upcoming)

    def _wait_for_first_shards(self, samples: Sequence[DueSample]) -> None:
        """Let a cold cache fetch the first shards: else their samples are read, and they as well.

        What is not there in time is read from the store.
        """
        if not self._is_cached:
            return
        now = time.monotonic()
        with self._lock:
            if self._waits_until is None:
                self._waits_until = now + _LONGEST_FIRST_WAIT_S
            remaining = self._waits_until - now
        if remaining > 0:
            shards = dict.fromkeys(sample.shard for sample in samples)
            self._reader.wait_for(list(shards), remaining)

    def _take_repeats(self) -> tuple[int, float]:
        """Give the requests that were repeated since this was called last, and how long it took."""
        folder = self.dataset.folder
        with self._lock:
            (retries, waited_s), self._reported = (
                self._reported,
                (folder.num_retries, folder.waited_s),
            )
            return self._reported[0] - retries, self._reported[1] - waited_s

    def _add_features(self, loaded: Sequence[_Image | DataError]) -> list[_Image | DataError]:
        """Add the stored features, or a DataError where the image was damaged for them."""
        assert self._features is not None, "asked for only with a feature store"
        sound = [each for each in loaded if not isinstance(each, DataError)]
        tables = self._feature_tables.get_many((each.sample.shard, each.view) for each in sound)
        found: list[_Image | DataError] = []
        for each in loaded:
            if isinstance(each, DataError):
                found.append(each)
                continue
            row, table = each.sample.row, tables[each.sample.shard, each.view]
            if row in table.damaged:
                path = self._features.path(self.shards[each.sample.shard], each.view)
                found.append(_describe_former_damage(self._features.storage.uri(path), each.key))
            else:
                values = {name: column[row] for name, column in table.columns.items()}
                found.append(each._replace(features=values))
        return found

    def _load_features(self, shard_and_view: tuple[int, int]) -> RecordTable:
        assert self._features is not None, "asked for only with a feature store"
        shard, view = shard_and_view
        keys = self.table(shard).keys
        return self._features.read(self.shards[shard], view, keys, copies=self._copies)


def _consume(samples: Sequence[DueSample], loaded: Sequence[_Image] | Sequence[_Codes]) -> Consumed:
    """Account for what was loaded for consecutive positions."""
    due = np.array([(each.shard, each.row) for each in samples])
    found = np.array([(each.sample.shard, each.sample.row) for each in loaded])
    return consume(samples[0].position, due, found)


def _stack_features(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.float32))
        for name in rows[0]
    }


def _describe_former_damage(source: str, key: str) -> DataError:
    return DataError(f"{source}: sample {key!r}: its image was damaged when this file was made")


class CodeSource(_Samples):
    """Loads micro-batches of codes."""

    def __init__(
        self,
        dataset: Dataset,
        batching: Batching,
        *,
        codes: CodeStore,
        max_damaged_in_a_row: int,
    ) -> None:
        super().__init__(dataset, batching, max_damaged_in_a_row=max_damaged_in_a_row)
        self._codes = codes
        self._drawn = BoundedCache(self._draw_codes, self.cached_shards)

    def __call__(self, index: MicroBatchIndex) -> CodeBatch:
        """Gather a micro-batch's codes.

        Raises:
            DataError: too many samples in a row are damaged, or a file of codes or a table is
                missing or damaged.
        """
        samples = self.locate(self.batching.positions(index))
        loaded, replacements = self.fill(samples, self._load_codes)
        return CodeBatch(
            codes=torch.from_numpy(np.stack([each.codes for each in loaded]).astype(np.int64)),
            labels=torch.tensor([each.label for each in loaded], dtype=torch.int64),
            keys=[each.key for each in loaded],
            views=[each.view for each in loaded],
            micro_batch=index.micro_batch,
            report=LoadReport(
                replacements=tuple(replacements), consumed=(_consume(samples, loaded),)
            ),
        )

    def _load_codes(self, samples: Sequence[DueSample]) -> list[_Codes | DataError]:
        """Load codes of samples, each a DataError where the image was damaged."""
        tables = self.tables(samples)
        drawn = self._drawn.get_many((sample.epoch, sample.shard) for sample in samples)
        return [
            self._pick(sample, tables[sample.shard], drawn[sample.epoch, sample.shard])
            for sample in samples
        ]

    def _pick(self, sample: DueSample, table: SampleTable, drawn: DrawnCodes) -> _Codes | DataError:
        row, key = sample.row, table.keys[sample.row]
        if row in drawn.damaged:
            path = self._codes.path(self.shards[sample.shard])
            return _describe_former_damage(self._codes.storage.uri(path), key)
        view = int(drawn.views[row])
        return _Codes(sample, key, int(table.labels[row]), view, drawn.codes[row])

    def _draw_codes(self, epoch_and_shard: tuple[int, int]) -> DrawnCodes:
        """Read a shard's codes and keep one view of each sample."""
        epoch, shard = epoch_and_shard
        keys = self.table(shard).keys

        def draw(key: str, num_views: int) -> int:
            return derive_seed(self.batching.seed, "code_view", key, epoch) % num_views

        return self._codes.read_drawn(self.shards[shard], keys, draw)

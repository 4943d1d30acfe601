"""Loaders of training batches: any micro-batch of any step, loaded ahead in the background.

Global batch t is the positions [t x M x B, (t + 1) x M x B) of the sample order, its micro-batch m
the m-th run of B of these. So it is the same for any number of ranks, loader workers or restarts,
and starting at a step costs nothing. A shard's tables are read when one of its samples is due, and
kept while the order's window needs them; images are read by their offset in the tar.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Generic, Protocol, TypeVar

from fqgan_dist.data.batch_memory import BatchMemory
from fqgan_dist.data.batches import (
    CodeBatch,
    ImageBatch,
    LoadReport,
    SentImageBatch,
    merge_reports,
)
from fqgan_dist.data.config import ShardCacheConfig, ViewConfig
from fqgan_dist.data.consumption import OrderId
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.micro_batches import Batching, CodeSource, ImageSource, MicroBatchIndex
from fqgan_dist.data.prefetch import AHEAD_PER_WORKER, load_in_processes, load_in_threads
from fqgan_dist.data.record_stores import CodeStore, FeatureStore
from fqgan_dist.data.records import MAX_VIEWS
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.data.views import num_views
from fqgan_dist.errors import ConfigError
from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.waiting import WAITS

__all__ = ["CodeBatch", "CodeLoader", "ImageBatch", "ImageLoader", "iterate_shard"]

logger = logging.getLogger(__name__)

BatchT = TypeVar("BatchT", ImageBatch, CodeBatch)
LoadedT = TypeVar("LoadedT", covariant=True)
_Placed = tuple[MicroBatchIndex, int | None]
"""What to load, and its place in a `BatchMemory`."""

_THREADS = 2
_AHEAD_STEPS = 2
"""Steps that threads work ahead. With loader workers it is two micro-batches for each of them, so
that what is held in memory is bounded either way, however slow the training is."""


class _Source(Protocol[LoadedT]):
    def __call__(self, index: MicroBatchIndex) -> LoadedT: ...
    def close(self) -> None: ...


class _StepLoader(Generic[BatchT]):
    """Streams a source's micro-batches, step by step; each stream has a source of its own."""

    def __init__(
        self,
        dataset: Dataset,
        build: Callable[[], _Source[BatchT]],
        *,
        batching: Batching,
        loader_workers: int,
    ) -> None:
        if loader_workers < 0:
            raise ValueError(f"loader_workers {loader_workers}: expected 0 or more")
        self.dataset = dataset
        self.batching = batching
        self._build = build
        self._loader_workers = loader_workers
        self._report = LoadReport()
        self._warned: set[str] = set()

    @property
    def num_samples(self) -> int:
        """Samples in the dataset."""
        return self.dataset.index.num_samples

    @property
    def dataset_id(self) -> str:
        """The sha256 of the dataset's index."""
        return self.dataset.id

    @property
    def order_id(self) -> OrderId:
        """What decides the order of samples."""
        return OrderId(
            dataset_id=self.dataset.id,
            num_samples=self.num_samples,
            seed=self.batching.seed,
            window_shards=self.batching.window_shards,
        )

    def take_report(self) -> LoadReport:
        """Tell what was done for the batches handed out since the last call."""
        report, self._report = self._report, LoadReport()
        return report

    def batches(
        self,
        start_step: int,
        micro_batches: Sequence[int],
        *,
        loss_group: LossGroup = ALONE,
    ) -> Generator[list[BatchT], None, None]:
        """Yield, for every step from `start_step` on and without end, some of its micro-batches.

        Closing the generator ends the threads or processes that load ahead, and lets other jobs
        evict the dataset from the cache of shards.

        Args:
            start_step: first step, from 0.
            micro_batches: which of the M micro-batches of each global batch, in this order.
            loss_group: the ranks that share them; only this member's samples are read.

        Raises:
            DataError: samples are damaged or missing; names shard and sample.
        """
        if start_step < 0 or not micro_batches:
            raise ValueError(f"start_step {start_step}, micro_batches {list(micro_batches)}")
        if not all(0 <= index < self.batching.micro_batches_per_step for index in micro_batches):
            raise ValueError(
                f"micro_batches {list(micro_batches)}: expected numbers in "
                f"[0, {self.batching.micro_batches_per_step})"
            )
        if self.batching.micro_batch_size % loss_group.size:
            raise ValueError(
                f"micro_batch_size {self.batching.micro_batch_size}: {loss_group.size} ranks "
                "cannot share it; expected a multiple"
            )
        return self._stream(start_step, tuple(micro_batches), loss_group)

    def _stream(
        self, start_step: int, micro_batches: tuple[int, ...], loss_group: LossGroup
    ) -> Generator[list[BatchT], None, None]:
        wanted = (
            MicroBatchIndex(step, index, loss_group.member, loss_group.size)
            for step in itertools.count(start_step)
            for index in micro_batches
        )
        with ExitStack() as opened:
            loaded = self._load_ahead(wanted, len(micro_batches), opened)
            while True:
                with WAITS.during("batches from the loader", is_symptom=True):
                    batches = list(itertools.islice(loaded, len(micro_batches)))
                self._account(batches)
                yield batches
                del batches  # their memory is used again as soon as the caller is done with them

    def _load_ahead(
        self, wanted: Iterator[MicroBatchIndex], num_per_step: int, opened: ExitStack
    ) -> Iterator[BatchT]:
        """Load micro-batches in the background; `opened` is closed when no more are taken."""
        if self._loader_workers:
            loaded = load_in_processes(self._build, wanted, workers=self._loader_workers)
        else:
            source = opened.enter_context(closing(self._build()))
            ahead = _AHEAD_STEPS * num_per_step
            loaded = load_in_threads(source, wanted, threads=_THREADS, ahead=ahead)
        return opened.enter_context(closing(loaded))

    def _account(self, batches: Sequence[BatchT]) -> None:
        """Add batches that are handed out to the report, and warn of each damaged sample once."""
        reports = [batch.report for batch in batches]
        self._report = merge_reports([self._report, *reports])
        for found in (each for report in reports for each in report.replacements):
            if found.key not in self._warned:
                self._warned.add(found.key)
                logger.warning(
                    "damaged sample: %s; trained on %r in its place",
                    found.reason,
                    found.replacement_key,
                )


class ImageLoader(_StepLoader[ImageBatch]):
    """Batches of image crops, with the teacher features stored for these very crops."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        view: ViewConfig,
        num_views: int | None,
        micro_batch_size: int,
        micro_batches_per_step: int,
        features: FeatureStore | None = None,
        window_shards: int,
        loader_workers: int,
        max_damaged_in_a_row: int,
        cache: ShardCacheConfig | None = None,
    ) -> None:
        """Fix which batches there are; nothing is read yet.

        Args:
            dataset: the images.
            seed: keys the order and the random crops.
            view: how images are cropped.
            num_views: epoch e uses view e mod `num_views`. None: every epoch has a view of its own
                (random crops), or all views that the policy has.
            micro_batch_size: images per micro-batch (B).
            micro_batches_per_step: micro-batches per global batch (M).
            features: stored teacher features, for every view used. A sample whose image was damaged
                when they were made is as damaged as one that cannot be decoded now.
            window_shards: shards that are mixed with each other; their tables and features are kept
                in memory.
            loader_workers: spawned processes that decode; 0: threads of this process.
            max_damaged_in_a_row: a damaged sample is replaced by another one; as many damaged ones
                one after another, replacements included, are an error. 1: the first one is.
            cache: where whole shards are kept on this machine; None: images are read by range.

        Raises:
            ConfigError: `num_views` does not fit the policy or the features.
        """
        _check_limit(max_damaged_in_a_row)
        batching = Batching(
            seed=seed,
            window_shards=window_shards,
            micro_batch_size=micro_batch_size,
            micro_batches_per_step=micro_batches_per_step,
        )
        # Built where it loads, in each loader worker: connections, threads and caches cannot be
        # sent.
        build = partial(
            ImageSource,
            dataset,
            batching,
            view=view,
            num_views=check_num_views(view, num_views, has_features=features is not None),
            features=features,
            max_damaged_in_a_row=max_damaged_in_a_row,
            cache=cache,
        )
        super().__init__(dataset, build, batching=batching, loader_workers=loader_workers)
        self._build_images = build
        self._view = view

    def _load_ahead(
        self, wanted: Iterator[MicroBatchIndex], num_per_step: int, opened: ExitStack
    ) -> Iterator[ImageBatch]:
        workers = self._loader_workers
        ahead = AHEAD_PER_WORKER * workers if workers else _AHEAD_STEPS * num_per_step
        first = next(wanted)
        memory = BatchMemory(
            (len(self.batching.positions(first)), *self._view.shape),
            # Two steps' are with the caller: what is trained on, and what is handed out meanwhile.
            ahead + 1 + 2 * num_per_step,
            is_shared=workers > 0,
        )
        opened.callback(memory.close)
        places = ((index, memory.take()) for index in itertools.chain([first], wanted))
        if workers:
            build = partial(_PlacedLoad, self._build_images, memory)
            sent = opened.enter_context(closing(load_in_processes(build, places, workers=workers)))
            return (batch.unpack(memory) for batch in sent)
        source = opened.enter_context(closing(self._build_images()))

        def load(placed: _Placed) -> ImageBatch:
            index, place = placed
            return source(index, None if place is None else memory.array(place))

        loaded = load_in_threads(load, places, threads=_THREADS, ahead=ahead)
        return opened.enter_context(closing(loaded))


class _PlacedLoad:
    """Loads images in a loader worker, into memory that it shares with the process of the loader.

    They are not sent, nor is new memory needed for each batch.
    """

    def __init__(self, build: Callable[[], ImageSource], memory: BatchMemory) -> None:
        self._source = build()
        self._memory = memory

    def __call__(self, placed: _Placed) -> SentImageBatch:
        index, place = placed
        images = None if place is None else self._memory.view(place)
        return SentImageBatch(self._source(index, images), place=place)


class CodeLoader(_StepLoader[CodeBatch]):
    """Batches of codes; each sample and epoch draws one of the stored views."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        codes: CodeStore,
        seed: int,
        micro_batch_size: int,
        micro_batches_per_step: int,
        window_shards: int,
        loader_workers: int,
        max_damaged_in_a_row: int,
    ) -> None:
        """Fix which batches there are; nothing is read yet.

        Args:
            dataset: the images whose codes these are.
            codes: codes of every shard.
            seed: keys the order and the choice of views.
            micro_batch_size: samples per micro-batch (B).
            micro_batches_per_step: micro-batches per global batch (M).
            window_shards: shards that are mixed with each other; one view of their codes is kept in
                memory.
            loader_workers: spawned processes that read; 0: threads of this process.
            max_damaged_in_a_row: a sample whose image was damaged when the codes were made is
                replaced; as `ImageLoader`.
        """
        batching = Batching(
            seed=seed,
            window_shards=window_shards,
            micro_batch_size=micro_batch_size,
            micro_batches_per_step=micro_batches_per_step,
        )
        _check_limit(max_damaged_in_a_row)
        build = partial(
            CodeSource, dataset, batching, codes=codes, max_damaged_in_a_row=max_damaged_in_a_row
        )
        super().__init__(dataset, build, batching=batching, loader_workers=loader_workers)


def _check_limit(max_damaged_in_a_row: int) -> None:
    if max_damaged_in_a_row < 1:
        raise ValueError(f"max_damaged_in_a_row {max_damaged_in_a_row}: expected at least 1")


def check_num_views(view: ViewConfig, count: int | None, *, has_features: bool) -> int | None:
    """Return how many distinct views an image has; None: a new one every epoch.

    Raises:
        ConfigError: a view policy has not that many, or stored features need a number.
    """
    available = num_views(view.policy)
    if count is None:
        if has_features and available is None:
            raise ConfigError(
                f"num_views: required with stored teacher features and policy {view.policy!r}; "
                "name the number of views that were stored"
            )
        return available
    limit = min(available or MAX_VIEWS, MAX_VIEWS) if has_features else available
    if count < 1 or (limit is not None and count > limit):
        raise ConfigError(
            f"num_views: {count} with policy {view.policy!r}; expected 1 to {limit or 'any number'}"
        )
    return count

"""One stream of images, whatever the layout: ranks, loss groups, loader workers, restarts.

Loader workers are modelled here: each is a source of its own that loads every w-th micro-batch, as
torch's DataLoader deals them out. test_loader.py runs real ones, which take seconds to start.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_shards import SIDE, colour_of, key_of, write_tiny_dataset

from fqgan_dist.data.batches import ImageBatch
from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex
from fqgan_dist.data.micro_batches import Batching, ImageSource, MicroBatchIndex
from fqgan_dist.data.prefetch import load_in_threads
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.step_layout import assign_slots
from fqgan_dist.world import World

VIEW = ViewConfig(policy="random_crop_flip", image_size=SIDE)


@dataclass(frozen=True)
class Layout:
    """How many processes load one stream."""

    ranks: int
    ranks_per_micro_batch: int
    loader_workers: int


ALONE = Layout(1, 1, 0)


@dataclass(frozen=True)
class Case:
    """A dataset and how its stream is cut."""

    counts: list[int]
    batching: Batching


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batching = Batching(
        seed=draw(st.integers(0, 2**32)),
        window_shards=draw(st.integers(1, 5)),
        micro_batch_size=draw(st.sampled_from([1, 2, 3, 4, 6, 8])),
        micro_batches_per_step=draw(st.integers(1, 8)),
    )
    return Case(draw(st.lists(st.integers(1, 9), min_size=1, max_size=6)), batching)


def layouts(batching: Batching) -> st.SearchStrategy[Layout]:
    """Draw any layout of up to 16 ranks that may share the batching's micro-batches."""
    sizes = [size for size in (1, 2, 4, 8) if batching.micro_batch_size % size == 0]
    return st.sampled_from(
        [
            (size * groups, size)
            for size in sizes
            for groups in range(1, batching.micro_batches_per_step + 1)
            if size * groups <= 16
        ]
    ).flatmap(lambda pair: st.builds(Layout, st.just(pair[0]), st.just(pair[1]), st.integers(0, 4)))


@contextmanager
def dataset(case: Case) -> Iterator[tuple[Storage, DatasetIndex]]:
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        yield storage, write_tiny_dataset(storage, case.counts)


def load_steps(
    storage: Storage, index: DatasetIndex, batching: Batching, layout: Layout, steps: range
) -> list[list[ImageBatch]]:
    """Load the whole global batches of steps, micro-batch by micro-batch, part by part.

    Every rank and loader worker has a source of its own; of a rank's idle slots nothing is kept.
    """
    loaded: dict[tuple[int, int, int], ImageBatch] = {}
    size = layout.ranks_per_micro_batch
    for rank in range(layout.ranks):
        world = World(rank=rank, world_size=layout.ranks)
        slots = assign_slots(batching.micro_batches_per_step, world, size)
        passes = list(itertools.product(steps, slots))
        wanted = [
            MicroBatchIndex(step, slot.micro_batch, rank % size, size) for step, slot in passes
        ]
        batches = load_as_worker_processes(storage, index, batching, layout.loader_workers, wanted)
        for (step, slot), batch in zip(passes, batches, strict=True):
            if not slot.is_idle:
                place = (step, slot.micro_batch, rank % size)
                assert place not in loaded
                loaded[place] = batch
    per_step = batching.micro_batches_per_step * size
    in_order = [loaded[place] for place in sorted(loaded)]
    assert len(in_order) == per_step * len(steps)
    return [in_order[start : start + per_step] for start in range(0, len(in_order), per_step)]


def load_as_worker_processes(
    storage: Storage,
    index: DatasetIndex,
    batching: Batching,
    workers: int,
    wanted: Sequence[MicroBatchIndex],
) -> Iterator[ImageBatch]:
    if not workers:
        yield from load_in_threads(
            build_source(storage, index, batching), wanted, threads=2, ahead=3
        )
        return
    streams = [
        load_in_threads(
            build_source(storage, index, batching), wanted[number::workers], threads=1, ahead=2
        )
        for number in range(workers)
    ]
    for number in range(len(wanted)):
        yield next(streams[number % workers])
    for stream in streams:
        stream.close()


def build_source(storage: Storage, index: DatasetIndex, batching: Batching) -> ImageSource:
    return ImageSource(
        Dataset(storage, index),
        batching,
        view=VIEW,
        num_views=None,
        features=None,
        max_damaged_in_a_row=1,
        cache=None,
    )


def keys_of(steps: Sequence[Sequence[ImageBatch]]) -> list[str]:
    return [key for step in steps for batch in step for key in batch.keys]


def join(steps: Sequence[Sequence[ImageBatch]]) -> tuple[list[str], list[int], torch.Tensor]:
    """Give keys, views and pixels of a stream."""
    batches = list(itertools.chain.from_iterable(steps))
    views = [view for batch in batches for view in batch.views]
    return keys_of(steps), views, torch.cat([batch.images for batch in batches])


@settings(max_examples=15, deadline=None)
@given(st.data(), cases())
def test_the_stream_is_concatenated_exact_permutations(data: st.DataObject, case: Case) -> None:
    size = sum(case.counts)
    everything = {key_of(number) for number in range(size)}
    per_step = case.batching.micro_batch_size * case.batching.micro_batches_per_step
    layout = data.draw(layouts(case.batching))
    with dataset(case) as (storage, index):
        steps = range(-(-3 * size // per_step))
        keys, views, pixels = join(load_steps(storage, index, case.batching, layout, steps))
    for epoch in range(3):
        part = slice(epoch * size, (epoch + 1) * size)
        assert len(keys[part]) == size
        assert set(keys[part]) == everything
        assert set(views[part]) == {epoch}
    for key, image in zip(keys, pixels, strict=True):
        assert (image == torch.tensor(colour_of(key), dtype=torch.uint8)[:, None, None]).all()


@settings(max_examples=20, deadline=None)
@given(st.data(), cases(), st.integers(0, 1000))
def test_the_global_batch_of_a_step_is_the_same_for_all_layouts(
    data: st.DataObject, case: Case, step: int
) -> None:
    steps = range(step, step + 2)
    with dataset(case) as (storage, index):
        expected = join(load_steps(storage, index, case.batching, ALONE, steps))
        for _ in range(2):
            layout = data.draw(layouts(case.batching))
            keys, views, pixels = join(load_steps(storage, index, case.batching, layout, steps))
            assert (keys, views) == expected[:2]
            assert torch.equal(pixels, expected[2])


@settings(max_examples=20, deadline=None)
@given(st.data(), cases(), st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_a_stream_that_is_stopped_anywhere_goes_on_with_another_layout(
    data: st.DataObject, case: Case, lengths: list[int]
) -> None:
    with dataset(case) as (storage, index):
        expected = keys_of(load_steps(storage, index, case.batching, ALONE, range(sum(lengths))))
        found: list[str] = []
        first = 0
        for length in lengths:
            layout = data.draw(layouts(case.batching))
            # What a killed session had loaded ahead of its last step leaves no trace.
            steps = load_steps(
                storage, index, case.batching, layout, range(first, first + length + 1)
            )
            found += keys_of(steps[:length])
            first += length
    assert found == expected


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 10**9))
def test_no_two_slots_of_a_micro_batch_have_a_stand_in_in_common(case: Case, start: int) -> None:
    with dataset(case) as (storage, index):
        source = build_source(storage, index, case.batching)
        size = case.batching.micro_batch_size
        slots = range(start - start % size, start - start % size + size)
        own = {(place.shard, place.row) for place in source.locate(slots)}
        stand_ins = [sample for slot in slots for sample in source.candidates(slot)]
    # Each sample of the dataset is in the micro-batch, or a candidate of exactly one of its slots.
    assert len(stand_ins) == len(set(stand_ins))
    assert set(stand_ins) | own == {
        (shard, row) for shard, count in enumerate(case.counts) for row in range(count)
    }
    assert not set(stand_ins) & own

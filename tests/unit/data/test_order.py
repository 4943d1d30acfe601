from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqgan_dist.data.order import SampleOrder

counts_of_shards = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def make_order(
    counts: list[int], seed: int = 0, window: int = 3, dataset: str = "d"
) -> SampleOrder:
    return SampleOrder(counts, dataset_id=dataset, seed=seed, window_shards=window)


def stream(order: SampleOrder, positions: range) -> list[tuple[int, int, int]]:
    places = order.locate(positions)
    return list(
        zip(places.epochs.tolist(), places.shards.tolist(), places.rows.tolist(), strict=True)
    )


@settings(max_examples=60)
@given(counts_of_shards, st.integers(0, 2**40), st.integers(1, 15), st.integers(0, 10**6))
def test_stream_is_concatenated_permutations(
    counts: list[int], seed: int, window: int, epoch: int
) -> None:
    order = make_order(counts, seed, window)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    size = order.num_samples
    assert size == len(everything)
    found = stream(order, range(epoch * size, (epoch + 2) * size))
    for number, part in enumerate((found[:size], found[size:])):
        assert {place[0] for place in part} == {epoch + number}
        assert {place[1:] for place in part} == everything


@settings(max_examples=60)
@given(counts_of_shards, st.integers(1, 15), st.data())
def test_any_positions_give_what_the_whole_stream_gives(
    counts: list[int], window: int, data: st.DataObject
) -> None:
    order = make_order(counts, window=window)
    whole = stream(order, range(3 * order.num_samples))
    positions = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=20))
    places = make_order(counts, window=window).locate(np.array(positions, dtype=np.int64))
    found = zip(places.epochs, places.shards, places.rows, strict=True)
    assert [tuple(map(int, place)) for place in found] == [
        whole[position] for position in positions
    ]


@given(counts_of_shards, st.integers(1, 5))
def test_samples_come_from_one_window_of_shards_at_a_time(counts: list[int], window: int) -> None:
    order = make_order(counts, window=window)
    left = dict(enumerate(counts))
    opened: set[int] = set()
    for _, shard, _ in stream(order, range(order.num_samples)):
        opened.add(shard)
        assert len(opened) <= window
        left[shard] -= 1
        if all(left[other] == 0 for other in opened):
            opened.clear()


def find_windows(order: SampleOrder, counts: list[int], epochs: int) -> list[tuple[int, set[int]]]:
    """Read from the stream itself where each window of shards ends, and which shards it has."""
    windows: list[tuple[int, set[int]]] = []
    for epoch in range(epochs):
        start = epoch * order.num_samples
        shards = [place[1] for place in stream(order, range(start, start + order.num_samples))]
        while shards:
            size = min(order.window_shards, len(set(shards)))
            found = set(list(dict.fromkeys(shards))[:size])
            start += sum(counts[shard] for shard in found)
            shards = shards[sum(counts[shard] for shard in found) :]
            windows.append((start, found))
    return windows


@given(counts_of_shards, st.integers(1, 5), st.data())
def test_upcoming_shards_are_those_of_the_next_window(
    counts: list[int], window: int, data: st.DataObject
) -> None:
    order = make_order(counts, window=window)
    position = data.draw(st.integers(0, 2 * order.num_samples - 1))
    windows = find_windows(order, counts, epochs=3)
    present = next(number for number, (end, _) in enumerate(windows) if position < end)
    upcoming = order.upcoming_shards(position)
    assert set(upcoming) == windows[present + 1][1]
    assert len(upcoming) == len(set(upcoming))


@given(counts_of_shards, st.integers(0, 2**40), st.integers(0, 2**62))
def test_a_walk_visits_every_sample_once(counts: list[int], seed: int, key: int) -> None:
    order = make_order(counts, seed)
    visited = list(order.walk(key))
    assert len(visited) == len(set(visited))
    assert set(visited) == {
        (shard, row) for shard, count in enumerate(counts) for row in range(count)
    }
    assert visited == list(make_order(counts, seed).walk(key))


def test_walks_of_other_keys_seeds_and_datasets_differ() -> None:
    counts = [20] * 5
    first = list(make_order(counts).walk(7))
    assert first != list(make_order(counts).walk(8))
    assert first != list(make_order(counts, seed=1).walk(7))
    assert first != list(make_order(counts, dataset="e").walk(7))


def test_another_epoch_seed_or_dataset_gives_another_order() -> None:
    counts = [20] * 5
    first = stream(make_order(counts), range(200))
    assert [p[1:] for p in first[:100]] != [p[1:] for p in first[100:]]
    assert stream(make_order(counts, seed=1), range(100)) != first[:100]
    assert stream(make_order(counts, dataset="e"), range(100)) != first[:100]


def test_samples_of_different_shards_are_mixed() -> None:
    shards = [place[1] for place in stream(make_order([50] * 4, window=4), range(200))]
    changes = sum(a != b for a, b in itertools.pairwise(shards))
    assert changes > 100  # 150 expected of a perfect mix, 3 of none


def test_order_is_equal_in_another_process() -> None:
    code = (
        "from fqgan_dist.data.order import SampleOrder\n"
        "o = SampleOrder([5, 3, 7, 1], dataset_id='d', seed=3, window_shards=2)\n"
        "p = o.locate(range(40)); print(p.shards.tolist(), p.rows.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    places = make_order([5, 3, 7, 1], seed=3, window=2).locate(range(40))
    assert done.stdout.strip() == f"{places.shards.tolist()} {places.rows.tolist()}"


def test_order_never_changes() -> None:
    # A change here makes every running training see other images after a restart.
    places = make_order([5, 3, 7, 1], seed=3, window=2).locate(range(16))
    assert places.shards.tolist() == RECORDED_SHARDS
    assert places.rows.tolist() == RECORDED_ROWS


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one or more"):
        make_order([])
    with pytest.raises(ValueError, match="each > 0"):
        make_order([3, 0])
    with pytest.raises(ValueError, match="window_shards 0"):
        make_order([3], window=0)
    with pytest.raises(ValueError, match="position -1"):
        make_order([3]).locate([-1])


RECORDED_SHARDS = [0, 2, 0, 0, 0, 2, 0, 2, 2, 2, 2, 2, 3, 1, 1, 1]
RECORDED_ROWS = [4, 2, 2, 1, 3, 5, 0, 1, 0, 3, 4, 6, 0, 2, 1, 0]

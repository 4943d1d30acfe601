from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fqgan_dist.data.consumption import Consumed, StandIn, consume, expect, join
from fqgan_dist.data.order import SampleOrder

ORDER = SampleOrder([5, 3, 4], dataset_id="d", seed=7, window_shards=2)


def samples_at(start: int, end: int) -> Any:
    found = ORDER.locate(range(start, end))
    return np.stack([found.shards, found.rows], axis=1)


def run(start: int, end: int) -> Consumed:
    due = samples_at(start, end)
    return consume(start, due, due)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.randoms())
def test_any_partition_gives_what_the_order_has(lengths: list[int], random: Any) -> None:
    ends = np.cumsum([0, *lengths]).tolist()
    parts = [run(start, end) for start, end in itertools.pairwise(ends)]
    parts += parts[:2]  # of an idle slot
    random.shuffle(parts)
    assert join(parts) == [expect(ORDER, 0, ends[-1], [])]


def test_a_gap_stays_to_be_found() -> None:
    assert [(each.start, each.end) for each in join([run(4, 6), run(0, 3)])] == [(0, 3), (4, 6)]


def test_runs_of_other_samples_are_not_taken_for_one() -> None:
    other = consume(0, samples_at(0, 3), samples_at(1, 4))
    assert len(join([run(0, 3), other])) == 2


def test_stand_ins_are_named_and_counted() -> None:
    due = samples_at(10, 14)
    loaded = due.copy()
    loaded[2] = (1, 2) if tuple(due[2]) != (1, 2) else (0, 0)
    consumed = consume(10, due, loaded)
    stand_in = StandIn(position=12, shard=int(loaded[2, 0]), row=int(loaded[2, 1]))
    assert consumed.stand_ins == (stand_in,)
    assert consumed == expect(ORDER, 10, 14, [stand_in])
    assert consumed.digest != expect(ORDER, 10, 14, []).digest


@given(st.integers(0, 30), st.integers(0, 29))
def test_samples_at_each_others_places_are_found(first: int, offset: int) -> None:
    due = samples_at(0, 31)
    second = (first + 1 + offset) % 31
    loaded = due.copy()
    loaded[[first, second]] = due[[second, first]]
    is_same = (due == loaded).all()
    assert (consume(0, due, loaded).digest == run(0, 31).digest) == is_same

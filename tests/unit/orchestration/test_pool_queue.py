"""Decisions of an actor pool, without Ray."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqgan_dist.errors import ClusterError
from fqgan_dist.orchestration.config import PoolConfig
from fqgan_dist.orchestration.pool_queue import ChunkQueue, count_wanted_actors


def make_queue(count: int = 3, max_failures: int = 2) -> ChunkQueue:
    return ChunkQueue(range(count), description="codes", max_failures=max_failures)


def test_chunks_come_in_order() -> None:
    queue = make_queue(count=3)
    assert [queue.take() for _ in range(len(queue))] == [0, 1, 2]
    assert not queue


def test_chunk_that_lost_its_actor_comes_next() -> None:
    queue = make_queue(count=3)
    queue.take()
    queue.put_back(0, "killed")
    assert queue.take() == 0


def test_chunk_that_loses_too_many_actors_is_named_with_the_last_cause() -> None:
    queue = make_queue(max_failures=1)
    queue.put_back(queue.take(), "first cause")
    with pytest.raises(ClusterError, match=r"codes: chunk 0 lost its actor 2 times.*: last cause"):
        queue.put_back(queue.take(), "last cause")


def test_losses_of_another_chunk_do_not_count() -> None:
    queue = make_queue(max_failures=1)
    first, second = queue.take(), queue.take()
    queue.put_back(first, "killed")
    queue.put_back(second, "killed")
    assert len(queue) == 3


def test_loss_with_a_drained_node_is_not_the_chunks_fault() -> None:
    queue = make_queue(max_failures=0)
    for _ in range(5):
        queue.put_back(queue.take(), "preempted", counts=False)
    assert queue.take() == 0


@pytest.mark.parametrize(
    ("waiting", "busy", "located", "present", "wanted"),
    [
        (100, 0, 0, 0, 2),  # starts with min_actors
        (100, 0, 2, 2, 2),  # and asks for no more before one works
        (99, 1, 2, 2, 8),  # then for all, as more wait than work
        (3, 4, 8, 8, 7),  # never for more than there are chunks
        (2, 4, 5, 5, 5),  # fewer wait than work: what is there is used, nothing more is asked for
        (0, 3, 8, 8, 3),  # an empty queue: only the busy ones stay
        (0, 1, 8, 8, 2),  # and min_actors for the work that may follow
        (0, 0, 8, 8, 2),
        (0, 1, 1, 2, 1),  # none of which need come any more
        (1, 0, 0, 0, 1),  # the last chunk lost its actor
        (1, 0, 2, 2, 2),  # the next work is small
    ],
)
def test_number_of_actors_follows_the_queue(
    waiting: int, busy: int, located: int, present: int, wanted: int
) -> None:
    config = PoolConfig(min_actors=2, max_actors=8)
    count = count_wanted_actors(
        config, waiting=waiting, busy=busy, located=located, present=present
    )
    assert count == wanted


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 9)),
    waiting=st.integers(0, 30),
    numbers=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
)
def test_number_of_actors_stays_within_bounds(
    sizes: tuple[int, int], waiting: int, numbers: tuple[int, int, int]
) -> None:
    least, more = sizes
    config = PoolConfig(min_actors=least, max_actors=least + more)
    busy, located, present = (min(sum(numbers[:count]), config.max_actors) for count in range(1, 4))
    wanted = count_wanted_actors(
        config, waiting=waiting, busy=busy, located=located, present=present
    )
    assert busy <= wanted <= config.max_actors
    assert wanted <= max(busy + waiting, min(least, located))
    assert wanted > 0 or waiting + busy == 0

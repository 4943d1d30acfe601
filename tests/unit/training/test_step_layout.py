from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fqgan_dist.errors import ConfigError
from fqgan_dist.loss_group import ALONE
from fqgan_dist.training.step_layout import Slot, assign_slots, build_step_layout
from fqgan_dist.world import World

SIZES = st.integers(min_value=1, max_value=40)


def assign_all(num_micro_batches: int, world_size: int, size: int = 1) -> list[tuple[Slot, ...]]:
    return [
        assign_slots(num_micro_batches, World(rank=rank, world_size=world_size), size)
        for rank in range(world_size)
    ]


@given(num_micro_batches=SIZES, world_size=SIZES)
def test_every_micro_batch_has_weight_on_exactly_one_rank(
    num_micro_batches: int, world_size: int
) -> None:
    assume(world_size <= num_micro_batches)
    ranks = assign_all(num_micro_batches, world_size)
    weighted = [slot.micro_batch for slots in ranks for slot in slots if not slot.is_idle]
    assert sorted(weighted) == list(range(num_micro_batches))


@given(num_micro_batches=SIZES, world_size=SIZES)
def test_all_ranks_make_the_same_number_of_passes(num_micro_batches: int, world_size: int) -> None:
    assume(world_size <= num_micro_batches)
    ranks = assign_all(num_micro_batches, world_size)
    expected = -(-num_micro_batches // world_size)
    assert [len(slots) for slots in ranks] == [expected] * world_size


@given(num_micro_batches=SIZES, world_size=SIZES)
def test_idle_slots_come_last_and_rerun_a_micro_batch_of_their_rank(
    num_micro_batches: int, world_size: int
) -> None:
    assume(world_size <= num_micro_batches)
    for slots in assign_all(num_micro_batches, world_size):
        assert not any(slot.is_idle for slot in slots[:-1])
        if slots[-1].is_idle:
            assert slots[-1].micro_batch == slots[0].micro_batch


@given(num_micro_batches=SIZES, world_size=SIZES)
def test_the_passes_interleaved_are_the_order_of_micro_batches(
    num_micro_batches: int, world_size: int
) -> None:
    # What gather_in_order relies on: slot s of rank r runs s * N + r.
    assume(world_size <= num_micro_batches)
    ranks = assign_all(num_micro_batches, world_size)
    order = [slot for passes in zip(*ranks, strict=True) for slot in passes]
    assert [slot.micro_batch for slot in order[:num_micro_batches]] == list(
        range(num_micro_batches)
    )
    assert all(slot.is_idle for slot in order[num_micro_batches:])


@given(num_micro_batches=SIZES, num_groups=SIZES, size=st.integers(min_value=1, max_value=5))
def test_the_ranks_of_a_group_make_the_passes_of_one_rank_among_as_many(
    num_micro_batches: int, num_groups: int, size: int
) -> None:
    assume(num_groups <= num_micro_batches)
    alone = assign_all(num_micro_batches, num_groups)
    shared = assign_all(num_micro_batches, num_groups * size, size)
    assert shared == [slots for slots in alone for _ in range(size)]


def test_more_ranks_than_micro_batches_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"training\.ranks_per_micro_batch: with 1, 5 train workers cannot share 4 "
        r"micro-batches per step; expected at most 4 workers",
    ):
        assign_slots(4, World(rank=0, world_size=5))
    with pytest.raises(ConfigError, match=r"with 2, 10 train workers .* at most 8 workers"):
        assign_slots(4, World(rank=0, world_size=10), 2)


def test_ranks_that_make_no_whole_groups_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"training\.ranks_per_micro_batch: groups of 2 ranks cannot be made of 3",
    ):
        assign_slots(4, World(rank=0, world_size=3), 2)


def test_one_process_has_its_rows_in_order_already() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(build_step_layout(3, World()).gather_in_order(rows), rows[:, None])


def test_a_layout_has_its_rank_s_passes_and_their_weights() -> None:
    layout = build_step_layout(4, World(rank=1, world_size=3))
    assert layout.loss_group is ALONE
    assert layout.micro_batches == [1, 1]
    assert [layout.weight(slot) for slot in layout.slots] == [1 / 4, 0.0]

"""Batch memory is handed out again when nothing looks at it any more, and never before."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loader_workers import FillsPlaces

from fqgan_dist.data.batch_memory import BatchMemory
from fqgan_dist.data.prefetch import load_in_processes

SHAPE = (2, 3, 5, 7)

LOOKS: list[Callable[[np.ndarray], Any]] = [
    lambda array: array,
    lambda array: array[1],
    lambda array: array[0, :, ::2].transpose(1, 0, 2),
    torch.from_numpy,
    lambda array: torch.from_numpy(array)[1, 0],
    lambda array: torch.from_numpy(array[1]).permute(2, 0, 1),
    lambda array: torch.from_numpy(array).numpy()[0],
    lambda array: torch.from_numpy(array).untyped_storage(),
    memoryview,
]
"""All that keeps the memory of an array."""


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_place_is_free_when_nothing_looks_at_it(
    look: Callable[[np.ndarray], Any], is_shared: bool
) -> None:
    memory = BatchMemory(SHAPE, 1, is_shared=is_shared)
    assert memory.take() == 0
    seen = look(memory.array(0))
    assert memory.take() is None
    del seen
    assert memory.take() == 0


def test_a_copy_does_not_hold_the_place() -> None:
    memory = BatchMemory(SHAPE, 1, is_shared=False)
    memory.take()
    copy = torch.from_numpy(memory.array(0)).clone()
    assert memory.take() == 0
    assert copy.shape == SHAPE


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 99)), max_size=40), st.integers(1, 5))
def test_held_places_are_apart(steps: list[tuple[bool, int]], places: int) -> None:
    memory = BatchMemory(SHAPE, places, is_shared=False)
    held: list[tuple[int, torch.Tensor]] = []
    for number, (is_taken, choice) in enumerate(steps):
        if is_taken:
            place = memory.take()
            assert (place is None) == (len(held) == places)
            if place is not None:
                images = torch.from_numpy(memory.array(place)).fill_(number)
                held.append((number, images))
                del images
        elif held:
            del held[choice % len(held)]
        assert all((images == number).all() for number, images in held)


def test_memory_outlives_its_closing_with_what_looks_at_it() -> None:
    before = len(os.listdir("/proc/self/fd"))
    memory = BatchMemory(SHAPE, 3, is_shared=True)
    place = memory.take()
    assert place is not None
    images = torch.from_numpy(memory.array(place)).fill_(7)
    memory.close()
    assert (images == 7).all()
    del images, memory
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_loader_workers_write_to_the_same_memory() -> None:
    memory = BatchMemory(SHAPE, 4, is_shared=True)
    orders = [(10 + place, place) for place in range(4)]
    arrays = [memory.array(place) for place in range(4)]
    assert list(load_in_processes(FillsPlaces(memory), orders, workers=2)) == [10, 11, 12, 13]
    for place, array in enumerate(arrays):
        assert (array == 10 + place).all()


def test_memory_that_is_not_shared_is_not_sent() -> None:
    with pytest.raises(AssertionError, match="not shared"):
        BatchMemory(SHAPE, 1, is_shared=False).__getstate__()

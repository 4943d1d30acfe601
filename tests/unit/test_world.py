from __future__ import annotations

import dataclasses

import pytest

from fqgan_dist.world import World

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process() -> None:
    world = World.from_environment()
    assert world == World(rank=0, world_size=1, local_rank=0, node_rank=0)
    assert world.is_main


def test_torchrun_s_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("5", "8", "1", "2", "7"), strict=True):
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert world == World(rank=5, world_size=8, local_rank=1, node_rank=2)
    assert not world.is_main
    assert str(world) == "rank 5/8 node2"


def test_the_node_s_rank_may_have_ray_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "3")
    assert World.from_environment().node_rank == 3


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0)])
def test_a_rank_outside_its_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is not in \[0, {world_size}\)"):
        World(rank=rank, world_size=world_size)


def test_a_world_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        World().rank = 1  # pyright: ignore[reportAttributeAccessIssue] the point

"""What is counted as room, from what Ray says of its nodes and groups; no Ray is started."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RpcError

from fqgan_dist.orchestration import free_room
from fqgan_dist.orchestration.config import TrainWorkersConfig
from fqgan_dist.orchestration.free_room import Room, list_groups, look_for_room

WORKERS = TrainWorkersConfig(cpus=2.0)


class FakeRay:
    """Two nodes of eight CPUs, with a group of two workers on the second, and a dead one."""

    def __init__(self) -> None:
        self.draining: dict[str, int] = {}
        self.is_away = False
        self.groups = {
            "running": self._group("CREATED", ["b", "b"]),
            "waiting": self._group("PENDING", ["", ""]),
            "larger": self._group("CREATED", ["b", "b", "b"]),
        }

    @staticmethod
    def _group(state: str, nodes: list[str]) -> dict[str, Any]:
        return {
            "state": state,
            "bundles": {index: {"CPU": 2.0} for index in range(len(nodes))},
            "bundles_to_node_id": dict(enumerate(nodes)),
        }

    def nodes(self) -> list[dict[str, Any]]:
        if self.is_away:
            raise RpcError("the head is away")
        alive = {"a": True, "b": True, "c": False}
        return [
            {"NodeID": name, "Alive": is_alive, "Resources": {"CPU": 8.0}}
            for name, is_alive in alive.items()
        ]

    def placement_group_table(self) -> dict[str, dict[str, Any]]:
        if self.is_away:
            raise RpcError("the head is away")
        return self.groups

    def get_draining_nodes(self) -> dict[str, int]:
        return self.draining


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    free = {"a": {"CPU": 8.0}, "b": {"CPU": 3.0, "CPU_group_0_x": 4.0}}
    monkeypatch.setattr(free_room.ray, "nodes", fake.nodes)
    monkeypatch.setattr(free_room, "placement_group_table", fake.placement_group_table)
    monkeypatch.setattr(free_room.ray_state, "state", fake)
    monkeypatch.setattr(free_room.ray_state, "available_resources_per_node", lambda: free)
    return fake


def test_whole_workers_are_counted_node_by_node(fake: FakeRay) -> None:
    assert look_for_room(WORKERS) == Room(free=5, whole=8)


def test_what_the_own_group_holds_counts_as_free(fake: FakeRay) -> None:
    assert look_for_room(WORKERS, {"running", "one that is gone"}) == Room(free=7, whole=8)


def test_a_node_that_is_drained_has_no_room(fake: FakeRay) -> None:
    fake.draining = {"b": 0}
    assert look_for_room(WORKERS, {"running"}) == Room(free=4, whole=4)


def test_groups_are_told_by_state_and_size(fake: FakeRay) -> None:
    assert list_groups(WORKERS.of_size(2), "CREATED") == {"running"}
    assert list_groups(WORKERS.of_size(2), "PENDING") == {"waiting"}
    assert list_groups(WORKERS.of_size(3), "CREATED") == {"larger"}


def test_a_head_that_is_away_says_nothing(fake: FakeRay) -> None:
    fake.is_away = True
    assert look_for_room(WORKERS) is None
    assert list_groups(WORKERS, "CREATED") == set()

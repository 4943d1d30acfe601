"""What the nodes of the connected cluster have, and have left, for train workers.

Nodes that Ray drains have nothing: what is started there has to go again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state as ray_state  # resources by node have no other name
from ray.exceptions import RayError
from ray.util import placement_group_table

from fqgan_dist.orchestration.config import TrainWorkersConfig
from fqgan_dist.orchestration.group_size import count_fitting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """Numbers of train workers."""

    free: int
    """That fit into what is left."""
    whole: int
    """That would fit if nobody else had anything."""


def look_for_room(workers: TrainWorkersConfig, own_groups: Collection[str] = ()) -> Room | None:
    """Count the train workers that fit; None: the head does not answer.

    Args:
        workers: what each needs, and the placement.
        own_groups: ids of placement groups whose resources count as free.
    """
    try:
        nodes = {entry["NodeID"]: entry["Resources"] for entry in ray.nodes() if entry["Alive"]}
        for node_id in ray_state.state.get_draining_nodes():
            nodes.pop(node_id, None)
        free = ray_state.available_resources_per_node()
        groups = placement_group_table() if own_groups else {}
    except (RayError, RuntimeError, ValueError, OSError):
        return None  # others say so
    own = _sum_by_node(groups[group_id] for group_id in own_groups if group_id in groups)
    left = [_add(free.get(node_id, {}), own.get(node_id, {})) for node_id in nodes]
    return Room(
        free=count_fitting(left, workers), whole=count_fitting(list(nodes.values()), workers)
    )


def list_groups(workers: TrainWorkersConfig, state: str) -> set[str]:
    """List ids of placement groups in a state that are as the train workers want theirs.

    Ray does not say whose they are; none if the head does not answer.
    """
    try:
        groups = placement_group_table()
    except (RayError, RuntimeError):
        return set()  # others say so
    wanted = [workers.amounts] * workers.max_workers
    return {
        group_id
        for group_id, group in groups.items()
        if group["state"] == state and list(group["bundles"].values()) == wanted
    }


def _sum_by_node(groups: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Add up what placement groups hold, by node."""
    held: dict[str, dict[str, float]] = {}
    for group in groups:
        for index, node_id in group["bundles_to_node_id"].items():
            held[node_id] = _add(held.get(node_id, {}), group["bundles"][index])
    return held


def _add(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {*first, *second}}

"""Run a function once on every node of the connected Ray cluster."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fqgan_dist.errors import ClusterError

_SHORT_ID_DIGITS = 8
_CONNECT_TIMEOUT_S = 1.0
_LOOK_INTERVAL_S = 0.25
# Ray takes a node whose connection broke off for dead at once, and one that says nothing any more
# after 5 questions of 10 s each at most; after that it is no question of waiting.
_LONGEST_SETTLING_S = 60.0

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive."""

    node_id: str
    """Ray's hexadecimal id."""
    address: str
    is_head: bool

    @property
    def label(self) -> str:
        """The node's name in messages; the id tells nodes of one address apart."""
        role = ", head" if self.is_head else ""
        return f"{self.address} ({self.node_id[:_SHORT_ID_DIGITS]}{role})"


def list_nodes() -> list[Node]:
    """List the nodes that are alive, the head first, then by address and id."""
    nodes = [
        Node(
            node_id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            is_head="node:__internal_head__" in entry["Resources"],
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return sorted(nodes, key=lambda node: (not node.is_head, node.address, node.node_id))


def wait_for_lost_nodes(*, limit_s: float = _LONGEST_SETTLING_S) -> None:
    """Wait until every node that Ray counts as alive takes a connection.

    For some seconds after its end a node still counts (8 s after its raylet was killed, measured on
    two cores), and what is started then waits for it: a group of train workers for as long as its
    start may take.
    """
    deadline = time.monotonic() + limit_s
    while silent := [label for label, host, port in _raylets() if not _is_listening(host, port)]:
        if time.monotonic() >= deadline:
            logger.warning(
                "Ray counts as alive what takes no connection: node %s", ", ".join(silent)
            )
            return
        time.sleep(_LOOK_INTERVAL_S)


def _raylets() -> list[tuple[str, str, int]]:
    try:
        entries = ray.nodes()
    except (RayError, RuntimeError):
        return []  # the head is away: others say so
    return [
        (entry["NodeID"][:_SHORT_ID_DIGITS], entry["NodeManagerAddress"], entry["NodeManagerPort"])
        for entry in entries
        if entry["Alive"]
    ]


def _is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def run_on_every_node(
    fn: Callable[..., T], *args: Any, timeout_s: float
) -> dict[str, T | Exception]:
    """Run a function at once on all nodes that are alive, the head included, and wait for it.

    It and its arguments must be picklable. It takes no CPU, so that a full cluster does not make
    it wait, and is not repeated; whoever still runs after `timeout_s` is stopped.

    Returns:
        By node label, in the order of `list_nodes`: the result; the exception that the function
        raised; or a ClusterError where node or worker was lost or did not answer in time.
    """
    nodes = list_nodes()
    refs = [
        _call.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote(fn, *args)
        for node in nodes
    ]
    done = set(ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0])
    results: dict[str, T | Exception] = {}
    for node, ref in zip(nodes, refs, strict=True):
        if ref in done:
            results[node.label] = _fetch(ref, node)
        else:
            ray.cancel(ref, force=True)
            results[node.label] = ClusterError(
                f"node {node.label}: no answer within {timeout_s:g} s - expected one - look "
                f"whether the node is overloaded or hangs (`ray list nodes`, its logs)"
            )
    return results


@ray.remote(num_cpus=0, max_retries=0)
def _call(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)


def _fetch(ref: Any, node: Node) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        # A cause that does not survive pickling comes as Ray's own text of it.
        return cause if isinstance(cause, Exception) else _describe_loss(error, node)
    except RayError as error:
        return _describe_loss(error, node)


def _describe_loss(error: RayError, node: Node) -> ClusterError:
    return ClusterError(
        f"node {node.label}: its task was lost ({type(error).__name__}: {error}) - expected a "
        f"result - look whether the node lives and runs the same code as this one"
    )

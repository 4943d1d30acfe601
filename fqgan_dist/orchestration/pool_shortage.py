"""What an actor that is pending waits for."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from fqgan_dist.orchestration.config import ProcessResources


def describe_shortage(needs: ProcessResources) -> str:
    """Say what the connected cluster lacks for one more process, all of it on one node."""
    wanted = needs.amounts
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(_covers(node, wanted) for node in nodes):
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
        return (
            f"each needs {_list(wanted)}, and no node of the cluster has that (the most of each: "
            f"{_list(largest)}); they start when such a node joins, which an autoscaler may "
            f"bring - else lower what ray.pools reserves, or add nodes"
        )
    free = ray.available_resources()
    return (
        f"each needs {_list(wanted) or 'no resource'}, and free in the whole cluster are "
        f"{_list({name: free.get(name, 0) for name in wanted})}; they start when other work ends "
        f"or a node joins, which an autoscaler may bring - else lower max_actors or what ray.pools "
        f"reserves, or add nodes"
    )


def _covers(offer: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(offer.get(name, 0) >= amount for name, amount in wanted.items())


def _list(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())

"""What an actor that does not start waits for."""

from __future__ import annotations

import ray

from fqgan_dist.stages.execution import ProcessResources


def find_shortage(needs: ProcessResources) -> str | None:
    """Say which of a process's resources the connected cluster lacks now; None if it has them all.

    Args:
        needs: what one process reserves, all of it on one node.
    """
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus, **needs.custom}
    wanted = {name: amount for name, amount in wanted.items() if amount}
    text = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(_covers(node, wanted) for node in nodes):
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
        return (
            f"each needs {text}, and no node of the cluster has that (the largest: "
            f"{_list(largest)}); they start when such a node joins, which an autoscaler may "
            f"bring - else lower what ray.pools reserves, or add nodes"
        )
    free = ray.available_resources()
    if not _covers(free, wanted):
        free = {name: free.get(name, 0) for name in wanted}
        return (
            f"each needs {text}, and free in the whole cluster are {_list(free)}; they start when "
            f"other work ends or a node joins, which an autoscaler may bring - else lower "
            f"max_actors or what ray.pools reserves, or add nodes"
        )
    return None


def _covers(offer: dict[str, float], wanted: dict[str, float]) -> bool:
    return all(offer.get(name, 0) >= amount for name, amount in wanted.items())


def _list(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())

"""What lies between the nodes: their clocks' differences, and an all-reduce from node to node."""

from __future__ import annotations

import math
import socket
import time
from dataclasses import dataclass

import ray
import torch

from fqgan_dist.diagnosis.clock import judge_skew
from fqgan_dist.diagnosis.collectives import RANKS_TIME_LIMIT_S, judge_all_reduce, run_ranks
from fqgan_dist.diagnosis.programs import Finished
from fqgan_dist.diagnosis.verdict import Verdict, failed, ok
from fqgan_dist.orchestration.nodes import list_nodes, run_on_every_node

CLOCKS, NETWORK = "clocks", "network"

_ROUNDS = 3
_TIMEOUT_S = 60.0
# From here on, which rank failed first can no longer be told from its time.
_LARGE_SKEW_S = 1.0


@dataclass(frozen=True)
class Member:
    """A node as it offers itself for an all-reduce."""

    node_id: str
    address: str
    free_port: int
    gpus: int


def check_clocks() -> Verdict:
    """Compare the clocks of all nodes with that of this process."""
    bounds: dict[str, tuple[float, float]] = {}
    for _ in range(_ROUNDS):
        before = time.time()
        answers = run_on_every_node(time.time, timeout_s=_TIMEOUT_S)
        after = time.time()
        for label, answer in answers.items():
            if isinstance(answer, Exception):
                return failed(CLOCKS, f"not compared: {answer}", "mend that node first")
            # The node read its clock between `before` and `after`: each round narrows it down.
            low, high = bounds.get(label, (-math.inf, math.inf))
            bounds[label] = max(low, answer - after), min(high, answer - before)
    return judge_clocks(bounds)


def judge_clocks(bounds: dict[str, tuple[float, float]]) -> Verdict:
    """Judge the worst clock by the least and largest difference of each to ours, in seconds."""
    verdicts = {
        label: judge_skew(
            CLOCKS,
            (low + high) / 2,
            uncertainty_s=(high - low) / 2,
            other="the driver's clock",
            refused_s=math.inf,
            large_s=_LARGE_SKEW_S,
        )
        for label, (low, high) in bounds.items()
    }
    for label, verdict in verdicts.items():
        if verdict.status != "ok":
            return Verdict(CLOCKS, verdict.status, f"{label}: {verdict.finding}", verdict.advice)
    within_s = max(max(abs(low), abs(high)) for low, high in bounds.values())
    return ok(CLOCKS, f"all nodes agree with the driver's within {within_s:.1f} s")


def check_network() -> Verdict:
    """All-reduce with one rank per node: by nccl between nodes with GPUs, else by gloo."""
    answers = run_on_every_node(_offer, timeout_s=_TIMEOUT_S)
    lost = [error for error in answers.values() if isinstance(error, Exception)]
    if lost:
        return failed(NETWORK, f"not tried: {lost[0]}", "mend that node first")
    members = [member for member in answers.values() if isinstance(member, Member)]
    with_gpus = [member for member in members if member.gpus]
    # Nodes of one address are one machine (a test's cluster): NCCL refuses a GPU given twice.
    if len({member.address for member in with_gpus}) == len(with_gpus) > 1:
        backend, members = "nccl", with_gpus
    else:
        backend = "gloo"
    if len(members) < 2:
        return ok(NETWORK, "one node: nothing to connect")
    first = members[0]
    finished = run_on_every_node(
        _join,
        backend,
        [member.node_id for member in members],
        f"tcp://{first.address}:{first.free_port}",
        timeout_s=RANKS_TIME_LIMIT_S + _TIMEOUT_S,
    )
    lost = [error for error in finished.values() if isinstance(error, Exception)]
    if lost:
        return failed(NETWORK, f"broke off: {lost[0]}", "mend that node first")
    # `list_nodes` orders members and answers alike.
    return judge_all_reduce(
        NETWORK, backend, [each for each in finished.values() if isinstance(each, Finished)]
    )


def _offer() -> Member:
    context = ray.get_runtime_context()
    address = next(n.address for n in list_nodes() if n.node_id == context.get_node_id())
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    return Member(context.get_node_id(), address, port, torch.cuda.device_count())


def _join(backend: str, node_ids: list[str], init_method: str) -> Finished | None:
    node_id = ray.get_runtime_context().get_node_id()
    if node_id not in node_ids:
        return None
    (finished,) = run_ranks(backend, [node_ids.index(node_id)], len(node_ids), init_method)
    return finished

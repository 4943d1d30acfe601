"""Faults as they are done to a running campaign."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil
from ray import _raylet
from ray.core.generated import autoscaler_pb2
from support.fault_proxy import Faults

from benchmarks.fault_campaign.grounds import POOL_ACTOR, RANK, Campaign
from benchmarks.fault_campaign.storm import Fault, FaultName

T = TypeVar("T")

NOTHING = "met nothing"
"""In what a fault says of itself, if there was nothing that it could be done to."""


def inject(campaign: Campaign, fault: Fault) -> str:
    """Do one fault and wait until it is over; says what it met, or that it met nothing."""
    return _INJECTIONS[fault.name](campaign, fault)


def _choose(items: list[T], fault: Fault) -> T | None:
    return items[int(fault.choice * len(items))] if items else None


def _signal_process(name: str, number: signal.Signals) -> Callable[[Campaign, Fault], str]:
    def act(campaign: Campaign, fault: Fault) -> str:
        found = _choose(campaign.cluster.processes(name), fault)
        if found is None:
            return NOTHING
        with suppress(psutil.Error):
            found.send_signal(number)
        return f"process {found.pid}"

    return act


def _kill_all_ranks(campaign: Campaign, _: Fault) -> str:
    ranks = campaign.cluster.processes(RANK)
    for rank in ranks:
        with suppress(psutil.Error):
            rank.kill()
    return f"{len(ranks)} ranks" if ranks else NOTHING


def _kill_node(campaign: Campaign, fault: Fault) -> str:
    return _lose_nodes(campaign, fault, 1)


def _take_capacity(campaign: Campaign, fault: Fault) -> str:
    return _lose_nodes(campaign, fault, 2)


def _lose_nodes(campaign: Campaign, fault: Fault, count: int) -> str:
    """Kill nodes, and bring as many others when the fault is over."""
    ranks = len(campaign.cluster.processes(RANK))
    for _ in range(count):
        node = _choose(campaign.cluster.nodes(), fault)
        assert node is not None, "a campaign has three nodes between faults"
        campaign.cluster.kill_node(node)
    campaign.wait(fault.lasts_s)
    for _ in range(count):
        campaign.cluster.add_node()
    return f"{count} of 3 nodes; {ranks} ranks were on the cluster"


def _kill_driver(campaign: Campaign, _: Fault) -> str:
    assert campaign.process is not None, "begun"
    with suppress(ProcessLookupError):
        os.kill(campaign.process.pid, signal.SIGKILL)
    return f"process {campaign.process.pid}"


def _kill_head(campaign: Campaign, _: Fault) -> str:
    """Kill the head with all that is on it, the driver too; another cluster takes its place."""
    cluster = campaign.cluster
    _kill_driver(campaign, _)
    cluster.stop()
    cluster.start()
    return f"cluster {cluster.num_started}"


def _drain_node(campaign: Campaign, fault: Fault) -> str:
    """Drain a node that has a rank, if there is one; it is off at the end of its time."""
    cluster = campaign.cluster
    busy = [node for node in cluster.nodes() if cluster.processes(RANK, node)]
    node = _choose(busy or cluster.nodes(), fault)
    assert node is not None, "a campaign has three nodes between faults"
    clients: Any = _raylet
    reasons: Any = autoscaler_pb2
    accepted, why = clients.GcsClient(address=cluster.address).drain_node(
        node.node_id,
        reasons.DRAIN_NODE_REASON_PREEMPTION,
        "storm",
        int((time.time() + fault.lasts_s) * 1000),
    )
    campaign.wait(fault.lasts_s)
    cluster.kill_node(node)
    cluster.add_node()
    return f"a node {'with' if busy else 'without'} a rank" + ("" if accepted else f": {why}")


def _cut_storage(campaign: Campaign, fault: Fault) -> str:
    kind = "503 to all" if fault.choice < 0.5 else "connections are reset"
    answers = (
        Faults(slow_down_rate=1)
        if fault.choice < 0.5
        else Faults(reset_rate=1, reset_after_bytes=0)
    )
    return _with_faults(campaign, fault, answers, kind)


def _slow_storage(campaign: Campaign, fault: Fault) -> str:
    slow = Faults(first_byte_s=1.0, bytes_per_s=200_000)
    return _with_faults(campaign, fault, slow, "1 s to the first byte, 0.2 MB/s")


def _with_faults(campaign: Campaign, fault: Fault, faults: Faults, text: str) -> str:
    before = campaign.proxy.num_requests
    campaign.proxy.faults = faults
    try:
        campaign.wait(fault.lasts_s)
    finally:
        campaign.proxy.faults = Faults()
    return f"{text}; {campaign.proxy.num_requests - before} requests"


def _fill_disk(campaign: Campaign, fault: Fault) -> str:
    if not campaign.has_disk:
        return f"{NOTHING}: this user may not mount a disk"
    with _filled(campaign):
        campaign.wait(fault.lasts_s)
    return "TMPDIR of all processes"


@contextmanager
def _filled(campaign: Campaign) -> Iterator[None]:
    filler = campaign.scratch / "filler"
    room = os.statvfs(campaign.scratch)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize))
    try:
        yield
    finally:
        filler.unlink()


_INJECTIONS: dict[FaultName, Callable[[Campaign, Fault], str]] = {
    "kill rank": _signal_process(RANK, signal.SIGKILL),
    "kill all ranks": _kill_all_ranks,
    "stop rank": _signal_process(RANK, signal.SIGSTOP),
    "kill node": _kill_node,
    "kill driver": _kill_driver,
    "kill head": _kill_head,
    "kill pool actor": _signal_process(POOL_ACTOR, signal.SIGKILL),
    "drain node": _drain_node,
    "storage outage": _cut_storage,
    "slow storage": _slow_storage,
    "full disk": _fill_disk,
    "no capacity": _take_capacity,
}

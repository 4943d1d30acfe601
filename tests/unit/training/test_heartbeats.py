"""Heartbeats of ranks through the store that they share."""

from __future__ import annotations

from torch._C._distributed_c10d import HashStore

from fqgan_dist.activity import Glance, WatchdogConfig
from fqgan_dist.stopped_processes import ProcessId
from fqgan_dist.telemetry.standstill import Heartbeat, Member
from fqgan_dist.training.heartbeats import StoreExchange, count_collectives
from fqgan_dist.world import World


def beat(rank: int, *, still_s: float) -> Heartbeat:
    process = ProcessId(host="host", pid=7, started=1, stacks_fd=3)
    member = Member(group="a", number=rank, name=f"rank {rank}", world_size=2, process=process)
    glance = Glance(
        phase="step 7", pace="steady", is_loading=False, still_s=still_s, median_s=1, waiting=""
    )
    return member.heartbeat(glance, WatchdogConfig(after_s=10, warn_after_s=10))


def test_every_rank_hears_of_all_others() -> None:
    store = HashStore()
    first, second = (StoreExchange(store, World(rank=rank, world_size=2)) for rank in (0, 1))
    assert first(beat(0, still_s=0)) is None
    assert second(beat(1, still_s=0)) is None
    found = first(beat(0, still_s=50))
    assert found is None, "the other has moved"
    second(beat(1, still_s=50))
    found = first(beat(0, still_s=50))
    assert found is not None
    assert found.is_hang


def test_a_heartbeat_that_is_only_read_again_is_no_sign_of_life() -> None:
    store, now = HashStore(), [0.0]
    first, second = (
        StoreExchange(store, World(rank=rank, world_size=2), clock=lambda: now[0])
        for rank in (0, 1)
    )
    second(beat(1, still_s=0))
    found = None
    while found is None:
        first(beat(0, still_s=now[0]))
        now[0] += 1
        assert now[0] < 30
        found = first(beat(0, still_s=now[0]))
    assert found.is_hang
    assert [each.number for each in found.silent] == [1]


def test_without_a_process_group_nobody_knows_of_collectives() -> None:
    assert count_collectives() is None

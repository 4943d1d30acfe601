"""Who gives notice to train workers, with Ray replaced by what it would answer."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from fqgan_dist import ec2_notice
from fqgan_dist.notice import NOTICES, Notice
from fqgan_dist.orchestration import notice_sources
from fqgan_dist.orchestration.notice_sources import (
    DrainingEc2Notice,
    DrainNotice,
    DriverNotice,
    NoticeOnSignal,
    sources_for,
    tell_notice,
)
from fqgan_dist.orchestration.progress_board import BoardActor
from fqgan_dist.world import World


class Observer:
    """A rank's or the driver's end of a board, without Ray."""

    def __init__(self, board: BoardActor, stage: str) -> None:
        self._board, self._stage = board, stage

    def tell(self, name: str, value: Any) -> None:
        self._board.tell(self._stage, name, value)

    def ask(self, name: str) -> Any:
        return self._board.ask(self._stage, name)


@pytest.fixture
def board() -> BoardActor:
    return BoardActor("run")


def observer(board: BoardActor, stage: str = "tokenizer") -> Any:
    return Observer(board, stage)


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What Ray's list of draining nodes holds; this process is on `node-a`."""
    nodes: dict[str, int] = {}
    fake = SimpleNamespace(
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "node-a"),
        is_initialized=lambda: True,
        util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.3"),
    )
    monkeypatch.setattr(notice_sources, "ray", fake)
    monkeypatch.setattr(
        notice_sources, "ray_state", SimpleNamespace(get_draining_nodes=lambda: nodes)
    )
    return nodes


def kinds(world: World, board: BoardActor) -> list[str]:
    return [type(source).__name__ for source in sources_for(world, observer(board))]


@pytest.mark.usefixtures("draining")
@pytest.mark.parametrize(
    ("world", "is_ec2", "expected"),
    [
        (World(rank=0, world_size=4, local_rank=0), False, ["DrainNotice", "DriverNotice"]),
        (World(rank=1, world_size=4, local_rank=1), True, ["DrainNotice"]),
        (World(rank=2, world_size=4, local_rank=0), True, ["DrainNotice", "DrainingEc2Notice"]),
    ],
)
def test_every_rank_asks_for_its_node_and_one_for_the_instance_and_the_driver(
    world: World,
    is_ec2: bool,
    expected: list[str],
    board: BoardActor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notice_sources, "is_on_ec2", lambda: is_ec2)
    assert kinds(world, board) == expected


def test_only_the_own_node_gives_notice(draining: dict[str, int]) -> None:
    source = DrainNotice()
    assert source.look() is None
    draining["node-b"] = 5000
    assert source.look() is None
    draining["node-a"] = 7000
    assert source.look() == Notice("Ray drains node 10.0.0.3", 7.0)
    draining["node-a"] = 0
    assert source.look() == Notice("Ray drains node 10.0.0.3", None)


@pytest.mark.usefixtures("draining")
def test_a_head_that_is_away_is_no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, int]:
        raise RaySystemError("no head")

    monkeypatch.setattr(notice_sources, "ray_state", SimpleNamespace(get_draining_nodes=fail))
    assert DrainNotice().look() is None


@pytest.mark.usefixtures("draining")
@pytest.mark.parametrize("is_accepted", [True, False])
@pytest.mark.parametrize(
    ("deadline_s", "drained_at"), [(1090.0, 1090.0), (None, 1120.0), (90.0, 1030.0)]
)
def test_ec2s_notice_drains_the_node_and_counts_whatever_ray_says(
    deadline_s: float | None,
    drained_at: float,
    is_accepted: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(notice_sources, "time", SimpleNamespace(time=lambda: 1000.0))
    asked: list[tuple[Any, ...]] = []

    def drain(*arguments: Any, timeout: float) -> tuple[bool, str]:
        asked.append(arguments)
        assert timeout > 0
        return is_accepted, "not now"

    client = SimpleNamespace(drain_node=drain)
    worker = SimpleNamespace(global_worker=SimpleNamespace(gcs_client=client))
    monkeypatch.setattr(notice_sources, "ray_worker", worker)
    notice = Notice("EC2 takes the instance back (terminate)", deadline_s)
    monkeypatch.setattr(ec2_notice.Ec2Notice, "look", lambda _: notice)
    assert DrainingEc2Notice("http://127.0.0.1:1").look() == notice
    ((node_id, _, reason, deadline_ms),) = asked
    assert (node_id, reason, deadline_ms) == ("node-a", notice.reason, drained_at * 1000)
    assert ("may start workers on it again" in caplog.text) == (not is_accepted)


def test_the_drivers_notice_reaches_the_ranks_of_its_stage_until_it_is_taken_back(
    board: BoardActor,
) -> None:
    source = DriverNotice(observer(board))
    assert source.look() is None
    tell_notice(observer(board, "autoregressive"), Notice("SIGTERM"))
    assert source.look() is None
    tell_notice(observer(board), Notice("SIGTERM", 30.0))
    assert source.look() == Notice("the driver: SIGTERM", 30.0)
    tell_notice(observer(board), None)
    assert source.look() is None


class _NoTimer:
    """A patience that never ends: the timer of a worker's last signal outlives its test."""

    daemon = False

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def start(self) -> None:
        pass


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What Ray's own handler of SIGTERM got."""
    monkeypatch.setattr(threading, "Timer", _NoTimer)
    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, former)
    NOTICES.clear()


def test_sigterm_gives_notice_to_a_worker_that_trains(handler: list[int]) -> None:
    NoticeOnSignal(grace_s=60).after_init_train_context()
    with NOTICES.heeded():
        os.kill(os.getpid(), signal.SIGTERM)
    assert NOTICES.given() is not None
    assert not handler


def test_sigterm_ends_a_worker_that_does_not_train_as_ray_would(handler: list[int]) -> None:
    NoticeOnSignal(grace_s=60).after_init_train_context()
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert handler == [signal.SIGTERM]
    assert NOTICES.given() is None

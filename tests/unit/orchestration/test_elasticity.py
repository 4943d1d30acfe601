"""The size of each start of a range, with what the cluster has written down; no Ray is started."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from fqgan_dist.errors import NoticeError
from fqgan_dist.orchestration import elasticity
from fqgan_dist.orchestration.config import TrainWorkersConfig
from fqgan_dist.orchestration.elasticity import Elasticity
from fqgan_dist.orchestration.free_room import Room

WAIT_S, GROW_S = 30.0, 60.0


class Cluster:
    """What there is room for, and a clock that sleeping advances."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.is_attached = True
        self.room: Room | None = Room(free=0, whole=0)
        self.own_asked: list[set[str]] = []
        self.groups: set[str] = set()
        self.later: Callable[[], None] = lambda: None

    def look_for_room(self, _: TrainWorkersConfig, own: set[str] | None = None) -> Room | None:
        self.own_asked.append(own or set())
        return self.room

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.later()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(elasticity, "look_for_room", cluster.look_for_room)
    monkeypatch.setattr(elasticity, "list_groups", lambda *_: set(cluster.groups))
    monkeypatch.setattr(elasticity, "is_attached", lambda: cluster.is_attached)
    return cluster


def elastic(cluster: Cluster, **settings: object) -> Elasticity:
    workers = TrainWorkersConfig.model_validate(
        {"num_workers": [1, 4], "size_wait_s": WAIT_S, "grow_after_s": GROW_S, **settings}
    )
    return Elasticity("tokenizer", workers, [1, 2, 4], clock=lambda: cluster.now)


def choose(made: Elasticity, cluster: Cluster) -> tuple[int, float]:
    """Give the size of the next start, and how long it was waited for."""
    began = cluster.now
    return made.choose(sleep=cluster.sleep).max_workers, cluster.now - began


def test_a_number_is_taken_as_it_is(cluster: Cluster) -> None:
    workers = TrainWorkersConfig(num_workers=3)
    made = Elasticity("tokenizer", workers, [3])
    assert made.choose(sleep=cluster.sleep) is workers
    assert not cluster.own_asked
    assert made.look() is None


def test_the_most_is_taken_at_once_where_there_is_room(cluster: Cluster) -> None:
    cluster.room = Room(free=9, whole=9)
    assert choose(elastic(cluster), cluster) == (4, 0.0)


def test_the_first_start_waits_for_nodes_and_takes_what_came(cluster: Cluster) -> None:
    cluster.room = Room(free=3, whole=3)
    assert choose(elastic(cluster), cluster) == (2, WAIT_S)


def test_nodes_that_come_end_the_wait(cluster: Cluster) -> None:
    def grow() -> None:
        cluster.room = Room(free=4, whole=4)

    cluster.later = grow
    assert choose(elastic(cluster), cluster) == (4, 0.5)


def test_a_ray_of_this_machine_gets_no_nodes(cluster: Cluster) -> None:
    cluster.is_attached = False
    cluster.room = Room(free=2, whole=3)
    assert choose(elastic(cluster), cluster) == (2, 0.0)


def test_a_restart_waits_for_what_others_hold_but_not_for_nodes(cluster: Cluster) -> None:
    cluster.room = Room(free=4, whole=4)
    made = elastic(cluster)
    assert choose(made, cluster) == (4, 0.0)
    cluster.room = Room(free=2, whole=2)
    assert choose(made, cluster) == (2, 0.0)
    cluster.room = Room(free=1, whole=2)
    assert choose(made, cluster) == (1, WAIT_S)


def test_without_room_the_least_is_asked_for_with_the_whole_patience(cluster: Cluster) -> None:
    made = elastic(cluster)
    chosen = made.choose(sleep=cluster.sleep)
    assert (chosen.num_workers, chosen.start_timeout_s) == (1, 900.0)
    cluster.room = None  # the head does not answer
    assert choose(made, cluster) == (1, WAIT_S)


def test_a_start_that_has_room_does_not_wait_for_a_node_that_is_gone(cluster: Cluster) -> None:
    cluster.room = Room(free=4, whole=4)
    assert elastic(cluster).choose(sleep=cluster.sleep).start_timeout_s == 30.0
    short = elastic(cluster, start_timeout_s=5)
    assert short.choose(sleep=cluster.sleep).start_timeout_s == 5.0


def test_notice_ends_the_wait(cluster: Cluster) -> None:
    def give() -> None:
        raise NoticeError("SIGTERM")

    cluster.later = give
    with pytest.raises(NoticeError):
        choose(elastic(cluster), cluster)


def test_room_that_lasts_gives_notice_of_a_resize(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.room = Room(free=1, whole=1)
    cluster.groups = {"another's"}
    made = elastic(cluster)
    assert choose(made, cluster)[0] == 1
    cluster.groups = {"another's", "own"}
    cluster.room = Room(free=4, whole=4)
    cluster.now += 20
    with caplog.at_level(logging.INFO):
        assert made.look() is None
        cluster.now += GROW_S
        notice = made.look()
    assert notice is not None
    assert "resize from 1 to 4 train workers" in notice.reason
    assert cluster.own_asked[-1] == {"own"}
    assert caplog.text.count("resize from 1 to 4") == 1
    assert made.look() is notice  # a board that starts anew has forgotten it
    made.note_end("room")
    with caplog.at_level(logging.INFO):
        assert choose(made, cluster)[0] == 4
    assert "starting 4 train worker(s) of 1 to 4 (valid sizes: 1, 2, 4), before it 1: room" in (
        caplog.text
    )
    assert made.look() is None

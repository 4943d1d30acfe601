"""Starts and restarts of train workers, with what Ray would do written down as a script."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError

from fqgan_dist.config import load_config
from fqgan_dist.errors import NoticeError, NumericsError
from fqgan_dist.notice import NOTICES
from fqgan_dist.orchestration import elasticity, train_launch
from fqgan_dist.orchestration.config import TrainWorkersConfig
from fqgan_dist.orchestration.failures import StampedError, stamp_errors
from fqgan_dist.orchestration.free_room import Room
from fqgan_dist.orchestration.progress_board import HEARD_KEY, BoardActor
from fqgan_dist.orchestration.train_launch import launch_training
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.telemetry.notify import Notifier

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"

Look = Callable[[bool], None]
Start = Callable[[Look], None]
"""What one start of the workers does; it is given what `run_workers` calls now and then."""


class Observer:
    """The driver's end of a board, without Ray."""

    def __init__(self) -> None:
        self.board = BoardActor("run")

    def tell(self, name: str, value: Any) -> None:
        self.board.tell("tokenizer", name, value)

    def ask(self, name: str) -> Any:
        return self.board.ask("tokenizer", name)

    def exchange(self) -> io.StringIO:
        """Give something to close: no rank beats here."""
        return io.StringIO()


@pytest.fixture
def observer() -> Observer:
    return Observer()


@pytest.fixture(autouse=True)
def no_notice() -> Iterator[None]:
    yield
    NOTICES.clear()


@pytest.fixture
def train(
    observer: Observer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Launches a training whose starts do as told, one after another."""
    monkeypatch.setattr(train_launch, "wait_for_lost_nodes", lambda: None)
    config = load_config(TINY, [f"storage.root={tmp_path}"], RunConfig)

    def launch(*starts: Start) -> None:
        script = iter(starts)

        def run_workers(*_: Any, look: Look, **__: Any) -> None:
            next(script)(look)

        monkeypatch.setattr(train_launch, "run_workers", run_workers)
        arguments: dict[str, Any] = {"root": None, "observer": observer}
        launch_training(config, "tokenizer", notifier=Notifier("run"), **arguments)
        assert next(script, None) is None, "it was not started as often as expected"

    return launch


def stamped(error: Exception) -> StampedError:
    with pytest.raises(StampedError) as caught, stamp_errors():
        raise error
    return caught.value


def fail(*errors: Exception) -> Start:
    def start(_: Look) -> None:
        raise WorkerGroupError("several", dict(enumerate(map(stamped, errors))))

    return start


def finish(_: Look) -> None:
    pass


def test_ranks_that_were_given_notice_are_started_again_at_once(
    train: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        train(fail(NoticeError("Ray drains node 10.0.0.3")), finish)
    (said,) = [each for each in caplog.records if "starting again" in each.message]
    assert said.levelno == logging.INFO
    assert "planned restart: " in said.message
    assert "in 0 s" in said.message


def test_the_drivers_notice_is_passed_on_and_ends_the_training(
    train: Callable[..., None], observer: Observer
) -> None:
    def be_told(look: Look) -> None:
        look(False)
        assert observer.ask("notice") is None
        NOTICES.give("SIGTERM", 99.0)
        look(False)
        assert observer.ask("notice") == ("SIGTERM", 99.0)
        fail(NoticeError("the driver: SIGTERM"))(look)

    with pytest.raises(NoticeError, match="SIGTERM"):
        train(be_told)


def test_a_driver_without_workers_waits_for_nobody(train: Callable[..., None]) -> None:
    def be_told(look: Look) -> None:
        look(True)
        NOTICES.give("SIGTERM")
        look(True)

    with pytest.raises(NoticeError):
        train(be_told)


def test_a_group_of_another_run_that_waits_does_not_cut_off_a_save(
    train: Callable[..., None], observer: Observer
) -> None:
    def be_told(look: Look) -> None:
        observer.tell(HEARD_KEY, time.time() + 1)
        NOTICES.give("SIGTERM")
        look(True)
        assert observer.ask("notice") == ("SIGTERM", None)

    train(be_told)


def test_notice_hides_no_error(train: Callable[..., None]) -> None:
    def be_told(look: Look) -> None:
        NOTICES.give("SIGTERM")
        look(False)
        fail(NoticeError("the driver: SIGTERM"), NumericsError("loss is not finite"))(look)

    with pytest.raises(NumericsError):
        train(be_told)


def test_a_restart_begins_without_the_former_notice_and_with_its_times(
    train: Callable[..., None], observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def lack_room(look: Look) -> None:
        observer.tell("notice", ("SIGTERM", None))
        look(True)
        error = WorkerGroupStartupTimeoutError(2)
        raise ControllerError(error)

    def start(look: Look) -> None:
        assert observer.ask("notice") is None
        look(False)
        told.append(observer.ask("recovery"))

    monkeypatch.setattr(train_launch, "_sleep", lambda _: None)
    train(fail(NoticeError("drained")), lack_room, start)
    (times,) = told
    # The one wait of the policy, 5 s, and the time in which the group was pending.
    assert 5.0 <= times["capacity_s"] < 6.0
    assert times["ended_at"] <= times["detected_at"] <= times["asked_at"]


def look_for_a_while(look: Look, *, is_pending: bool) -> None:
    for _ in range(3):
        time.sleep(0.002)
        look(is_pending)


def test_room_that_lasts_gives_the_ranks_notice_and_starts_more_of_them(
    observer: Observer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rooms = [1, 2]
    sizes: list[int] = []
    monkeypatch.setattr(elasticity, "look_for_room", lambda *_: Room(free=rooms[0], whole=rooms[0]))
    monkeypatch.setattr(elasticity, "list_groups", lambda *_: set())

    def run_workers(
        _: Any, __: Any, workers: TrainWorkersConfig, *, look: Look, **___: Any
    ) -> None:
        sizes.append(workers.max_workers)
        look(False)
        assert observer.ask("recovery")["num_workers"] == sizes[-1]
        if sizes == [1]:
            rooms.pop(0)
            look_for_a_while(look, is_pending=False)
            assert observer.ask("notice") is None  # nobody trains yet
            observer.tell(HEARD_KEY, time.time() + 1)
            look_for_a_while(look, is_pending=True)
            assert observer.ask("notice") is None  # it may be another run's that waits
            deadline = time.monotonic() + 60
            while observer.ask("notice") is None and time.monotonic() < deadline:
                time.sleep(0.001)
                look(False)
            reason, _ = observer.ask("notice")
            assert reason.startswith("resize from 1 to 2 train workers")
            fail(NoticeError(f"the driver: {reason}"))(look)

    monkeypatch.setattr(train_launch, "run_workers", run_workers)
    settings = ("execution=ray", "ray.train.num_workers=[1,2]", "ray.train.grow_after_s=0.001")
    config = load_config(TINY, [f"storage.root={tmp_path}", *settings], RunConfig)
    arguments: dict[str, Any] = {"root": None, "observer": observer}
    with caplog.at_level(logging.INFO):
        launch_training(config, "tokenizer", notifier=Notifier("run"), **arguments)
    assert sizes == [1, 2]
    assert "planned restart: resize from 1 to 2 train workers" in caplog.text
    assert "starting 2 train worker(s) of 1 to 2 (valid sizes: 1, 2), before it 1" in caplog.text

"""The progress board: an actor that collects how far a run is, and the driver that shows it.

Whoever works is given a `RayObserver`, which sends its newest state at most once a second and never
waits for an answer; a board that is gone is no failure of the work. The actor keeps only what the
driver has not fetched, and sets the dashboard's gauges; the picture of the run is the driver's. So
an actor that dies and is started again by Ray costs a second of news. The other way it holds what
the driver tells the ranks (`tell`, `ask`).
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from fqgan_dist.orchestration.dashboard_metrics import RunGauges
from fqgan_dist.orchestration.heartbeats import (
    BoardExchange,
    StandstillBoard,
    StandstillWatch,
)
from fqgan_dist.telemetry.notify import Notifier
from fqgan_dist.telemetry.progress import ProgressBar
from fqgan_dist.telemetry.run_view import (
    MetricsUpdate,
    RunProgress,
    StageState,
    StageView,
    Update,
    WorkUpdate,
    show_run,
)
from fqgan_dist.telemetry.standstill import Heartbeat, Standstill
from fqgan_dist.waiting import WAITS, Wait

SEND_INTERVAL_S = 1.0

HEARD_KEY = "heard"
"""Under which the board tells when it heard of a stage's work for the last time, Unix seconds."""

_ANSWER_TIMEOUT_S = 5.0
# Messages that wait for a board which is being restarted; more are dropped.
_MAX_PENDING_CALLS = 100

logger = logging.getLogger(__name__)


def start_board(run_name: str, stages: Sequence[str], notifier: Notifier) -> ProgressBoard:
    """Start the board of a run on this process's node of the connected cluster.

    The run's name is the title of the view and the tag of the dashboard's metrics.
    """
    # Beside the driver: an actor on another node would keep it from being released.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = (
        ray.remote(BoardActor)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_pending_calls=_MAX_PENDING_CALLS,
            scheduling_strategy=here,
        )
        .remote(run_name)
    )
    return ProgressBoard(run_name, stages, actor, notifier)


class ProgressBoard:
    """The driver's side of the board; it lives as long as this process."""

    def __init__(
        self, run_name: str, stages: Sequence[str], actor: Any, notifier: Notifier
    ) -> None:
        self._run_name = run_name
        self._progress = RunProgress(stages)
        self._actor = actor
        self._notifier = notifier
        self._workers_wait_since: float | None = None
        self._is_silent = False
        self._standstills = StandstillWatch()
        self._standing_still: dict[str, str] = {}

    def observer(self, stage: str) -> RayObserver:
        """Give the observer of a stage's work; it may travel to any process of the cluster."""
        return RayObserver(self._actor, stage)

    def start_stage(self, stage: str) -> None:
        self._progress.start(stage)

    def finish_stage(self, stage: str, state: StageState) -> None:
        self._fetch()  # what it said last
        self._progress.finish(stage, state)

    def shown(self, console: Console | None = None) -> AbstractContextManager[None]:
        return show_run(self.stages, title=self._run_name, console=console)

    def stages(self) -> tuple[StageView, ...]:
        """Give the stages as of now, with what the driver waits for on behalf of those that run."""
        self._fetch()
        views, own = self._progress.stages(), WAITS.longest()
        self._notifier.watch(own or self._wait_of_workers(views))
        shown = (
            self._standing_still
            if own is None
            else dict.fromkeys((view.name for view in views), str(own))
        )
        return tuple(
            replace(view, driver_waiting=shown[view.name])
            if view.state == "running" and view.name in shown
            else view
            for view in views
        )

    def _wait_of_workers(self, views: Sequence[StageView]) -> Wait | None:
        texts = [view.waiting for view in views if view.state == "running" and view.waiting]
        if not texts:
            self._workers_wait_since = None
            return None
        self._workers_wait_since = self._workers_wait_since or time.time()
        return Wait(what=texts[0], since=self._workers_wait_since)

    def _fetch(self) -> None:
        try:
            news: BoardNews = ray.get(self._actor.take.remote(), timeout=_ANSWER_TIMEOUT_S)
        except RayError as error:
            if not self._is_silent:
                logger.warning("the progress board does not answer (%s)", type(error).__name__)
            self._is_silent = True
            return
        self._is_silent = False
        for update in news.updates:
            self._progress.apply(update)
        self._standing_still = self._standstills.look(news.standstills)


@dataclass(frozen=True)
class BoardNews:
    """What the driver takes from the board."""

    updates: list[Update]
    standstills: dict[str, list[Standstill]]
    """Those of now, by the group of an attempt or pool."""


class BoardActor:
    """Collects messages until the driver takes them; one process of the cluster."""

    def __init__(self, run_name: str) -> None:
        self._gauges = RunGauges(run_name)
        self._news: dict[str, Update] = {}
        self._told: dict[tuple[str, str], Any] = {}
        self._standstills = StandstillBoard()

    def tell(self, stage: str, name: str, value: Any) -> None:
        """Keep what the driver tells the ranks of a stage, until it is told anew."""
        self._told[stage, name] = value

    def ask(self, stage: str, name: str) -> Any:
        """Give what the driver has told them, None before."""
        return self._told.get((stage, name))

    def receive(self, updates: Sequence[Update]) -> None:
        """Take messages in; of the same work, or the same stage's metrics, the newest counts."""
        for update in updates:
            _put(self._news, update)
            self._told[update.stage, HEARD_KEY] = time.time()
            self._gauges.apply(update)

    def beat(self, heartbeat: Heartbeat) -> Standstill | None:
        """Take a heartbeat in and tell whether its group stands still."""
        return self._standstills.beat(heartbeat)

    def forget(self, group: str) -> None:
        """Forget the processes of an attempt that is over."""
        self._standstills.forget(group)

    def take(self) -> BoardNews:
        """Hand out what came since the last call, the oldest work first, and what stands still."""
        news, self._news = self._news, {}
        return BoardNews(list(news.values()), self._standstills.standstills())


class RayObserver:
    """An observer that tells the run's board; see `telemetry.observer.Observer`."""

    def __init__(self, actor: Any, stage: str) -> None:
        self._actor = actor
        self._stage = stage
        self._lock = threading.Lock()
        self._news: dict[str, Update] = {}
        self._num_open = 0

    def __reduce__(self) -> tuple[type[RayObserver], tuple[Any, str]]:
        return RayObserver, (self._actor, self._stage)

    def exchange(self) -> BoardExchange:
        """Begin the heartbeats of a new attempt, or pool, of this stage; the caller closes it."""
        return BoardExchange.of_stage(self._actor, self._stage)

    @contextmanager
    def track(self, total: int | None, description: str, unit: str) -> Iterator[ProgressBar]:
        bar, work_id = ProgressBar(total, description, unit), uuid.uuid4().hex
        stop = threading.Event()

        def tell() -> None:
            # Also what has not changed: a message to a board that is dying is lost, and nobody
            # says so.
            self._send(WorkUpdate(stage=self._stage, work_id=work_id, **vars(bar.state())))

        def report() -> None:
            tell()
            while not stop.wait(SEND_INTERVAL_S):
                tell()

        # A thread of its own: the work waits for nobody, and its last news are never left unsent
        # because a chunk takes long.
        thread = threading.Thread(target=report, name="progress", daemon=True)
        with self._lock:
            self._num_open += 1
        thread.start()
        try:
            yield bar
        finally:
            stop.set()
            thread.join(_ANSWER_TIMEOUT_S)
            tell()
            with self._lock:
                self._num_open -= 1

    def record_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        # They are sent with the next progress.
        update = MetricsUpdate(stage=stage, step=step, values=dict(values))
        with self._lock:
            _put(self._news, update)
            is_tracking = self._num_open > 0
        if not is_tracking:
            self._send(None)

    def tell(self, name: str, value: Any) -> None:
        """Tell the ranks of the stage something; the driver does, again and again while it holds.

        Nothing answers, and a board that starts anew has forgotten it.
        """
        if ray.is_initialized():
            try:
                self._actor.tell.remote(self._stage, name, value)
            except RayError as error:
                logger.debug("the progress board cannot be told: %s", error)

    def ask(self, name: str) -> Any:
        """Give what the driver has told the ranks; None: nothing, or the board does not answer."""
        if not ray.is_initialized():
            return None
        try:
            return ray.get(self._actor.ask.remote(self._stage, name), timeout=_ANSWER_TIMEOUT_S)
        except RayError:
            return None

    def _send(self, update: WorkUpdate | None) -> None:
        with self._lock:
            if update is not None:
                _put(self._news, update)
            news, self._news = self._news, {}
        # Asked for without a connection, Ray would start a cluster of its own.
        if not news or not ray.is_initialized():
            return
        try:
            self._actor.receive.remote(list(news.values()))
        except RayError as error:
            logger.debug("the progress board cannot be told: %s", error)


def _put(news: dict[str, Update], update: Update) -> None:
    """Keep the newest state of each work; metrics of a stage are merged name by name."""
    if isinstance(update, WorkUpdate):
        news[update.work_id] = update
        return
    key = f"metrics of {update.stage}"
    former = news.get(key)
    if isinstance(former, MetricsUpdate):
        # Training and validation metrics of one step come as two records.
        update = MetricsUpdate(
            stage=update.stage, step=update.step, values={**former.values, **update.values}
        )
    news[key] = update

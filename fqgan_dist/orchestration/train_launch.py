"""Launching the train workers of a stage with Ray Train, and again after a lost worker or node.

A worker group always starts whole: every attempt resumes from the newest checkpoint in the run's
storage, so nothing of an attempt that died is needed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from fqgan_dist.errors import LossError
from fqgan_dist.notice import NOTICES, Notice, watching
from fqgan_dist.orchestration import ray_train_configs
from fqgan_dist.orchestration.config import TrainWorkersConfig
from fqgan_dist.orchestration.elasticity import Elasticity
from fqgan_dist.orchestration.failures import (
    FailureReport,
    describe_loss,
    explain_failure,
    stamp_errors,
)
from fqgan_dist.orchestration.free_room import list_groups
from fqgan_dist.orchestration.nodes import wait_for_lost_nodes
from fqgan_dist.orchestration.notice_sources import NoticeOnSignal, sources_for, tell_notice
from fqgan_dist.orchestration.progress_board import HEARD_KEY, RayObserver
from fqgan_dist.orchestration.restart_policy import RestartPolicy
from fqgan_dist.orchestration.shared_root import SharedRoot
from fqgan_dist.orchestration.watched_training import run_watched
from fqgan_dist.recovery import RECOVERY, DriverTimes
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.placement import valid_sizes
from fqgan_dist.stages.train import train_stage
from fqgan_dist.stages.training_stage import find_trainings
from fqgan_dist.storage.scratch import ScratchFolder
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.notify import Notifier
from fqgan_dist.training.commit_log import CommitLog
from fqgan_dist.waiting import WAITS, apply_patience
from fqgan_dist.world import World

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_SHORTAGE_WARNING_S = 30.0
_WARNING_INTERVAL_S = 300.0
_TIMES_KEY = "recovery"


def launch_training(
    config: RunConfig, stage: str, *, root: SharedRoot, observer: RayObserver, notifier: Notifier
) -> None:
    """Train a stage to the end on the cluster's train workers.

    Raises:
        FqganError: the run's own error, of the rank where it came first; it is not retried.
        NoticeError: the driver was given notice; the ranks have saved, if they could.
        PassingError: what was waited for did not come; exit code 75.
        ClusterError: it failed too often for reasons that nobody knows.
    """
    launch = _Launch(config, stage, root=root, observer=observer, notifier=notifier)
    with NOTICES.heeded():
        while not launch.run_once():
            pass


class _Launch:
    """The starts of one stage's training, one after another."""

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        *,
        root: SharedRoot,
        observer: RayObserver,
        notifier: Notifier,
    ) -> None:
        self._config = config
        self._stage = stage
        self._root = root
        self._observer = observer
        self._notifier = notifier
        log = CommitLog(Storage(config.storage.root).child(f"{stage}/checkpoints"))
        self._policy = RestartPolicy(
            stage,
            max_failures=config.ray.train.max_failures,
            patience=config.patience,
            newest_commit=log.newest_commit,
        )
        sizes = valid_sizes(config, find_trainings(config)[stage])
        self._elasticity = Elasticity(stage, config.ray.train, sizes)
        self._workers = config.ray.train
        self._times = DriverTimes()
        self._looked_at = self._began_at = 0.0
        self._has_told = False

    def run_once(self) -> bool:
        """Start the workers; gives whether they trained to the end, and waits if they did not."""
        arguments: dict[str, Any] = {
            "config": self._config,
            "stage": self._stage,
            "root": self._root,
            "observer": self._observer,
        }
        began = time.monotonic()
        tell_notice(self._observer, None)
        if self._times.detected_at is not None and self._times.asked_at is None:
            self._times.asked_at = time.time()
        self._workers = self._elasticity.choose(sleep=_sleep)
        now = time.monotonic()
        self._times.capacity_s += now - began
        self._times.num_workers = self._workers.max_workers
        self._looked_at, self._began_at = now, time.time()
        try:
            with closing(self._observer.exchange()) as exchange:
                arguments["exchange"] = exchange
                run_workers(
                    _train_worker,
                    arguments,
                    self._workers,
                    name=f"{self._config.name}-{self._stage}",
                    callbacks=[NoticeOnSignal(self._config.termination.grace_s)],
                    look=self._look,
                )
        except RayActorError as error:
            # Its placement group would stay, and hold the resources, as long as this process does.
            raise LossError(
                f"{self._stage}: the process that controls the train workers was lost "
                f"({describe_loss(error)}) - look at the memory of the driver's node - the same "
                f"command continues from the newest checkpoint"
            ) from error
        except TrainingFailedError as error:
            self._prepare_restart(explain_failure(error), error, began)
            return False
        return True

    def _prepare_restart(self, report: FailureReport, error: Exception, began: float) -> None:
        if report.cause == "permanent":
            raise report.error from error
        NOTICES.raise_if_given()
        if report.cause != "capacity":
            now = time.time()
            ended_at = report.time or self._observer.ask(HEARD_KEY)
            self._times = DriverTimes(ended_at=ended_at, detected_at=now)
        text = report.text
        is_planned = report.cause == "notice"
        if report.cause == "capacity":
            text = _describe_shortage(self._workers, self._config.ray.train)
        elif is_planned and (notice := self._elasticity.notice):
            text = f"{notice.reason} ({text})"
        self._elasticity.note_end(text)
        wait_s = self._policy.wait_after(report.cause, text, began=began)
        if report.cause == "capacity":
            self._times.capacity_s += wait_s
        logger.log(
            logging.INFO if is_planned else logging.WARNING,
            "%s: %s%s; starting again from the newest checkpoint in %.0f s (%s)",
            self._stage,
            "planned restart: " if is_planned else "",
            text,
            wait_s,
            self._policy.describe(report.cause),
        )
        self._notifier.tell("restart", f"{self._stage}: {text}")
        with WAITS.during(f"the next start of the train workers: {text}"):
            _sleep(wait_s)
            # Of a range, a group that there seemed to be room for may wait for a node that is gone.
            if report.cause == "loss" or (report.cause == "capacity" and self._elasticity.is_on):
                wait_for_lost_nodes()

    def _look(self, is_pending: bool) -> None:
        """Pass on what the ranks should know; called now and then while they run."""
        now = time.monotonic()
        since_s, self._looked_at = now - self._looked_at, now
        self._times.capacity_s += since_s if is_pending else 0.0
        self._observer.tell(_TIMES_KEY, self._times.to_json())
        if notice := NOTICES.given():
            if is_pending and not self._is_under_way():
                NOTICES.raise_if_given()  # there is nobody who could save anything
            if not self._has_told:
                logger.warning(
                    "%s: %s: the train workers finish their step and save",
                    self._stage,
                    notice.reason,
                )
            self._has_told = True
            tell_notice(self._observer, notice)
        elif notice := self._look_for_growth(is_pending):
            tell_notice(self._observer, notice)

    def _look_for_growth(self, is_pending: bool) -> Notice | None:
        """Give the notice of a growth, again and again once it is decided."""
        if not self._elasticity.is_on or is_pending or not self._is_under_way():
            return None
        return self._elasticity.look()

    def _is_under_way(self) -> bool:
        """Whether ranks of this start train: a group that is pending may be another run's."""
        heard_at = self._observer.ask(HEARD_KEY)
        return heard_at is not None and heard_at > self._began_at


def _sleep(seconds: float) -> None:
    """Sleep, and end by notice."""
    deadline = time.monotonic() + seconds
    while (left_s := deadline - time.monotonic()) > 0:
        NOTICES.raise_if_given()
        time.sleep(min(left_s, _POLL_S))


def run_workers(
    train_fn: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    workers: TrainWorkersConfig,
    *,
    name: str,
    callbacks: Sequence[RayTrainCallback] = (),
    look: Callable[[bool], None] = lambda _: None,
) -> None:
    """Run a function once on every rank of a group of train workers, which is started for it.

    The function is in a process group with all ranks; its arguments must be picklable; `name`
    stands in Ray's own views. `look` is called again and again until the group ends, with whether
    it still waits for its resources.

    Raises:
        TrainingFailedError: a rank failed, or the group did not start.
        RayActorError: the process that controls the group was lost.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(workers.start_timeout_s)
    os.environ.update(ray_train_configs.ENVIRONMENT)
    with ScratchFolder("ray-train") as scratch:
        trainer = _Trainer(
            train_fn,
            train_loop_config=arguments,
            torch_config=ray_train_configs.torch_config(workers),
            scaling_config=ray_train_configs.scaling_config(workers),
            run_config=ray_train_configs.run_config(name, scratch, callbacks),
        )
        _fit_in_thread(trainer, workers, look)


class _Trainer(TorchTrainer):
    """Ray's trainer without the process that watches over its placement group.

    That process asks the State API of whatever Ray started last on its node whether the controller
    lives. Where several run, it asks a stranger, who knows of none, and takes the workers'
    resources away in the middle of training (Ray 2.60). It is needed where a controller dies and
    its driver does not: ours ends then, and its job's groups with it.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, PlacementGroupCleanerCallback)
        ]


def _fit_in_thread(
    trainer: TorchTrainer, workers: TrainWorkersConfig, look: Callable[[bool], None]
) -> None:
    # Where `fit` installs no handler of Ctrl-C: Ray's turns an interrupted training into a finished
    # one.
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    with _tell_of_shortage(workers) as look_for_shortage:
        while thread.is_alive():
            thread.join(_POLL_S)
            look(look_for_shortage())
    if errors:
        raise errors[0]


@contextmanager
def _tell_of_shortage(workers: TrainWorkersConfig) -> Iterator[Callable[[], bool]]:
    """Give what is called now and then, and says for how long resources have been missing.

    It gives whether they are.
    """
    number: int | None = None
    began = warned_at = 0.0

    def look() -> bool:
        nonlocal number, began, warned_at
        is_pending = _has_pending_group(workers)
        now = time.monotonic()
        if is_pending and number is None:
            number, began, warned_at = WAITS.begin("the train workers' resources"), now, 0.0
        elif not is_pending and number is not None:
            WAITS.end(number)
            number = None
        is_long = number is not None and now - began >= _SHORTAGE_WARNING_S
        if is_long and (not warned_at or now - warned_at >= _WARNING_INTERVAL_S):
            warned_at = now
            logger.warning(
                "the train workers wait for resources since %.0f s; an autoscaler may bring "
                "them: look at `ray status`",
                now - began,
            )
        return is_pending

    try:
        yield look
    finally:
        if number is not None:
            WAITS.end(number)


def _has_pending_group(workers: TrainWorkersConfig) -> bool:
    """Whether a group as the train workers want it waits; Ray does not say whose it is."""
    return bool(list_groups(workers, "PENDING"))


def _train_worker(arguments: dict[str, Any]) -> None:
    # Ray Train has set this rank's variables and joined the process group.
    root: SharedRoot = arguments["root"]
    config: RunConfig = arguments["config"]
    if config.ray.train.gpus == 0:
        # Ray 2.60 hides no GPU from who has reserved none: `device: auto` would take one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    apply_patience(config.patience)
    world = World.from_environment()
    observer: RayObserver = arguments["observer"]
    RECOVERY.begin(lambda: _ask_for_times(observer))
    with watching(sources_for(world, observer)), stamp_errors():
        root.check()
        train = partial(train_stage, config, arguments["stage"], world, observer=observer)
        run_watched(train, config.watchdog, arguments["exchange"])


def _ask_for_times(observer: RayObserver) -> DriverTimes | None:
    told = observer.ask(_TIMES_KEY)
    return None if told is None else DriverTimes.from_json(told)


def _describe_shortage(workers: TrainWorkersConfig, configured: TrainWorkersConfig) -> str:
    if workers.start_timeout_s < configured.start_timeout_s:
        return (
            f"{workers.max_workers} train workers did not start within "
            f"{workers.start_timeout_s:g} s, though there was room for them - it is looked for anew"
        )
    return (
        f"{workers.max_workers} train workers of {workers.cpus:g} CPUs and {workers.gpus:g} GPUs "
        f"did not start within ray.train.start_timeout_s ({workers.start_timeout_s:g} s) - look at "
        f"`ray status` for what the cluster has, lower ray.train.num_workers, or let it grow"
    )

"""Launching the train workers of a stage with Ray Train, and again after a lost worker or node.

A worker group always starts whole: every attempt resumes from the newest checkpoint in the run's
storage, so nothing of an attempt that died is needed.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from fqgan_dist.errors import ClusterError
from fqgan_dist.orchestration.config import TrainWorkersConfig
from fqgan_dist.orchestration.failures import (
    describe_loss,
    explain_failure,
    is_loss,
    stamp_errors,
)
from fqgan_dist.orchestration.shared_root import SharedRoot
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.train import train_stage
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.world import World

logger = logging.getLogger(__name__)

# Ray needs some seconds to notice which nodes are gone.
_RETRY_WAIT_S = 5.0


def launch_training(config: RunConfig, stage: str, *, root: SharedRoot, observer: Observer) -> None:
    """Train a stage to the end on the cluster's train workers.

    Raises:
        FqganError: the run's own error, of the rank where it came first; it is not retried.
        ClusterError: there was no room for the workers, or they were lost too often.
    """
    workers = config.ray.train
    arguments = {"config": config, "stage": stage, "root": root, "observer": observer}
    failures = 0
    while True:
        try:
            run_workers(_train_worker, arguments, workers, name=f"{config.name}-{stage}")
            return
        except RayActorError as error:
            raise ClusterError(
                f"{stage}: the process that controls the train workers was lost "
                f"({describe_loss(error)}) - look at the memory of the driver's node - the same "
                f"command continues from the newest checkpoint"
            ) from error
        except TrainingFailedError as error:
            if isinstance(error, ControllerError) and not is_loss(error):
                raise _explain_no_start(error, workers) from error
            report = explain_failure(error)
            if report.is_permanent:
                raise report.error from error
            failures += 1
            if failures > workers.max_failures:
                raise ClusterError(
                    f"{stage}: the train workers were lost {failures} times "
                    f"(ray.train.max_failures: {workers.max_failures}); the last time: "
                    f"{report.text} - the same command continues from the newest checkpoint"
                ) from error
            logger.warning(
                "%s: %s; restarting from the newest checkpoint (failure %d of %d allowed)",
                stage,
                report.text,
                failures,
                workers.max_failures,
            )
            time.sleep(_RETRY_WAIT_S)


def run_workers(
    train_fn: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    workers: TrainWorkersConfig,
    *,
    name: str,
) -> None:
    """Run a function once on every rank of a group of train workers, which is started for it.

    The function is in a process group with all ranks; its arguments must be picklable; `name`
    stands in Ray's own views.

    Raises:
        TrainingFailedError: a rank failed, or the group did not start.
        RayActorError: the process that controls the group was lost.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(workers.start_timeout_s)
    # Workers stay in the folder that they started in: paths of a config are relative to it.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    # Its watcher starts one more process and its messages name Ray's internals.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    with tempfile.TemporaryDirectory(prefix="fqgan-ray-train-") as scratch:
        trainer = _Trainer(
            train_fn,
            train_loop_config=arguments,
            torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers.num_workers,
                use_gpu=workers.gpus > 0,
                resources_per_worker=workers.amounts,
                placement_strategy=workers.placement,
            ),
            # Nothing is reported: checkpoints are ours, and each report would cost seconds.
            run_config=RayRunConfig(
                name=name,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                # It would print a failure several times; the driver tells its cause, once.
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        _fit_in_thread(trainer)


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


def _fit_in_thread(trainer: TorchTrainer) -> None:
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
    thread.join()
    if errors:
        raise errors[0]


def _train_worker(arguments: dict[str, Any]) -> None:
    # Ray Train has set this rank's variables and joined the process group.
    root: SharedRoot = arguments["root"]
    config: RunConfig = arguments["config"]
    if config.ray.train.gpus == 0:
        # Ray 2.60 hides no GPU from who has reserved none: `device: auto` would take one.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with stamp_errors():
        root.check()
        train_stage(
            config,
            arguments["stage"],
            World.from_environment(),
            observer=arguments["observer"],
        )


def _explain_no_start(error: ControllerError, workers: TrainWorkersConfig) -> ClusterError:
    return ClusterError(
        f"{workers.num_workers} train workers of {workers.cpus:g} CPUs and {workers.gpus:g} GPUs "
        f"did not start within ray.train.start_timeout_s ({workers.start_timeout_s:g} s): "
        f"{error.controller_failure} - look at `ray status` for what the cluster has, lower "
        f"ray.train.num_workers, or let it grow"
    )

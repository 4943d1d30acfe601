"""The settings that Ray Train is given: every one that decides something, by our failure policy.

Ray restarts nothing by itself (`restart_policy` does), keeps no checkpoints (`training` does), and
prints nothing (the driver says why a training ended, once). A test holds the fields of Ray's own
classes against this module, so that one that a new Ray brings is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.callback import RayTrainCallback

from fqgan_dist.loss_group import RANK_TIMEOUT
from fqgan_dist.orchestration.config import TrainWorkersConfig

POLL_S = 1.0
"""How often Ray Train looks at its workers, which is how late it may know of an end."""

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
    # Workers stay in the folder that they started in: paths of a config are relative to it.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Whoever is given notice is asked by the ranks themselves (`notice_sources`). Once Ray's own
    # watcher knows of a drained node, its controller hides how the ranks end until the node's
    # deadline has passed: minutes, where a save takes seconds.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def scaling_config(workers: TrainWorkersConfig) -> ScalingConfig:
    """Ask for the workers; all at once, and no other number while they run.

    A range is never Ray's to decide about: its own policy starts a group as large as what it counts
    right after a death, and waits out the start's whole limit for a node that is gone.
    """
    assert not workers.is_elastic, "the driver chooses the size of each start"
    return ScalingConfig(
        num_workers=workers.max_workers,
        use_gpu=workers.gpus > 0,
        resources_per_worker=workers.amounts,
        placement_strategy=workers.placement,
    )


def torch_config(workers: TrainWorkersConfig) -> TorchConfig:
    """Join the ranks as `training.process_group` does without Ray."""
    return TorchConfig(
        backend="nccl" if workers.gpus else "gloo",
        init_method="env",
        timeout_s=int(RANK_TIMEOUT.total_seconds()),
    )


def failure_config() -> FailureConfig:
    """Let every end of a group, of whatever cause, be the end of `fit`."""
    return FailureConfig(
        max_failures=0,
        controller_failure_limit=0,
        # -1 unless told: the loss of a drained node would restart the group inside `fit`, unsaid
        # and uncounted, and so would a rank's own error beside it.
        max_preemption_failures=0,
        # Both of Ray's own collectives and watcher, which are not used.
        relax_collectives_on_preemption=False,
        preemption_grace_s=0.0,
    )


def run_config(name: str, folder: str, callbacks: Sequence[RayTrainCallback]) -> RayRunConfig:
    """Describe a run of which Ray keeps nothing; `folder` is for what it writes all the same."""
    return RayRunConfig(
        name=name,
        # Nothing is reported: checkpoints are ours, and each report would cost seconds.
        storage_path=folder,
        checkpoint_config=CheckpointConfig(),
        failure_config=failure_config(),
        # It would print a failure several times; the driver tells its cause, once.
        logging_config=LoggingConfig(log_level="CRITICAL"),
        callbacks=list(callbacks),  # pyright: ignore[reportArgumentType]  it takes all its own kinds
    )

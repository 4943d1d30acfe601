"""Ray's settings: one that a new version brings is looked at before it decides anything."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from fqgan_dist.loss_group import RANK_TIMEOUT
from fqgan_dist.orchestration import ray_train_configs
from fqgan_dist.orchestration.config import TrainWorkersConfig

LOOKED_AT: dict[type[Any], dict[str, str]] = {
    FailureConfig: {
        "max_failures": "set",
        "fail_fast": "Ray refuses it",
        "controller_failure_limit": "set",
        "max_preemption_failures": "set",
        "relax_collectives_on_preemption": "set",
        "preemption_grace_s": "set",
    },
    ScalingConfig: {
        "num_workers": "set; one number, so that Ray resizes nothing",
        "use_gpu": "set",
        "resources_per_worker": "set",
        "placement_strategy": "set",
        "trainer_resources": "Ray refuses it",
        "accelerator_type": "a custom resource says it",
        "label_selector": "a custom resource says it",
        "use_tpu": "no TPUs",
        "topology": "of TPUs",
        "elastic_resize_monitor_interval_s": "of a range of workers only",
    },
    RunConfig: {
        "name": "set",
        "storage_path": "set",
        "storage_filesystem": "nothing is kept",
        "failure_config": "set",
        "checkpoint_config": "set; nothing is reported",
        "callbacks": "set",
        "worker_runtime_env": "the job's own holds for its workers",
        "logging_config": "set",
        "sync_config": "Ray refuses it",
        "verbose": "Ray refuses it",
        "stop": "Ray refuses it",
        "progress_reporter": "Ray refuses it",
        "log_to_file": "Ray refuses it",
    },
    TorchConfig: {"backend": "set", "init_method": "set", "timeout_s": "set"},
    LoggingConfig: {"log_level": "set"},
    CheckpointConfig: {
        "num_to_keep": "nothing is reported",
        "checkpoint_score_attribute": "nothing is reported",
        "checkpoint_score_order": "nothing is reported",
        "checkpoint_frequency": "Ray refuses it",
        "checkpoint_at_end": "Ray refuses it",
    },
}


@pytest.mark.parametrize("config", LOOKED_AT, ids=lambda config: config.__name__)
def test_every_field_was_looked_at(config: type[Any]) -> None:
    """Where this fails, decide about the new field in `ray_train_configs`, then name it here."""
    assert {field.name for field in fields(config)} == set(LOOKED_AT[config])


def test_ray_restarts_nothing_by_itself() -> None:
    config = ray_train_configs.failure_config()
    assert config.max_failures == 0
    assert config.controller_failure_limit == 0
    assert config.max_preemption_failures == 0
    assert not config.relax_collectives_on_preemption
    assert config.preemption_grace_s == 0


def test_ranks_wait_for_each_other_as_long_as_without_ray() -> None:
    config = ray_train_configs.torch_config(TrainWorkersConfig())
    assert config.timeout_s == RANK_TIMEOUT.total_seconds()


def test_ray_watches_no_preemption_and_changes_no_folder() -> None:
    assert ray_train_configs.ENVIRONMENT["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"
    assert ray_train_configs.ENVIRONMENT["RAY_CHDIR_TO_TRIAL_DIR"] == "0"

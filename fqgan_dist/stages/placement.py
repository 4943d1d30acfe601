"""Where the processes of a run would be: train workers and pools, and what they reserve."""

from __future__ import annotations

from typing import Any

from fqgan_dist.orchestration.config import PoolConfig, ProcessResources
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import find_stages
from fqgan_dist.stages.training_stage import TrainingStage
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.step_layout import can_share


def configured_sizes(config: RunConfig) -> range:
    """Return the numbers of train workers that `fqgan run` may start, valid or not."""
    if config.execution != "ray":
        return range(1, 2)
    return range(config.ray.train.min_workers, config.ray.train.max_workers + 1)


def valid_sizes(config: RunConfig, training: TrainingConfig) -> list[int]:
    """List those of them that can share a step of a training, ascending."""
    return [size for size in configured_sizes(config) if can_share(training, size)]


def planned_sizes(config: RunConfig) -> dict[str, list[int]]:
    """Give the valid sizes of each stage of the run that trains; of settings that were checked."""
    return {
        stage.name: valid_sizes(config, stage.training(config)) for stage in training_stages(config)
    }


def least_size(config: RunConfig) -> int:
    """Return how many train workers there must be room for, so that every stage can train."""
    sizes = planned_sizes(config).values()
    return max((each[0] for each in sizes if each), default=config.ray.train.min_workers)


def training_stages(config: RunConfig) -> list[type[TrainingStage]]:
    return [stage for stage in find_stages(config) if issubclass(stage, TrainingStage)]


def used_pools(config: RunConfig) -> dict[str, PoolConfig]:
    return {
        stage.name: config.ray.pool(stage.pool)
        for stage in find_stages(config)
        if stage.uses_pool(config)
    }


def plan_placement(config: RunConfig) -> dict[str, Any]:
    """Say which processes a run starts and what they reserve; JSON-able."""
    match config.execution:
        case "local":
            return {
                "execution": "local",
                "processes": 1,
                "device": config.device,
                "description": "every stage in this process, one after the other; a step runs its "
                "micro-batches in turn",
            }
        case "ray":
            return _place_on_cluster(config)


def _place_on_cluster(config: RunConfig) -> dict[str, Any]:
    train, pools = config.ray.train, used_pools(config)
    does_train = bool(training_stages(config))
    sizes = planned_sizes(config)
    most = max((max(each) for each in sizes.values() if each), default=train.max_workers)
    workers = [(most, train)] if does_train else []
    # Stages follow each other, so the largest of them is what the cluster must have.
    groups = [*workers, *((pool.max_actors, pool) for pool in pools.values())]
    return {
        "execution": "ray",
        "processes": max((count for count, _ in groups), default=0),
        "device": config.device,
        "description": "stages one after the other; training on its workers, chunks on pools of "
        "actors, the report in the driver",
        "train_workers": {
            "count": most,
            "valid_sizes": sizes,
            **_describe(train),
            "strategy": train.placement,
            "max_failures": train.max_failures,
        }
        if does_train
        else None,
        "pools": {
            stage: {
                "min_actors": pool.min_actors,
                "max_actors": pool.max_actors,
                **_describe(pool),
                "max_failures_per_chunk": pool.max_failures_per_chunk,
            }
            for stage, pool in pools.items()
        },
        "most_at_a_time": {
            "cpus": max((count * resources.cpus for count, resources in groups), default=0.0),
            "gpus": max((count * resources.gpus for count, resources in groups), default=0.0),
        },
    }


def find_device_conflicts(config: RunConfig) -> list[str]:
    """Compare `device` with the GPUs that processes reserve: Ray hides all others from them."""
    if config.execution != "ray" or config.device == "auto":
        return []
    reserved = {
        f"ray.pools.{stage.pool}": config.ray.pool(stage.pool).gpus
        for stage in find_stages(config)
        if stage.uses_pool(config) and stage.uses_device
    }
    if training_stages(config):
        reserved["ray.train"] = config.ray.train.gpus
    wants_gpu = config.device == "cuda"
    return [
        f"{field}.gpus: {gpus:g} with device: {config.device!r}; expected "
        f"{'more than 0, as Ray hides GPUs that are not reserved' if wants_gpu else '0'}: change "
        "it, or device=auto"
        for field, gpus in reserved.items()
        if bool(gpus) != wants_gpu
    ]


def _describe(resources: ProcessResources) -> dict[str, Any]:
    return {
        "cpus_each": resources.cpus,
        "gpus_each": resources.gpus,
        "custom_each": dict(resources.custom),
    }

"""The stages on a Ray cluster: train workers and actor pools; what is left runs in the driver."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import ray
import torch

from fqgan_dist.chunks import ChunkWork, RunChunks, run_in_processes
from fqgan_dist.errors import ClusterError, ConfigError
from fqgan_dist.notice import watching
from fqgan_dist.orchestration.cluster import connected_cluster, is_attached
from fqgan_dist.orchestration.config import ProcessResources
from fqgan_dist.orchestration.notice_sources import DrainNotice
from fqgan_dist.orchestration.pipeline import (
    finish,
    open_checked_run,
    run_stage_here,
    run_stages,
)
from fqgan_dist.orchestration.pool_actor import PoolWatch
from fqgan_dist.orchestration.pools import open_pool
from fqgan_dist.orchestration.progress_board import ProgressBoard, start_board
from fqgan_dist.orchestration.shared_root import SharedRoot, shared_root
from fqgan_dist.orchestration.train_launch import launch_training
from fqgan_dist.stages.config import RunConfig, StorageConfig
from fqgan_dist.stages.placement import least_size, training_stages, used_pools
from fqgan_dist.stages.run import run_stage
from fqgan_dist.stages.stage import Stage
from fqgan_dist.stages.summary import Summary
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.notify import Notifier
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.telemetry.run_view import StageState
from fqgan_dist.termination import clean_termination
from fqgan_dist.waiting import patient

logger = logging.getLogger(__name__)

# Ray unpacks a job's `working_dir` below a folder of this name, and deletes it some day.
_JOB_FOLDER = "working_dir_files"
_CPU = torch.device("cpu")


def run_on_cluster(config: RunConfig, notifier: Notifier) -> Summary:
    """Run the configured stages on the cluster of RAY_ADDRESS, or on a Ray started here.

    Raises:
        ConfigError: the storage root is relative to a place that will not last.
        ClusterError: the cluster cannot be joined, does not share the storage root, or cannot run
            the job.
        FqganError: an input is wrong, or a stage failed; what was finished before stays.
    """
    config = with_absolute_root(config)
    # The GPUs are the workers'; the head of a cluster often has none.
    context = open_checked_run(config, device=_CPU)
    # From here on: a storage that was never found is a mistake, not an outage.
    with (
        patient(config.patience),
        connected_cluster(config.ray),
        clean_termination(config.termination.grace_s),
        watching([DrainNotice()]),
    ):
        if not is_attached():
            check_room(config, ray.cluster_resources())
        with shared_root(context.storage) as root:
            board = start_board(config.name, config.stages, notifier)
            with board.shown():
                run_stages(
                    context,
                    lambda stage: _run_stage(stage, root, board, notifier),
                    note_skipped=lambda stage: board.finish_stage(stage.name, "skipped"),
                )
    return finish(context)


def _run_stage(stage: Stage, root: SharedRoot, board: ProgressBoard, notifier: Notifier) -> None:
    board.start_stage(stage.name)
    observer = board.observer(stage.name)
    stage = type(stage)(replace(stage.context, observer=observer))
    config = stage.context.config
    state: StageState = "failed"
    try:
        match stage.runs_in:
            case "train_workers":
                launch_training(config, stage.name, root=root, observer=observer, notifier=notifier)
                stage.context.read(stage.output)
            case "pool":
                pool = config.ray.pool(stage.pool)
                with (
                    closing(observer.exchange()) as exchange,
                    open_pool(
                        stage.name,
                        pool,
                        observer=observer,
                        check_node=root.check,
                        patience=config.patience,
                        watch=PoolWatch(config.watchdog, exchange),
                    ) as run_chunks,
                ):
                    run_stage(stage, partial(_run_chunks, in_pool=run_chunks, observer=observer))
            case "driver":
                run_stage_here(stage)
        state = "done"
    finally:
        board.finish_stage(stage.name, state)


def _run_chunks(work: ChunkWork, *, in_pool: RunChunks, observer: Observer) -> None:
    """Process work in a pool, or in the driver where no other node can read its inputs."""
    # A Ray that was started here has all of its processes on this machine.
    if is_attached() and work.local_reason is not None:
        logger.warning("%s: the driver does it alone: %s", work.description, work.local_reason)
        run_in_processes(work, observer=observer)
    else:
        in_pool(work)


def with_absolute_root(config: RunConfig) -> RunConfig:
    """Name a local root so that all processes of the cluster find it.

    Raises:
        ConfigError: it is relative to a place that will not last.
    """
    storage = Storage(config.storage.root)
    if not storage.is_local:
        return config
    root = Path(storage.root).absolute()
    if is_attached() and _JOB_FOLDER in root.parts:
        raise ConfigError(
            f"storage.root: {config.storage.root!r} lies in the job's own copy of its working "
            f"directory, which Ray deletes; use an s3:// URI or an absolute path that all nodes see"
        )
    return config.model_copy(update={"storage": StorageConfig(root=str(root))})


def check_room(config: RunConfig, total: Mapping[str, float]) -> None:
    """Check a Ray that cannot grow; on a cluster the autoscaler may bring what is missing.

    Raises:
        ClusterError: train workers, or not even one actor of a pool, do not fit.
    """
    train = config.ray.train
    wanted: list[tuple[str, int, ProcessResources]] = []
    if training_stages(config):
        least = least_size(config)  # a larger group is started where there is room for it
        wanted.append((f"ray.train: {least} train workers", least, train))
    for name, pool in used_pools(config).items():
        wanted.append((f"ray.pools.{name}: one actor", 1, pool))
    problems = [
        f"{who}: needed are {', '.join(missing)}"
        for who, count, reserve in wanted
        if (missing := _find_missing(reserve, count, total))
    ]
    if problems:
        raise ClusterError(
            f"{'; '.join(problems)} of this machine - expected that they fit - lower what is "
            f"reserved or ray.train.num_workers, raise ray.local_cpus, or set RAY_ADDRESS to a "
            f"cluster"
        )


def _find_missing(reserve: ProcessResources, count: int, total: Mapping[str, float]) -> list[str]:
    return [
        f"{amount * count:g} {name} (has {total.get(name, 0):g})"
        for name, amount in reserve.amounts.items()
        if amount * count > total.get(name, 0)
    ]

"""Run a pipeline in this process or on a Ray cluster.

The driver is idempotent: all it knows is in the run's storage root, so running it again is how a
run resumes, whatever killed it (design.md section 1).
"""

from __future__ import annotations

import os

from fqgan_dist.errors import ConfigError
from fqgan_dist.orchestration.authentication import ADDRESS_VARIABLE, require_token
from fqgan_dist.orchestration.pipeline import (
    finish,
    open_checked_run,
    run_stage_here,
    run_stages,
)
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.summary import Summary
from fqgan_dist.stages.train import join_ranks
from fqgan_dist.telemetry.log_files import publish_log
from fqgan_dist.world import World


def run_pipeline(config: RunConfig) -> Summary:
    """Run the configured stages and return the summary.

    Raises:
        ConfigError: a launcher started several processes of it.
        ClusterError: the cluster cannot run the job.
        FqganError: an input is wrong, a stage was made from other inputs, or a stage failed; what
            was finished before stays.
    """
    launched = World.from_environment()
    if launched.world_size > 1:
        raise ConfigError(
            f"`fqgan` is one driver process, and a launcher started {launched.world_size}; train "
            f"with python -m fqgan_dist.training.run CONFIG stage=..."
        )
    try:
        return _run_on_cluster(config) if config.execution == "ray" else _run_here(config)
    finally:
        publish_log()


def _run_on_cluster(config: RunConfig) -> Summary:
    if not os.environ.get(ADDRESS_VARIABLE):
        require_token()
    # Ray is imported here only, so that a run in one process needs none.
    from fqgan_dist.orchestration.ray_driver import run_on_cluster

    return run_on_cluster(config)


def _run_here(config: RunConfig) -> Summary:
    context = open_checked_run(config)
    with join_ranks(config, context.world):
        run_stages(context, run_stage_here)
    return finish(context)

"""Run a pipeline in this process or on a Ray cluster.

The driver is idempotent: all it knows is in the run's storage root, so running it again is how a
run resumes, whatever killed it (design.md section 1).
"""

from __future__ import annotations

import os

from fqgan_dist.ec2_notice import Ec2Notice, is_on_ec2
from fqgan_dist.errors import ConfigError, FqganError
from fqgan_dist.notice import watching
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
from fqgan_dist.telemetry.notify import Notifier
from fqgan_dist.termination import clean_termination
from fqgan_dist.training.heartbeats import watched_rank
from fqgan_dist.waiting import patient
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
    notifier = Notifier(config.name)
    try:
        if config.execution == "ray":
            summary = _run_on_cluster(config, notifier)
        else:
            summary = _run_here(config)
    except FqganError as error:
        notifier.tell("end", f"{type(error).__name__}: {error}")
        raise
    else:
        notifier.tell("end", "done")
        return summary
    finally:
        publish_log()
        notifier.close()


def _run_on_cluster(config: RunConfig, notifier: Notifier) -> Summary:
    if not os.environ.get(ADDRESS_VARIABLE):
        require_token()
    # Ray is imported here only, so that a run in one process needs none.
    from fqgan_dist.orchestration.ray_driver import run_on_cluster

    return run_on_cluster(config, notifier)


def _run_here(config: RunConfig) -> Summary:
    context = open_checked_run(config)
    # From here on: a storage that was never found is a mistake, not an outage.
    with (
        clean_termination(config.termination.grace_s),
        patient(config.patience),
        join_ranks(config, context.world),
        watching([Ec2Notice()] if is_on_ec2() else []),
        watched_rank(context.world, config.watchdog),
    ):
        run_stages(context, run_stage_here)
    return finish(context)

"""All checks of one node, as `fqgan doctor` runs them there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from fqgan_dist.diagnosis import clock, collectives, gpus, host, software, storage, weights
from fqgan_dist.diagnosis.verdict import Check, Verdict, run_checks
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.frozen_networks import needed_weights
from fqgan_dist.storage.storage import Storage

_QUICK_S, _NETWORK_S, _TRANSFER_S = 20.0, 90.0, 180.0


def diagnose_node(config: RunConfig | None) -> list[Verdict]:
    return run_checks(list_checks(config))


def list_checks(config: RunConfig | None) -> list[Check]:
    """List the checks of a node: software, devices, machine, and what the config names."""
    checks = [
        Check(software.PYTHON, _QUICK_S, software.check_python),
        Check(software.PACKAGES, _QUICK_S, software.check_packages),
        Check(software.DECODER, _QUICK_S, software.check_decoder),
        Check(software.DEEPSPEED, software.DEEPSPEED_TIME_LIMIT_S + 10, software.check_deepspeed),
        Check(gpus.GPUS, gpus.QUERY_TIME_LIMIT_S + 30, partial(gpus.check_gpus, config)),
        Check(collectives.COLLECTIVES, collectives.TIME_LIMIT_S, collectives.check_collectives),
        Check(host.CPUS, _QUICK_S, partial(host.check_cpus, config)),
        Check(host.MEMORY, _QUICK_S, host.check_memory),
        Check(host.SHARED_MEMORY, _QUICK_S, host.check_shared_memory),
        Check(host.OPEN_FILES, _QUICK_S, host.check_open_files),
        Check(host.TEMPORARY, _QUICK_S, host.check_temporary_folder),
        Check(host.CACHES, _QUICK_S, host.check_caches),
    ]
    return checks if config is None else [*checks, *_list_checks_of(config)]


def _list_checks_of(config: RunConfig) -> Iterator[Check]:
    root = config.storage.root
    yield Check(storage.ACCESS, _NETWORK_S, partial(storage.check_access, root))
    yield Check(storage.SPEED, _TRANSFER_S, partial(storage.check_speed, root))
    if Storage(root).is_local:
        yield Check(storage.SPACE, _QUICK_S, partial(storage.check_space, root))
    else:
        yield Check(clock.SERVER_CLOCK, _QUICK_S, clock.check_server_clock)
    for needed in needed_weights(config):
        yield Check(needed.field, _TRANSFER_S, partial(weights.check_weights, needed))

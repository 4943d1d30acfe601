"""Being connected to a Ray cluster: the one that RAY_ADDRESS names, or one of this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from fqgan_dist.errors import ClusterError
from fqgan_dist.orchestration.authentication import (
    ADDRESS_VARIABLE,
    MODE_VARIABLE,
    TOKEN_PATH_VARIABLE,
    TOKEN_VARIABLE,
)
from fqgan_dist.orchestration.config import RayConfig
from fqgan_dist.orchestration.nodes import list_nodes
from fqgan_dist.orchestration.private_folder import private_folder
from fqgan_dist.orchestration.ray_output import short_raylet_errors

logger = logging.getLogger(__name__)


@contextmanager
def connected_cluster(config: RayConfig) -> Iterator[None]:
    """Be connected for a block: to the cluster of RAY_ADDRESS, else to a Ray started for it.

    A connection that this process has already is used and kept.

    Raises:
        ConfigError: the folder of a Ray that is started here has too long a path.
        ClusterError: the cluster does not answer, or refuses this process.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get(ADDRESS_VARIABLE)
    with _attached(address) if address else _started_here(config), short_raylet_errors():
        logger.info("Ray: %s", _describe_cluster())
        yield


def is_attached() -> bool:
    """Whether the cluster outlives this process."""
    return bool(os.environ.get(ADDRESS_VARIABLE))


@contextmanager
def _attached(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True)
    # What Ray raises here is documented nowhere: ConnectionError, RuntimeError, its own errors.
    except Exception as error:
        raise ClusterError(
            f"{ADDRESS_VARIABLE}: {address!r} cannot be joined ({type(error).__name__}: "
            f"{_first_line(error)}) - expected a running cluster that knows this process's token - "
            f"look at `ray status`, and set {MODE_VARIABLE}=token and the cluster's token "
            f"({TOKEN_VARIABLE} or {TOKEN_PATH_VARIABLE}) if it uses one"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _started_here(config: RayConfig) -> Iterator[None]:
    with private_folder() as folder:
        try:
            # Ray gives a node the address of an interface even where it is told 127.0.0.1, so its
            # ports are open to other machines; what asks there needs the token.
            ray.init(
                address="local",
                num_cpus=config.local_cpus,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=True,
                _temp_dir=folder,
            )
            yield
        finally:
            ray.shutdown()


def _describe_cluster() -> str:
    total = ray.cluster_resources()
    nodes = len(list_nodes())
    resources = f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    where = "attached to a cluster" if is_attached() else "started on this machine"
    return f"{where}: {nodes} node{'s' if nodes > 1 else ''}, {resources}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"

"""A pool of actors that make the shards of a dataset, for commands that are no run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fqgan_dist.chunks import RunChunks
from fqgan_dist.errors import ClusterError
from fqgan_dist.orchestration.authentication import ADDRESS_VARIABLE, require_token
from fqgan_dist.orchestration.config import PoolConfig, RayConfig
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer


@contextmanager
def open_shard_pool(
    storage: Storage, source: SourceListing, *, workers: int | None, observer: Observer
) -> Iterator[RunChunks]:
    """Keep actors of the cluster of RAY_ADDRESS, or of a Ray started here, for a block.

    At most `workers` of one CPU each; None: as many as the cluster has CPUs.

    Raises:
        ClusterError: the cluster cannot be joined, or not all of its nodes see source and storage.
    """
    if os.environ.get(ADDRESS_VARIABLE):
        check_source(source)
    else:
        require_token()
    import ray

    from fqgan_dist.orchestration.cluster import connected_cluster
    from fqgan_dist.orchestration.pools import open_pool
    from fqgan_dist.orchestration.shared_root import shared_root

    with connected_cluster(RayConfig()), shared_root(storage) as root:
        cpus = max(1, math.floor(ray.cluster_resources().get("CPU", 1)))
        pool = PoolConfig(max_actors=workers or cpus)
        with open_pool("shards", pool, observer=observer, check_node=root.check) as run_chunks:
            yield run_chunks


def check_source(source: SourceListing) -> None:
    """Check that nodes of a cluster can read a source.

    Raises:
        ClusterError: it is on a disk of this machine, as far as one can tell.
    """
    if not source.is_shared_by_nodes:
        raise ClusterError(
            f"{source.uri}: a source on this machine, or unpacked here - expected one that all "
            "nodes of the cluster read - use an s3:// URI of plain files, an uncompressed tar or "
            "shards, or say is_shared=true if all nodes mount it at this path, or engine=processes"
        )

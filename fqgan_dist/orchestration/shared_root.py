"""Proof that every process of a run sees the same storage root.

A local folder of the same name exists on every machine: without a proof, each node would fill its
own, and the run would come apart after hours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fqgan_dist.errors import ClusterError, DataError
from fqgan_dist.orchestration.nodes import run_on_every_node
from fqgan_dist.storage.leftovers import name_mark
from fqgan_dist.storage.storage import Storage

_NODE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class SharedRoot:
    """A file in the root that only the driver of this session could have written."""

    storage: Storage
    probe: str
    """Name of the file; drawn for the session."""

    def check(self) -> None:
        """Look for the file from the process that calls.

        Raises:
            ClusterError: it is not there: this node has another file system.
            DataError: the root cannot be read from here.
        """
        if self.storage.exists(self.probe):
            return
        where = self.storage.root
        advice = (
            "use an s3:// URI or a folder that is mounted on all nodes"
            if self.storage.is_local
            else "give all nodes the same endpoint and bucket (AWS_ENDPOINT_URL)"
        )
        raise ClusterError(
            f"storage.root: {where}: what the driver writes there is not seen on this node - "
            f"expected one storage for the whole cluster - {advice}"
        )


@contextmanager
def shared_root(storage: Storage) -> Iterator[SharedRoot]:
    """Write the probe, read it on every node, and keep it for the block.

    Nodes that join later check it when their first process starts.

    Raises:
        ClusterError: a node does not see or cannot reach it; all such nodes are named.
    """
    root = SharedRoot(storage, name_mark("probe-driver"))
    storage.write_bytes(root.probe, b"")
    try:
        answers = run_on_every_node(root.check, timeout_s=_NODE_TIMEOUT_S)
        failed = {label: error for label, error in answers.items() if isinstance(error, Exception)}
        if failed:
            listed = "\n".join(f"  node {label}: {error}" for label, error in failed.items())
            raise ClusterError(
                f"{len(failed)} of {len(answers)} nodes cannot use the storage root; nothing was "
                f"started:\n{listed}"
            )
        yield root
    finally:
        _delete(storage, root.probe)


def _delete(storage: Storage, probe: str) -> None:
    try:
        storage.delete(probe)
    except DataError:
        return  # a later run sweeps it; the error that matters is the one that made us come here

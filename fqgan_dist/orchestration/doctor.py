"""`fqgan doctor`: the checks of this machine, or of every node of a cluster.

Ray is imported only where a cluster is named: the doctor also works where Ray does not.
"""

from __future__ import annotations

import os

from fqgan_dist.credentials import scrub
from fqgan_dist.diagnosis.connections import explain_silence
from fqgan_dist.diagnosis.node_checks import diagnose_node
from fqgan_dist.diagnosis.results import CLUSTER, RAY, THIS_MACHINE, Diagnosis
from fqgan_dist.diagnosis.verdict import failed
from fqgan_dist.errors import ClusterError
from fqgan_dist.orchestration.authentication import ADDRESS_VARIABLE
from fqgan_dist.stages.config import RunConfig

_NO_CONFIG = "no CONFIG was given: storage, clock and weights were not looked at"
_NO_CLUSTER = (
    f"{ADDRESS_VARIABLE} is not set: only this machine was looked at; set it, or submit this "
    "command with `ray job submit`, to look at every node of a cluster"
)


def run_doctor(config: RunConfig | None) -> Diagnosis:
    """Check every node of the cluster that RAY_ADDRESS names, or else this machine.

    With a config also the run's storage, weights and resources.
    """
    notes = [] if config else [_NO_CONFIG]
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address:
        return Diagnosis({THIS_MACHINE: diagnose_node(config)}, [*notes, _NO_CLUSTER])
    problem = find_unreachable(address)
    if problem is None:
        from fqgan_dist.orchestration.cluster_checks import diagnose_cluster

        try:
            return Diagnosis(diagnose_cluster(config), notes)
        except ClusterError as error:
            problem = scrub(str(error))
    advice = f"start the cluster, or unset {ADDRESS_VARIABLE} to check only this machine"
    groups = {CLUSTER: [failed(RAY, problem, advice)], THIS_MACHINE: diagnose_node(config)}
    return Diagnosis(groups, notes)


def find_unreachable(address: str) -> str | None:
    """Say why nobody answers at `host:port`; None where somebody does, or for other addresses.

    Ray itself would try for a minute.
    """
    host, separator, port = address.rpartition(":")
    if not separator or "/" in address or not port.isdigit():
        return None
    silence = explain_silence(host, int(port))
    return silence and f"{ADDRESS_VARIABLE}: {silence}"

"""The checks of a Ray cluster: those of every node, and of what the nodes must have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from fqgan_dist.credentials import scrub
from fqgan_dist.diagnosis.node_checks import diagnose_node
from fqgan_dist.diagnosis.results import CLUSTER, RAY
from fqgan_dist.diagnosis.verdict import Check, Verdict, failed, judge, ok, run_checks, warning
from fqgan_dist.errors import ClusterError, DataError
from fqgan_dist.orchestration.cluster import connected_cluster
from fqgan_dist.orchestration.config import RayConfig
from fqgan_dist.orchestration.node_network import CLOCKS, NETWORK, check_clocks, check_network
from fqgan_dist.orchestration.nodes import list_nodes, run_on_every_node
from fqgan_dist.orchestration.shared_root import shared_root
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.placement import least_size, planned_sizes, used_pools
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.environment import collect_environment

AUTHENTICATION, VERSIONS = "authentication", "versions"
RESOURCES, SHARED_ROOT = "resources", "shared storage"

# For all checks of a node; usual are 20 s to 60 s, hub weights and slow storage may take more.
_NODE_LIMIT_S = 600.0
_CLUSTER_CHECK_S = 300.0
_COMPARED = ("fqgan-dist", "torch", "ray", "deepspeed", "numpy", "pydantic")


@dataclass(frozen=True)
class NodeReport:
    """What one node says of itself."""

    verdicts: list[Verdict]
    versions: dict[str, str]


def diagnose_cluster(config: RunConfig | None) -> dict[str, list[Verdict]]:
    """Check the cluster of RAY_ADDRESS and its nodes; give the verdicts by title.

    Raises:
        ClusterError: the cluster cannot be joined.
    """
    with connected_cluster(config.ray if config else RayConfig()):
        return _diagnose(config)


def _diagnose(config: RunConfig | None) -> dict[str, list[Verdict]]:
    reports = run_on_every_node(_report_node, config, timeout_s=_NODE_LIMIT_S)
    versions = {
        label: report.versions
        for label, report in reports.items()
        if not isinstance(report, Exception)
    }
    groups = {CLUSTER: run_checks(_list_checks(config, versions))}
    for label, report in reports.items():
        groups[f"node {label}"] = (
            [_explain_silence(report)] if isinstance(report, Exception) else report.verdicts
        )
    return groups


def _report_node(config: RunConfig | None) -> NodeReport:
    environment = collect_environment()
    packages = environment["packages"]
    versions = {name: str(packages[name]) for name in _COMPARED} | {
        "Python": environment["python"],
        "commit": _describe_commit(environment["git"]),
    }
    return NodeReport(diagnose_node(config), versions)


def _describe_commit(git: dict[str, Any] | None) -> str:
    if git is None:
        return "none"
    return git["commit"] + (" with changes" if git["modified"] else "")


def _explain_silence(error: Exception) -> Verdict:
    return failed(
        "node",
        scrub(f"{type(error).__name__}: {error}"),
        "nothing else is known of this node: install the same version of this project there",
    )


def _list_checks(config: RunConfig | None, versions: dict[str, dict[str, str]]) -> list[Check]:
    checks = [
        Check(RAY, _CLUSTER_CHECK_S, check_ray),
        Check(AUTHENTICATION, _CLUSTER_CHECK_S, check_authentication),
        Check(VERSIONS, _CLUSTER_CHECK_S, partial(judge_versions, versions)),
        Check(CLOCKS, _CLUSTER_CHECK_S, check_clocks),
        Check(NETWORK, _CLUSTER_CHECK_S, check_network),
    ]
    if config is None:
        return checks
    if config.execution == "ray":
        checks.append(Check(RESOURCES, _CLUSTER_CHECK_S, partial(check_resources, config)))
    root = config.storage.root
    return [*checks, Check(SHARED_ROOT, _CLUSTER_CHECK_S, partial(check_shared_root, root))]


def check_ray() -> Verdict:
    nodes, total = len(list_nodes()), ray.cluster_resources()
    resources = f"{total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
    return ok(RAY, f"{ray.__version__}; nodes alive: {nodes}; {resources}")


def check_authentication() -> Verdict:
    """Find out whether the cluster asks for a token."""
    # Ray has no public way to ask; RAY_AUTH_MODE is not all, since a token file decides too.
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if is_token_auth_enabled():
        return ok(AUTHENTICATION, "by token; who holds it can run code on every node")
    return warning(
        AUTHENTICATION,
        "none: whoever reaches Ray's ports can run code on every node",
        "start the head and all clients with RAY_AUTH_MODE=token",
    )


def judge_versions(versions: dict[str, dict[str, str]]) -> Verdict:
    """Compare what must be equal on all nodes, given by node, then by name."""
    names = sorted({name for found in versions.values() for name in found})
    problems = [
        f"{name}: " + ", ".join(f"{value} on {' and '.join(labels)}" for value, labels in found)
        for name in names
        if len(found := _group_by_version(versions, name)) > 1
    ]
    if problems:
        advice = "give all nodes the same image or environment"
        return failed(VERSIONS, "; ".join(problems), advice)
    return ok(VERSIONS, f"equal on all nodes: {', '.join(names)}")


def _group_by_version(
    versions: dict[str, dict[str, str]], name: str
) -> list[tuple[str, list[str]]]:
    labels: dict[str, list[str]] = {}
    for label, found in versions.items():
        labels.setdefault(found.get(name, "none"), []).append(label)
    return sorted(labels.items())


def check_resources(config: RunConfig) -> Verdict:
    return judge_resources(config, ray.cluster_resources())


def judge_resources(config: RunConfig, total: Mapping[str, float]) -> Verdict:
    """Compare resources, by name, with what the train workers or the smallest pools reserve."""
    train = config.ray.train
    least = least_size(config)
    groups = {"train workers": (least, train)} | {
        f"actors of {stage}": (pool.min_actors, pool) for stage, pool in used_pools(config).items()
    }
    shortages = [
        f"{count} {title} want {count * amount:g} {name}, there are {total.get(name, 0):g}"
        for title, (count, each) in groups.items()
        for name, amount in each.amounts.items()
        if count * amount > total.get(name, 0)
    ]
    wanted = f"{least} train workers with {train.gpus:g} GPU and {train.cpus:g} CPU each"
    if train.is_elastic:
        valid = "; ".join(
            f"{stage}: {', '.join(map(str, each)) or 'none'}"
            for stage, each in planned_sizes(config).items()
        )
        wanted += f" (valid sizes of ray.train.num_workers: {valid})"
    advice = "they start only if the cluster scales up to that: add nodes, or lower `ray`"
    return judge(
        RESOURCES,
        "; ".join(shortages) if shortages else f"enough for {wanted} and the pools",
        failures=[],
        warnings=[advice] if shortages else [],
    )


def check_shared_root(root: str) -> Verdict:
    try:
        with shared_root(Storage(root)):
            return ok(SHARED_ROOT, f"{root}: one storage, seen by every node")
    except (ClusterError, DataError, OSError) as error:
        return failed(SHARED_ROOT, str(error), "use s3:// or a folder mounted on all nodes")

"""cluster/kubernetes against KubeRay's fields, Kubernetes' schemas and Ray's own reader of them."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.scripts.scripts import drain_node
from support.kuberay import KUBERNETES_VERSION, RayCluster, RayJob

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "cluster" / "kubernetes"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return load("raycluster.yaml")


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return load("rayjob.yaml")


def worker_groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return cluster["spec"]["workerGroupSpecs"]


def all_pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["spec"]["headGroupSpec"], *worker_groups(cluster)]
    return [group["template"]["spec"] for group in groups]


def test_both_are_what_kuberay_accepts(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    RayCluster.model_validate(cluster)
    RayJob.model_validate(job)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "workerGroups"), []),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "boxes"), []),
        (("spec", "authOptions", "mode"), "password"),
    ],
)
def test_the_check_sees_a_wrong_field(
    cluster: dict[str, Any], path: tuple[str, ...], value: Any
) -> None:
    wrong = copy.deepcopy(cluster)
    place = wrong
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError)):
        RayCluster.model_validate(wrong)


def test_the_prerequisites_are_kubernetes_objects() -> None:
    objects = list(yaml.safe_load_all((FOLDER / "prerequisites.yaml").read_text()))
    assert [item["kind"] for item in objects] == ["Namespace", "ServiceAccount"]
    for item in objects:
        kubernetes_validate.validate(item, KUBERNETES_VERSION, True)


def test_a_job_makes_the_same_cluster(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_a_lost_head_is_tried_again_and_all_is_taken_down(job: dict[str, Any]) -> None:
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def test_a_job_runs_a_config_of_the_image(job: dict[str, Any]) -> None:
    path = re.match(r"fqgan run /opt/fqgan/(configs/\S+)", job["spec"]["entrypoint"])
    assert path is not None
    assert (ROOT / path[1]).is_file()


def test_the_autoscaler_reads_nodes_of_eight_gpus_and_a_head_that_takes_no_work(
    cluster: dict[str, Any],
) -> None:
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert (head["resources"]["CPU"], head["resources"]["GPU"]) == (0, 0)
    assert {name: kind["resources"]["GPU"] for name, kind in types.items()} == {
        "a100-80gb": 8,
        "a100-40gb": 8,
    }
    assert types["a100-80gb"]["resources"]["a100_80gb"] == 8
    for kind in types.values():
        assert kind["min_workers"] == 0
        assert kind["max_workers"] == 8


def test_the_token_comes_from_a_secret(cluster: dict[str, Any]) -> None:
    auth = cluster["spec"]["authOptions"]
    assert auth == {"mode": "token", "secretName": "fqgan-ray-token"}


def test_a_worker_pod_that_ends_lets_ray_drain_its_node_first(cluster: dict[str, Any]) -> None:
    for group in worker_groups(cluster):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        *_, script = container["lifecycle"]["preStop"]["exec"]["command"]
        drain, wait = script.split("; ")
        deadline_s = int(re.search(r"--deadline-remaining-seconds (\d+)", drain)[1])  # pyright: ignore[reportOptionalSubscript]
        assert wait == f"sleep {deadline_s}", "a pod ends with its hook"
        assert 30 <= deadline_s < pod["terminationGracePeriodSeconds"]
        # Ray's own program takes all of it.
        options = shlex.split(drain)[2:]
        drain_node.make_context("drain-node", [*options, "--node-id", "x"])


def test_shared_memory_is_sized(cluster: dict[str, Any]) -> None:
    for pod in all_pods(cluster):
        (memory,) = [volume for volume in pod["volumes"] if volume["name"] == "shared-memory"]
        assert memory["emptyDir"]["medium"] == "Memory"
        assert memory["emptyDir"]["sizeLimit"]
        mounts = {
            mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]
        }
        assert mounts["shared-memory"] == "/dev/shm"


def test_pods_run_without_root_and_with_a_role(cluster: dict[str, Any]) -> None:
    for pod in all_pods(cluster):
        assert pod["serviceAccountName"] == "fqgan"
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert "env" not in container, "no credentials: a role, and Ray's token from KubeRay"


def test_ray_is_the_version_that_is_installed(cluster: dict[str, Any]) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (pin,) = [text for text in pyproject["project"]["dependencies"] if text.startswith("ray[")]
    assert pin.endswith(f"=={cluster['spec']['rayVersion']}")

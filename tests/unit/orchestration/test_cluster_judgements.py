"""What `fqgan doctor` makes of the facts of a cluster; no Ray is started."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fqgan_dist.config import load_config
from fqgan_dist.orchestration.cluster_checks import judge_resources, judge_versions
from fqgan_dist.orchestration.doctor import find_unreachable
from fqgan_dist.orchestration.node_network import judge_clocks
from fqgan_dist.stages.config import RunConfig

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"
FOUR_GPUS = ("execution=ray", "ray.train.num_workers=4", "ray.train.gpus=1", "ray.train.cpus=2")


def test_equal_versions_are_ok() -> None:
    same = {"torch": "2.15.0", "ray": "2.60.0"}
    verdict = judge_versions({"a": same, "b": same})
    assert verdict.status == "ok"
    assert verdict.finding == "equal on all nodes: ray, torch"


def test_different_versions_are_named_with_their_nodes() -> None:
    verdict = judge_versions(
        {
            "a": {"torch": "2.15.0", "ray": "2.60.0"},
            "b": {"torch": "2.14.0", "ray": "2.60.0"},
            "c": {"torch": "2.15.0", "ray": "2.60.0"},
        }
    )
    assert verdict.status == "failed"
    assert verdict.finding == "torch: 2.14.0 on b, 2.15.0 on a and c"


def test_a_package_that_one_node_lacks_is_a_difference() -> None:
    verdict = judge_versions({"a": {"deepspeed": "0.19.8"}, "b": {}})
    assert verdict.finding == "deepspeed: 0.19.8 on a, none on b"


def test_enough_slots_are_ok() -> None:
    config = load_config(TINY, FOUR_GPUS, RunConfig)
    verdict = judge_resources(config, {"CPU": 8.0, "GPU": 4.0})
    assert verdict.status == "ok"
    assert "4 train workers with 1 GPU and 2 CPU each" in verdict.finding


def test_a_range_needs_room_for_its_least_valid_size() -> None:
    settings = (*FOUR_GPUS, "ray.train.num_workers=[1,8]")
    config = load_config(TINY, settings, RunConfig)
    verdict = judge_resources(config, {"CPU": 2.0, "GPU": 1.0})
    assert verdict.status == "ok"
    assert "valid sizes of ray.train.num_workers: tokenizer: 1, 2; autoreg" in verdict.finding
    assert judge_resources(config, {"CPU": 2.0}).status == "warning"


def test_missing_slots_are_a_warning_as_a_cluster_may_grow() -> None:
    config = load_config(TINY, [*FOUR_GPUS, "ray.pools.codes.gpus=1"], RunConfig)
    verdict = judge_resources(config, {"CPU": 6.0})
    assert verdict.status == "warning"
    assert "4 train workers want 8 CPU, there are 6" in verdict.finding
    assert "4 train workers want 4 GPU, there are 0" in verdict.finding
    assert "1 actors of codes want 1 GPU, there are 0" in verdict.finding


@pytest.mark.parametrize(
    ("bounds", "status", "text"),
    [
        ({"a": (-0.1, 0.1), "b": (-0.2, 0.3)}, "ok", "within 0.3 s"),
        ({"a": (-0.1, 0.1), "b": (-0.5, 4.0)}, "ok", "within 4.0 s"),
        ({"a": (-0.1, 0.1), "b": (4.9, 5.1)}, "warning", "b: 5.0 s ahead of the driver's clock"),
        ({"a": (-5.1, -4.9), "b": (0.0, 0.1)}, "warning", "a: 5.0 s behind the driver's clock"),
    ],
)
def test_clocks_that_certainly_differ_are_named(
    bounds: dict[str, tuple[float, float]], status: str, text: str
) -> None:
    verdict = judge_clocks(bounds)
    assert verdict.status == status
    assert text in verdict.finding


def test_an_address_where_nobody_listens_is_found_out_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert f"RAY_ADDRESS: {address} does not answer" in str(find_unreachable(address))
        listener.listen()
        assert find_unreachable(address) is None


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "http://head:8265"])
def test_other_addresses_are_left_to_ray(address: str) -> None:
    assert find_unreachable(address) is None


def test_one_machine_is_checked_without_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import fqgan_dist.orchestration.doctor, fqgan_dist.diagnosis.node_checks"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

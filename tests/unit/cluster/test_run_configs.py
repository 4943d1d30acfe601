"""configs/runs: each passes --dry-run, says what that prints, and trains what its preset does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fqgan_dist.cli import main
from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.training import training_settings

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "configs" / "runs").glob("*.yaml"))
GPUS_OF_NODE = 8


def load(path: Path) -> RunConfig:
    return load_config(path, [], RunConfig)


def read_header(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("#").strip() for line in lines)


def count_nodes(path: Path) -> int:
    named = re.fullmatch(r"\w+_(\d+)x8_a100", path.stem)
    assert named is not None
    return int(named[1])


def load_node_types() -> dict[str, dict[str, int]]:
    """Return what the nodes of both kinds of cluster offer, by type."""
    aws = yaml.safe_load((ROOT / "cluster" / "aws" / "ray-cluster.yaml").read_text())
    types = {f"aws {name}": kind["resources"] for name, kind in aws["available_node_types"].items()}
    cluster = yaml.safe_load((ROOT / "cluster" / "kubernetes" / "raycluster.yaml").read_text())
    for group in cluster["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        custom = json.loads(json.loads(group["rayStartParams"]["resources"]))
        types[f"kubernetes {group['groupName']}"] = {
            "CPU": int(limits["cpu"]),
            "GPU": limits["nvidia.com/gpu"],
            **custom,
        }
    return types


def test_there_is_one_for_one_two_and_eight_nodes() -> None:
    assert [count_nodes(path) for path in FILES] == [1, 2, 8]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_says_what_the_dry_run_prints(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(path), "--dry-run", "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    memory = {
        name: f"{plan[name]['memory']['per_gpu_bytes'] / 2**30:.2f} GiB"
        for name in ("tokenizer", "autoregressive")
    }
    header = read_header(path)
    words = f"tokenizer {memory['tokenizer']}, FAR {memory['autoregressive']}."
    assert f"Memory per GPU (--dry-run; temporaries come on top): {words}" in header
    gpus = GPUS_OF_NODE * count_nodes(path)
    assert f"on {gpus} A100 of" in header
    assert plan["placement"]["most_at_a_time"]["gpus"] == gpus
    for name in ("tokenizer", "autoregressive"):
        training = plan[name]["training"]
        assert (training["passes_per_step"], training["idle_passes_per_step"]) == (1, 0)
        assert plan[name]["memory"]["engine"]["ranks"] == gpus


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_opens_with_the_command_and_names_hardware_and_hours(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# fqgan run {path.relative_to(ROOT)} ")
    header = read_header(path)
    assert re.search(rf"Hardware: {count_nodes(path)} nodes? of 8 x A100", header)
    assert re.search(r"Hours, estimated .* tokenizer \d+ to \d+ h, FAR \d+ to \d+ h", header)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains_what_its_preset_does(path: Path) -> None:
    base = yaml.safe_load(path.read_text())["base"]
    config, preset = load(path), load(path.parent / base)
    for stage in ("tokenizer", "autoregressive"):
        ours, theirs = getattr(config, stage), getattr(preset, stage)
        assert training_settings(ours.training) == training_settings(theirs.training)
        others = {"training"}
        assert ours.model_dump(exclude=others) == theirs.model_dump(exclude=others)
    others = {"tokenizer", "autoregressive", "execution", "ray", "device"}
    assert config.model_dump(exclude=others) == preset.model_dump(exclude=others)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_nodes_of_cluster_have_room_for_it(path: Path) -> None:
    train = load(path).ray.train
    needs = {"CPU": train.cpus, "GPU": train.gpus, **train.custom}
    offers = {
        name: resources
        for name, resources in load_node_types().items()
        if all(
            GPUS_OF_NODE * amount <= resources.get(resource, 0)
            for resource, amount in needs.items()
        )
    }
    assert {name.split()[0] for name in offers} == {"aws", "kubernetes"}
    assert train.num_workers == GPUS_OF_NODE * count_nodes(path)


def test_one_node_needs_gpus_of_80_gb() -> None:
    assert load(FILES[0]).ray.train.custom == {"a100_80gb": 1}
    assert not load(FILES[1]).ray.train.custom

"""cluster/README.md names files that exist, commands that parse, the hours of the run configs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cluster.options import parse_arguments
from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "cluster" / "README.md").read_text()


def find_commands(program: str) -> list[str]:
    blocks = "\n".join(line for line in README.splitlines() if line.startswith("    "))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith(program)]


def test_files_that_it_names_exist() -> None:
    named = re.findall(r"(?:/opt/fqgan/)?\b((?:cluster|configs|tests)/[\w./*-]+)", README)
    names = {name.rstrip(".") for name in named if "mine" not in name}
    assert len(names) > 8
    for name in names:
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_every_file_of_the_folder_is_listed() -> None:
    for path in (ROOT / "cluster").rglob("*"):
        if path.is_file() and path.name != "README.md" and path.suffix != ".pyc":
            listed = path.name if not path.name.endswith("-policy.json") else "*-policy.json"
            assert listed in README


@pytest.mark.parametrize("command", find_commands("cluster/submit run="))
def test_its_submissions_are_runs_that_submit_and_the_config_accept(command: str) -> None:
    words = shlex.split(command, comments=True)
    parse_arguments(words[1:])
    if words[-1] == "...":
        return
    name, overrides = words[words.index("--") + 3], words[words.index("--") + 4 :]
    load_config(ROOT / Path(name).relative_to("/opt/fqgan"), overrides, RunConfig)


@pytest.mark.parametrize("num_nodes", [1, 2, 8])
def test_its_hours_are_those_of_the_run_configs(num_nodes: int) -> None:
    row = re.search(rf"\| {num_nodes} nodes? \| (\d+ to \d+ h) \| (\d+ to \d+ h) \|", README)
    assert row is not None
    header = (ROOT / f"configs/runs/triple_{num_nodes}x8_a100.yaml").read_text()
    assert f"not measured: tokenizer {row[1]}, FAR {row[2]};" in header

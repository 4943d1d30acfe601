"""What needs no computation imports nothing that takes a second: the modules, not the time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TINY = str(Path(__file__).resolve().parents[1] / "support" / "tiny.yaml")
HEAVY = (
    *("torch", "torchvision", "torch_fidelity", "transformers", "open_clip", "lpips", "numpy"),
    "matplotlib",
    *("pyarrow", "s3fs", "fsspec", "PIL", "rich", "ray", "deepspeed"),
)


def find_heavy_imports(statement: str) -> set[str]:
    """Run a statement in a process of its own; return the heavy packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys; print('modules', *sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    *_, modules = [line for line in done.stdout.splitlines() if line.startswith("modules")]
    return set(HEAVY) & set(modules.split())


def test_reading_a_config_imports_nothing_heavy() -> None:
    assert not find_heavy_imports(
        "from fqgan_dist.config import load_config\n"
        "from fqgan_dist.stages.config import RunConfig\n"
        f"load_config({TINY!r}, [], RunConfig)"
    )


def test_the_process_that_writes_checkpoints_imports_nothing_heavy() -> None:
    assert not find_heavy_imports("import fqgan_dist.training.writer_process")


def test_a_heavy_import_would_be_seen() -> None:
    assert "torch" in find_heavy_imports("import fqgan_dist.stages.tokenizer_task")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "missing.yaml"],
        ["run", TINY, "data.sourc=x"],
        ["train", TINY, "stages=[shards]"],
        ["checkpoints", "list", TINY, "tokenizer", "data.sourc=x"],
        ["checkpoints", "list", TINY, "tokenizer", "step=-1"],
        ["weights", "fetch", TINY],
        ["doctor", TINY, "data.sourc=x"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(arguments: list[str]) -> None:
    assert not find_heavy_imports(
        "from fqgan_dist.cli import main\nfrom fqgan_dist.command_line import WRONG_USAGE\n"
        f"assert main({arguments!r}) == WRONG_USAGE"
    )


def test_help_imports_nothing_heavy() -> None:
    assert not find_heavy_imports(
        "from fqgan_dist.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as leaving:\n    assert leaving.code == 0"
    )


def test_a_process_that_knows_the_stages_has_imported_no_network_of_others() -> None:
    """Every train worker and every actor is one; torchvision alone is two CPU-seconds."""
    found = find_heavy_imports("from fqgan_dist.stages.stage import all_stages\nall_stages()")
    networks = {"torchvision", "torch_fidelity", "transformers", "open_clip", "lpips"}
    assert not found & {*networks, "matplotlib", "ray", "deepspeed"}

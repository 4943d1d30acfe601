"""Names, splits, policies and metrics of files that others wrote, through every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_shards import write_tiny_dataset

from data_tools.cli import main as data_main
from fqgan_dist.cli import main as fqgan_main
from fqgan_dist.config import load_config
from fqgan_dist.data.index import INDEX_NAME
from fqgan_dist.diagnosis.results import Diagnosis
from fqgan_dist.diagnosis.verdict import failed
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.progress import render_summary
from fqgan_dist.terminal import Lines
from fqgan_dist.training.checkpoint import CheckpointStore

TINY = str(Path(__file__).resolve().parents[1] / "support" / "tiny.yaml")
HOSTILE = "\x1b]0;title\x07\x1b[2J\r\nFORGED: whole\n\u202e\u2066\x9b31m\x7f"


def check_clean(text: str) -> None:
    assert text
    for line in text.split("\n"):
        assert line.isprintable(), repr(line)
        assert not line.startswith("FORGED"), text


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    folder = tmp_path / "dataset"
    write_tiny_dataset(Storage(folder), [3, 2])
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    index |= {"name": HOSTILE, "split": HOSTILE, "image_policy": {HOSTILE: HOSTILE}}
    index["class_descriptions"] = {"class0": HOSTILE}
    index["problems"] = [{"name": HOSTILE, "reason": HOSTILE, "action": "skipped"}]
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    return str(folder)


def run(
    main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    main(arguments)
    shown = capsys.readouterr()
    return shown.out + shown.err


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["stats", "DATASET"],
        ["verify", "DATASET"],
        ["verify", "DATASET", "deep=true", "workers=1"],
        ["index", "DATASET", "name=a", "split=train", "workers=1"],
        ["shard", "DATASET", "OUT", "name=a", "split=train", "--dry-run"],
        ["extend", "DATASET", "DATASET", "--dry-run"],
        ["reshard", "DATASET", "OUT", "--dry-run"],
        ["split", "DATASET", "OUT", "parts={a: 0.5, b: 0.5}", "--dry-run"],
        ["merge", "DATASET", "DATASET", "OUT", "name=a", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_hostile_index_forges_no_line(
    arguments: list[str],
    flags: list[str],
    dataset: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"DATASET": dataset, "OUT": str(tmp_path / "out")}
    given = [places.get(text, text) for text in arguments]
    check_clean(run(data_main, [*given, *flags], capsys))


@pytest.mark.parametrize("damage", [HOSTILE, f"\x1b{HOSTILE}: [", f"{{{HOSTILE!r}: 1}}", "\x00"])
@pytest.mark.parametrize("command", ["stats", "verify"])
def test_an_index_that_cannot_be_read_forges_no_line(
    command: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / INDEX_NAME).write_text(damage, encoding="utf-8")
    check_clean(run(data_main, [command, str(tmp_path)], capsys))


def test_odd_names_of_files_forge_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source" / "FORGED"
    folder.mkdir(parents=True)
    for name in ("a\nFORGED.jpg", "b\x1b[2J.jpg", "c\u202e.jpg"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "source" / "a\x1b]0;x\x07\nFORGED").mkdir()
    output = str(tmp_path / "out")
    arguments = ["shard", str(folder.parent), output, "name=a", "split=train", "workers=1"]
    check_clean(run(data_main, arguments, capsys))


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("action", ["list", "verify", "prune"])
def test_hostile_metrics_of_a_checkpoint_forge_no_line(
    action: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"storage.root={tmp_path}"
    config = load_config(TINY, [root], RunConfig)
    store = CheckpointStore(Storage(config.storage.root), "tokenizer/checkpoints")
    with store.begin_attempt() as attempt:
        attempt.save(
            2,
            tensors={"tokenizer": {"weight": torch.zeros(2)}},
            state={"images_seen": 1},
            metrics={HOSTILE: 1.0},
            config={},
            dataset_id="d" * 64,
        )
    check_clean(run(fqgan_main, ["checkpoints", action, TINY, "tokenizer", root, *flags], capsys))


@pytest.mark.parametrize(
    "text",
    [
        f"name: {json.dumps(HOSTILE)}\n",
        f"{json.dumps(HOSTILE)}: 1\n",
        f"# {HOSTILE}\nname: [",
        f"name: x\nstorage: {json.dumps(HOSTILE)}\n",
        f"base: {json.dumps(HOSTILE)}\n",
    ],
)
@pytest.mark.parametrize("command", ["run", "train", "doctor", "report"])
def test_a_hostile_config_forges_no_line(
    command: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    check_clean(run(fqgan_main, [command, str(file)], capsys))


@pytest.mark.full("plans a run; the tables are tried always")
def test_a_hostile_name_of_a_run_forges_no_line_of_its_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", TINY, f"name={json.dumps(HOSTILE)}", f"storage.root={tmp_path}"]
    check_clean(run(fqgan_main, [*arguments, "--dry-run"], capsys))


def test_tables_of_files_are_lines_of_ours() -> None:
    stage = {"state": "done", "seconds": 1.0, "metrics": {f"shards/{HOSTILE}": 1.0}}
    summary: dict[str, Any] = {"shards": stage}
    shown = render_summary(summary)
    assert isinstance(shown, Lines)
    check_clean(shown)
    text = Diagnosis({HOSTILE: [failed(HOSTILE, HOSTILE, HOSTILE)]}, [HOSTILE]).text
    assert isinstance(text, Lines)
    check_clean(text)

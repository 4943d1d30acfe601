"""`fqgan-data shard` and `extend` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data_tools.cli import main
from fqgan_dist.data.index import load_index
from fqgan_dist.storage.storage import Storage


def write_images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10 + number), (number, 0, 0)).save(root / name)
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    images = write_images(tmp_path / "images", "a/0.png", "a/1.png", "b/2.png")
    (images / "notes.txt").write_text("x")
    arguments = ["shard", str(images), str(tmp_path / "dataset"), "name=x", "split=train"]
    assert main([*arguments, "samples_per_shard=2", "workers=1"]) == 0
    return tmp_path / "dataset"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_shard_sums_up_what_it_did(tmp_path: Path, capsys) -> None:
    images = write_images(tmp_path / "images", "a/0.png", "a/1.png", "b/2.png")
    size = sum(path.stat().st_size for path in images.glob("*/*"))
    (images / "a" / "bad.png").write_bytes(b"bad")
    out = tmp_path / "out"
    arguments = ["shard", str(images), str(out), "name=x", "split=train", "workers=1"]
    code, summary = run_json(capsys, *arguments)
    tars = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert code == 0
    assert (summary["num_images"], summary["num_built"], summary["num_problems"]) == (4, 1, 1)
    assert (summary["bytes_read"], summary["bytes_written"]) == (size + 3, tars)
    assert summary["images_per_s"] == pytest.approx(4 / summary["seconds"], rel=0.1)
    assert summary["problem_tables"] == ["plan.problems.jsonl"]
    assert [problem["name"] for problem in summary["problems"]] == ["a/bad.png"]


def test_a_dry_run_tells_sizes_and_problems(tmp_path: Path, capsys) -> None:
    images = write_images(tmp_path / "images", "a/0.png")
    (images / "notes.txt").write_text("x")
    arguments = ["shard", str(images), str(tmp_path / "out"), "name=x", "split=train", "--dry-run"]
    code, summary = run_json(capsys, *arguments)
    assert code == 0
    assert summary["num_bytes"] == (images / "a" / "0.png").stat().st_size
    assert summary["num_problems"] == 1
    assert not (tmp_path / "out").exists()


def test_extend_adds_what_is_new_and_says_so(dataset: Path, tmp_path: Path, capsys) -> None:
    more = write_images(tmp_path / "more", "a/0.png", "b/7.png", "c/8.png")
    arguments = ["extend", str(more), str(dataset), "workers=1"]
    capsys.readouterr()
    assert main(arguments) == 1
    assert "append them with new_classes=true" in capsys.readouterr().err
    arguments.append("new_classes=true")
    before = {path.name for path in dataset.iterdir()}
    code, summary = run_json(capsys, *arguments, "--dry-run")
    assert (code, summary["num_added"], summary["num_present"]) == (0, 2, 1)
    assert {path.name for path in dataset.iterdir()} == before
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "2 images added, 1 of the source it had already" in output
    assert "1 new classes:\n  c" in output
    assert load_index(Storage(dataset)).num_samples == 5
    code, summary = run_json(capsys, *arguments)
    assert (code, summary["was_complete"], summary["num_built"]) == (0, True, 0)
    assert main(["verify", str(dataset), "deep=true", "workers=1"]) == 0


def test_wrong_options_of_extend_are_listed(capsys) -> None:
    assert main(["extend", "a", "b", "short_side=3", "new_class=true"]) == 2
    error = capsys.readouterr().err
    assert "short_side: unknown setting" in error
    assert "did you mean 'new_classes'?" in error


def test_the_order_of_classes_is_shown_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", *(f"{label}/x.png" for label in range(12)))
    arguments = ["shard", str(images), str(tmp_path / "out"), "name=x", "split=train", "workers=1"]
    shown = "labels: 0 0, 1 1, 2 2, ..., 9 9, 10 10, 11 11"
    assert main([*arguments, "--dry-run"]) == 0
    assert shown in capsys.readouterr().out
    code, summary = run_json(capsys, *arguments, "--dry-run")
    assert (code, summary["classes"]) == (0, [str(label) for label in range(12)])
    assert main(arguments) == 0
    log = capsys.readouterr().err
    assert log.index(shown) < log.index("writing train shards")


def test_a_class_that_ends_without_an_image_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", "a/0.png", "c/1.png")
    (images / "b").mkdir()
    for name in ("0.png", "1.png"):
        (images / "b" / name).write_bytes(b"no image")
    arguments = ["shard", str(images), str(tmp_path / "out"), "name=x", "split=train", "workers=1"]
    code, summary = run_json(capsys, *arguments)
    assert code == 0
    found = {problem["name"]: problem["reason"] for problem in summary["problems"]}
    assert found["b"] == "a class of which none of its 2 images can be used"
    assert set(found) == {"b", "b/0.png", "b/1.png"}

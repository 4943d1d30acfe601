from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from PIL import Image
from support.source_files import write_tar

from data_tools.cli import COMMANDS, main
from data_tools.command import Command
from fqgan_dist.data.index import load_index
from fqgan_dist.storage.storage import Storage


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10 + color), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for label in "ab":
        (root / label).mkdir(parents=True)
        for number in range(6):
            (root / label / f"{number}.png").write_bytes(png(number))
    return root


@pytest.fixture
def dataset(images: Path, tmp_path: Path) -> Path:
    destination = tmp_path / "dataset"
    arguments = ["shard", str(images), str(destination), "name=x", "split=train"]
    assert main([*arguments, "samples_per_shard=4", "workers=1"]) == 0
    return destination


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_shard_makes_a_dataset_and_says_so(images: Path, tmp_path: Path, capsys):
    (images / "a" / "notes.txt").write_text("hello")
    arguments = ["shard", str(images), str(tmp_path / "out"), "name=x", "split=val"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    index = load_index(Storage(tmp_path / "out"))
    assert "12 images of 2 classes in 1 shards (1 written" in output
    assert index.dataset_id in output
    assert "a/notes.txt: skipped" in output


def test_progress_is_logged_bar_after_bar_and_keeps_out_of_the_result(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys
):
    arguments = ["shard", str(images), str(tmp_path / "out"), "name=x", "split=val", "workers=1"]
    with caplog.at_level(logging.INFO, "fqgan_dist.telemetry.progress"):
        code, _ = run_json(capsys, *arguments)
    assert code == 0
    lines = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert lines == ["listing: 12 files", "labels: 0 a", "writing val shards: 12/12 images"]


def test_shard_again_does_nothing_and_says_so(images: Path, dataset: Path, capsys):
    arguments = ["shard", str(images), str(dataset), "name=x", "split=train"]
    capsys.readouterr()
    assert main([*arguments, "samples_per_shard=4"]) == 0
    assert "complete already" in capsys.readouterr().out
    code, summary = run_json(capsys, *arguments, "samples_per_shard=4")
    assert (code, summary["was_complete"], summary["num_kept"]) == (0, True, 3)


def test_shard_with_other_settings_fails_and_leaves_the_dataset(images, dataset, capsys):
    before = (dataset / "index.json").read_bytes()
    assert main(["shard", str(images), str(dataset), "name=x", "split=train", "seed=1"]) == 1
    assert "choose another destination" in capsys.readouterr().err
    assert (dataset / "index.json").read_bytes() == before


def test_dry_run_writes_nothing(images: Path, tmp_path: Path, capsys):
    arguments = ["shard", str(images), str(tmp_path / "out"), "name=x", "split=train"]
    code, summary = run_json(capsys, *arguments, "--dry-run")
    assert (code, summary["num_samples"], summary["dataset_id"]) == (0, 12, None)
    assert not (tmp_path / "out").exists()


def test_photographs_need_no_input(tmp_path: Path):
    arguments = ["shard", "builtin:photographs", str(tmp_path / "out"), "name=x", "split=val"]
    assert main([*arguments, "image_size=16", "crops_per_photograph=2"]) == 0
    assert load_index(Storage(tmp_path / "out")).num_samples == 24


def test_a_class_file_gives_labels_and_readable_names(images: Path, tmp_path: Path):
    (tmp_path / "classes.tsv").write_text("b\tbulbul\nz\na\tant\n")
    out = tmp_path / "out"
    arguments = ["shard", str(images), str(out), "name=x", "split=train"]
    assert main([*arguments, f"classes={tmp_path / 'classes.tsv'}"]) == 0
    index = load_index(Storage(out))
    assert index.classes == ["b", "z", "a"]
    assert index.class_descriptions == {"a": "ant", "b": "bulbul"}


@pytest.mark.parametrize("text", ["", "a\na\n"])
def test_a_wrong_class_file_is_wrong_usage(images: Path, tmp_path: Path, text: str, capsys):
    (tmp_path / "classes.tsv").write_text(text)
    arguments = ["shard", str(images), str(tmp_path / "out"), "name=x", "split=train"]
    assert main([*arguments, f"classes={tmp_path / 'classes.tsv'}"]) == 2
    assert "at least one class and none of them twice" in capsys.readouterr().err


def test_all_wrong_options_are_listed_at_once(capsys):
    assert main(["shard", "a", "b", "nme=x", "workers=0"]) == 2
    error = capsys.readouterr().err
    assert "nme: unknown setting; did you mean 'name'?" in error
    assert "split: required" in error
    assert "workers: 0" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shard", "a", "b", "name"], "'name': expected key=value"),
        (["shard", "a", "b", "seed=1", "seed=2"], "seed: given twice"),
        (["shard", "a", "b", "name=[x"], "not a YAML value"),
        (
            ["shard", "a", "b", "name=x", "split=train", "image_size=64"],
            "image_size: has an effect",
        ),
        (["stats", "a", "deep=true"], "deep: unknown setting"),
        (["verify", "a", "--dry-run"], "unrecognized arguments: --dry-run"),
        (["shard", "a"], "DST is missing; fqgan-data shard SRC DST"),
        (["merge", "a", "b"], "DST is missing"),
        (["stats", "a", "b"], "'b': expected key=value"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage_exits_2_with_the_reason(arguments: list[str], message: str, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_is_no_failure(capsys):
    assert main(["--help"]) == 0
    assert "verify" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_lists_every_option_with_its_default(command: Command, capsys):
    assert main([command.name, "--help"]) == 0
    output = capsys.readouterr().out
    assert f"usage: fqgan-data {command.name} SRC" in output
    for name, field in command.options_type.model_fields.items():
        assert f"  {name}=" in output
        assert field.description, f"{name} is not explained"


def test_a_path_may_look_like_an_option_after_dot_slash(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["stats", "./a=b"]) == 1
    assert "a=b/index.json: no such file" in capsys.readouterr().err


def test_a_mistyped_command_is_named(capsys):
    assert main(["reshad", "a", "b"]) == 2
    assert "did you mean 'reshard'?" in capsys.readouterr().err


def test_a_missing_source_fails(tmp_path: Path, capsys):
    out = str(tmp_path / "out")
    assert main(["shard", str(tmp_path / "none"), out, "name=x", "split=train"]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("depth", ["deep=false", "deep=true"])
def test_verify_finds_a_whole_dataset_whole(dataset: Path, depth: str, capsys):
    code, report = run_json(capsys, "verify", str(dataset), depth, "workers=1")
    assert (code, report["damages"], report["num_shards"]) == (0, [], 3)
    assert report["num_decoded"] == (12 if depth == "deep=true" else 0)


def test_verify_names_damage_and_exits_3(dataset: Path, capsys):
    (dataset / "shard-000001.tar").unlink()
    (dataset / "stray.txt").write_text("x")
    code, report = run_json(capsys, "verify", str(dataset))
    assert (code, report["unlisted_files"]) == (3, ["stray.txt"])
    assert [damage["where"] for damage in report["damages"]] == ["shard-000001.tar"]
    assert main(["verify", str(dataset)]) == 3
    assert "shard-000001.tar: missing" in capsys.readouterr().out


def test_verify_shows_images_that_occur_twice(images: Path, tmp_path: Path, capsys):
    (images / "b" / "again.png").write_bytes((images / "a" / "3.png").read_bytes())
    out = str(tmp_path / "out")
    assert main(["shard", str(images), out, "name=x", "split=train"]) == 0
    assert main(["verify", out, "deep=true"]) == 0
    # The images of both classes are the same ones in this test.
    assert "7 images have the very bytes of another one" in capsys.readouterr().out


def test_verify_without_a_dataset_fails(tmp_path: Path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "name the folder of a dataset" in capsys.readouterr().err


def test_index_says_what_it_did(images: Path, tmp_path: Path, capsys):
    for number in range(2):
        write_tar(
            tmp_path / f"{number}.tar",
            [(f"k{number}.png", png(1)), (f"k{number}.cls", b"%d" % number), ("x.txt", b"odd")],
        )
    (tmp_path / "classes.txt").write_text("zero\tthe first\none\n")
    arguments = ["index", str(tmp_path), "name=x", "split=val", "workers=1"]
    code, summary = run_json(capsys, *arguments, f"classes={tmp_path / 'classes.txt'}")
    assert (code, summary["num_samples"], summary["num_classes"]) == (0, 2, 2)
    assert summary["num_problems"] == 2
    assert load_index(Storage(tmp_path)).class_descriptions == {"zero": "the first"}
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "nothing was done" in output
    assert "0.tar/x: skipped: no image" in output


def test_stats_count_what_is_there(dataset: Path, capsys):
    code, stats = run_json(capsys, "stats", str(dataset))
    assert code == 0
    assert (stats["num_samples"], stats["num_classes"], stats["num_shards"]) == (12, 2, 3)
    assert stats["samples_per_class"] == {"minimum": 6, "median": 6, "maximum": 6}
    assert stats["width"] == {"minimum": 20, "median": 20, "maximum": 20}
    assert stats["height"] == {"minimum": 10, "median": 12.5, "maximum": 15}
    assert main(["stats", str(dataset)]) == 0
    assert "10 to 15, median 12.5" in capsys.readouterr().out

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_tools.cli import main
from fqgan_dist.data.index import load_index, load_samples
from fqgan_dist.data.storage import Storage


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
    assert main([*arguments, "samples_per_shard=4"]) == 0
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
    index = load_index(Storage(tmp_path / "out"), "")
    assert "12 images of 2 classes in 1 shards (1 written" in output
    assert index.dataset_id in output
    assert "a/notes.txt: skipped" in output


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
    assert load_index(Storage(tmp_path / "out"), "").num_samples == 24


def test_a_class_file_gives_labels_and_readable_names(images: Path, tmp_path: Path):
    (tmp_path / "classes.tsv").write_text("b\tbulbul\nz\na\tant\n")
    out = tmp_path / "out"
    arguments = ["shard", str(images), str(out), "name=x", "split=train"]
    assert main([*arguments, f"classes={tmp_path / 'classes.tsv'}"]) == 0
    index = load_index(Storage(out), "")
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
        (["shrad", "a", "b"], "shrad"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage_exits_2_with_the_reason(arguments: list[str], message: str, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_is_no_failure(capsys):
    assert main(["--help"]) == 0
    assert "verify" in capsys.readouterr().out


def test_a_missing_source_fails(tmp_path: Path, capsys):
    out = str(tmp_path / "out")
    assert main(["shard", str(tmp_path / "none"), out, "name=x", "split=train"]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("depth", ["deep=false", "deep=true"])
def test_verify_finds_a_whole_dataset_whole(dataset: Path, depth: str, capsys):
    code, report = run_json(capsys, "verify", str(dataset), depth)
    assert (code, report["damages"], report["num_shards"]) == (0, [], 3)
    assert report["num_decoded"] == (12 if depth == "deep=true" else 0)


def test_verify_without_a_dataset_fails(tmp_path: Path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "name the folder of a dataset" in capsys.readouterr().err


def test_verify_names_every_damaged_file(dataset: Path, capsys):
    flipped = bytearray((dataset / "shard-000000.tar").read_bytes())
    flipped[700] ^= 1
    (dataset / "shard-000000.tar").write_bytes(flipped)
    (dataset / "shard-000001.tar").unlink()
    (dataset / "shard-000002.samples.parquet").write_bytes(b"PAR1")
    (dataset / "stray.txt").write_text("x")
    code, report = run_json(capsys, "verify", str(dataset))
    assert code == 3
    assert [damage["where"] for damage in report["damages"]] == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.samples.parquet",
    ]
    assert report["unlisted_files"] == ["stray.txt"]
    assert main(["verify", str(dataset)]) == 3
    assert "shard-000001.tar: missing" in capsys.readouterr().out


def test_verify_names_a_cut_tar(dataset: Path, capsys):
    path = dataset / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    code, report = run_json(capsys, "verify", str(dataset), "deep=true")
    reasons = [f"{damage['where']}: {damage['reason']}" for damage in report["damages"]]
    assert code == 3
    assert any("shard-000001.tar: 3000 bytes" in reason for reason in reasons)
    assert any("not in the tar" in reason for reason in reasons)


def test_verify_names_a_damaged_index(dataset: Path, capsys):
    path = dataset / "index.json"
    path.write_bytes(path.read_bytes()[:-20])
    code, report = run_json(capsys, "verify", str(dataset))
    assert (code, report["damages"][0]["where"]) == (3, "index.json")


def test_deep_verify_names_the_damaged_sample(dataset: Path, capsys):
    storage = Storage(dataset)
    shard = load_index(storage, "").shards[1]
    table = load_samples(storage, "", shard)
    data = bytearray((dataset / shard.file).read_bytes())
    start = int(table.offsets[2])
    data[start : start + 8] = bytes(8)
    (dataset / shard.file).write_bytes(data)
    code, report = run_json(capsys, "verify", str(dataset), "deep=true")
    assert code == 3
    assert [damage["where"] for damage in report["damages"]] == [
        shard.file,
        f"{shard.file}: {table.keys[2]}",
    ]


def test_deep_verify_finds_a_changed_label(dataset: Path, capsys):
    storage = Storage(dataset)
    shard = load_index(storage, "").shards[0]
    with tarfile.open(dataset / shard.file) as tar:
        member = next(member for member in tar if member.name.endswith(".cls"))
    data = bytearray((dataset / shard.file).read_bytes())
    data[member.offset_data] ^= 1  # "0" <-> "1"
    (dataset / shard.file).write_bytes(data)
    _, report = run_json(capsys, "verify", str(dataset), "deep=true")
    assert "label, offset, size" in report["damages"][1]["reason"]


def test_stats_count_what_is_there(dataset: Path, capsys):
    code, stats = run_json(capsys, "stats", str(dataset))
    assert code == 0
    assert (stats["num_samples"], stats["num_classes"], stats["num_shards"]) == (12, 2, 3)
    assert stats["samples_per_class"] == {"minimum": 6, "median": 6, "maximum": 6}
    assert stats["width"] == {"minimum": 20, "median": 20, "maximum": 20}
    assert stats["height"] == {"minimum": 10, "median": 12.5, "maximum": 15}
    assert main(["stats", str(dataset)]) == 0
    assert "10 to 15, median 12.5" in capsys.readouterr().out

"""Odd inputs that people reported, drawn by `cases/make_cases.py` beside the test data.

Each test names the case; the rule behind it is held for every container elsewhere
(`test_every_container.py`, `test_splits.py`, `test_odd_samples.py`, `test_layouts.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_tasks import load_tiny

from data_tools.cli import main
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import load_samples
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.orchestration.pipeline import open_checked_run, run_stage_here, run_stages
from fqgan_dist.sharding.verification import verify_dataset
from fqgan_dist.storage.storage import Storage

Shard = Callable[..., Any]


@pytest.fixture(scope="module")
def cases(test_data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = test_data_dir.parent / "cases" / "make_cases.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    out = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, script, out], check=True, stdout=subprocess.DEVNULL)
    return out


class Sharded:
    """What `fqgan-data shard` made of a source."""

    def __init__(self, folder: Path, problems: list[dict[str, str]]) -> None:
        self.dataset = Dataset.open(Storage(folder))
        self.classes = self.dataset.index.classes
        self.problems = {problem["name"]: problem["reason"] for problem in problems}
        tables = [load_samples(Storage(folder), entry) for entry in self.dataset.index.shards]
        self.labels = sorted(int(label) for table in tables for label in table.labels)


@pytest.fixture
def shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shard:
    def call(source: Path | str, *options: str, split: str = "train") -> Sharded:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        arguments = ["shard", str(source), str(out), "name=x", f"split={split}", "workers=1"]
        capsys.readouterr()
        code = main([*arguments, *options, "--json"])
        found = capsys.readouterr()
        assert code == 0, found.err
        return Sharded(out, json.loads(found.out)["problems"])

    return call


def run_shards(tmp_path: Path, source: Path | str, *settings: str) -> tuple[Dataset, Dataset]:
    root = tmp_path / "run"
    config = load_tiny(
        f"storage.root={root}", "stages=[shards]", f"data.source={source}", *settings
    )
    run_stages(open_checked_run(config), run_stage_here)
    train, val = (Dataset.open(Storage(next(root.glob(f"data/*/{s}")))) for s in ("train", "val"))
    return train, val


HUB = "hf_imagenet/repo"


@pytest.mark.parametrize(
    ("source", "split", "count"),
    [
        ("data", "train", 12),
        ("data", "validation", 3),
        ("", "train", 12),
        ("data/train-*.parquet", "train", 12),
        ("data/train-{00000..00001}-of-00002.parquet", "train", 12),
    ],
)
def test_1_and_2_a_repository_of_the_hub(
    cases: Path, shard: Shard, source: str, split: str, count: int
) -> None:
    found = shard(cases / HUB / source, split=split)
    assert len(found.labels) == count
    assert found.labels == sorted([0, 1, 2] * (count // 3))


def test_1_a_split_without_labels_says_so(
    cases: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["shard", str(cases / HUB / "data"), str(tmp_path / "o"), "name=x", "split=test"]
    assert main(arguments) == 1
    assert "no label: -1" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["data", ""])
def test_1_a_run_trains_on_train_and_validates_on_validation(
    cases: Path, tmp_path: Path, source: str
) -> None:
    train, val = run_shards(tmp_path, cases / HUB / source)
    assert (train.index.num_samples, val.index.num_samples) == (12, 3)


def test_4_droppings_are_no_classes(cases: Path, shard: Shard) -> None:
    found = shard(cases / "desktop_droppings" / "train")
    assert found.classes == ["n01", "n02"]
    assert found.labels == [0] * 4 + [1] * 4
    assert set(found.problems) == {
        *(".DS_Store", ".Trash-1000", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found"),
        *("n01/.DS_Store", "n01/._n01_0.JPEG", "n01/@eaDir", "n01/Thumbs.db", "n02/desktop.ini"),
    }


def test_6_minus_one_is_no_class(cases: Path, shard: Shard) -> None:
    found = shard(cases / "minus_one" / "m.parquet")
    assert found.classes == ["0", "1", "2"]
    assert found.labels == [0, 1, 1, 2]
    assert found.problems == {"m-00000000": "no label: -1"}


def test_8_numbers_are_ordered_as_numbers(cases: Path, shard: Shard) -> None:
    folder = shard(cases / "number_classes" / "train")
    manifest = shard(cases / "number_manifest" / "m.csv")
    assert folder.classes == manifest.classes == [str(number) for number in range(12)]
    assert folder.labels == manifest.labels == sorted([*range(12)] * 2)


def test_9_validation_is_validation(cases: Path, tmp_path: Path) -> None:
    train, val = run_shards(tmp_path, cases / "split_names")
    assert (train.index.num_samples, val.index.num_samples) == (40, 8)


def test_11_nothing_behind_the_end_of_a_tar_is_passed_over(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = cases / "concatenated_tar" / "concatenated.tar"
    assert main(["shard", str(source), str(tmp_path / "o"), "name=x", "split=train"]) == 1
    assert "behind" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_13_what_no_view_can_be_made_of_is_not_taken(cases: Path, shard: Shard) -> None:
    found = shard(cases / "thin_for_32" / "train", "view_short_side=32")
    assert len(found.labels) == 12
    assert "90000x1" in found.problems["n01/thin.png"]


def test_13_a_run_knows_the_sizes_of_its_views(cases: Path, tmp_path: Path) -> None:
    train, _ = run_shards(tmp_path, cases / "thin_for_32")
    assert train.index.num_samples == 12
    assert [problem.name for problem in train.index.problems] == ["n01/thin.png"]
    report = verify_dataset(train.folder, is_deep=True)
    assert report.damages == []


def test_15_what_evaluation_will_refuse_is_said_at_once(cases: Path, tmp_path: Path) -> None:
    source = cases / "smaller_than_a_batch"
    config = load_tiny(f"storage.root={tmp_path}/run", f"data.source={source}")
    with pytest.raises(ConfigError, match="1 validation image is too few; rFID needs at least 2"):
        run_stages(open_checked_run(config), run_stage_here)
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("source", ["s3://bucket//x", "s3:/bucket/x", "gs://bucket/x"])
@pytest.mark.parametrize("command", ["shard", "index", "stats", "verify"])
def test_17_a_mistyped_uri_is_a_wrong_usage(
    command: str, source: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = {
        "shard": [str(tmp_path / "o"), "name=x", "split=train"],
        "index": ["name=x", "split=train"],
    }
    assert main([command, source, *more.get(command, [])]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "ConfigError" in error


def test_18_two_images_of_a_sample(
    cases: Path, shard: Shard, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = cases / "wds_several_images" / "s"
    assert main(["shard", str(source), str(tmp_path / "o"), "name=x", "split=train"]) == 1
    assert "image_key=image.jpg" in capsys.readouterr().err
    assert shard(source, "image_key=image.jpg").labels == [1] * 4


def test_21_floats_and_texts_are_classes(cases: Path, shard: Shard) -> None:
    folder = cases / "parquet_odd"
    floats = shard(folder / "float.parquet", "class_key=label")
    assert (floats.classes, floats.labels) == (["0", "1", "2"], [0, 1, 2])
    assert floats.problems == {"float-00000002": "no label: None"}
    assert shard(folder / "strings.parquet").labels == [2, 9, 9, 10]
    assert shard(folder / "dictionary.parquet").labels == [0, 1, 1, 2]
    assert shard(folder / "img2dataset.parquet", "class_key=none").labels == [0] * 4


def test_22_odd_pixels_are_taken_and_broken_ones_named(cases: Path, shard: Shard) -> None:
    found = shard(cases / "odd_images" / "train")
    assert set(found.problems) == {
        f"n01/{name}"
        for name in (
            *("j_animated.gif", "j_gif_named.jpg", "l_truncated.JPEG", "l_truncated_no_eoi.JPEG"),
            *("m_garbage_before.JPEG", "r_bmp.jpg", "r_empty.jpg", "r_html.jpg", "r_tiff.jpg"),
        )
    }
    num_files = sum(1 for path in (cases / "odd_images" / "train").glob("*/*"))
    assert len(found.labels) == num_files - len(found.problems)


KAGGLE = "kaggle_layout/ILSVRC/Data/CLS-LOC"


@pytest.mark.parametrize("labels", ["LOC_val_solution.csv", "ILSVRC/Data/CLS-LOC/val_caffe.txt"])
def test_23_and_67_a_list_names_the_classes_of_flat_images(
    cases: Path, shard: Shard, labels: str
) -> None:
    options = [f"root={cases / KAGGLE / 'val'}"]
    if labels.endswith(".csv"):
        options.append(f"classes={cases}/kaggle_layout/LOC_synset_mapping.txt")
    found = shard(cases / "kaggle_layout" / labels, *options, split="val")
    assert found.labels == [0, 0, 1, 1]


def test_23_a_run_needs_no_class_folders_for_validation(cases: Path, tmp_path: Path) -> None:
    train, val = run_shards(
        tmp_path,
        cases / KAGGLE / "train",
        f"data.validation_source={cases}/kaggle_layout/LOC_val_solution.csv",
        f"data.validation_options.root={cases / KAGGLE / 'val'}",
    )
    assert (train.index.num_samples, val.index.num_samples) == (8, 4)
    assert train.index.classes == val.index.classes


def test_23_both_splits_are_looked_at_before_one_is_written(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the one that holds the validation images"):
        run_shards(tmp_path, cases / KAGGLE)
    val = f"data.validation_source={cases / KAGGLE / 'val'}"
    with pytest.raises(DataError, match="name the list of their classes"):
        run_shards(tmp_path, cases / KAGGLE, val)
    assert not (tmp_path / "run" / "data").exists()


def test_67_sets_without_classes_work(cases: Path, shard: Shard) -> None:
    assert shard(cases / KAGGLE / "test", "class_key=none", split="test").labels == [0] * 4


def test_28_names_of_classes_are_anything(cases: Path, shard: Shard) -> None:
    found = shard(cases / "names_of_classes" / "train")
    assert "x:y" in found.classes
    assert len(found.classes) == 10
    assert not found.problems

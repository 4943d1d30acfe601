from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.rearrange import choose_parts
from fqgan_dist.data.index import DatasetIndex, load_index, load_samples
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.storage.storage import Storage

Samples = dict[str, tuple[str, bytes]]
"""Key -> class name and image."""


def jpeg(number: int, side: int = 40) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (side, side + number, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def make(folder: Path, counts: Mapping[str, int], *options: str, first: int = 0) -> Path:
    """Make a dataset with so many images of each class."""
    images = folder.with_name(f"{folder.name}-images")
    for name, count in counts.items():
        (images / name).mkdir(parents=True)
        for number in range(first, first + count):
            (images / name / f"{number:02d}.jpg").write_bytes(jpeg(number))
    settings = options or ("name=x", "split=train")
    run("shard", images, folder, "samples_per_shard=5", *settings)
    return folder


def run(command: str, *arguments: object, code: int = 0) -> None:
    assert main([command, *map(str, arguments), "workers=1"]) == code


def read(folder: Path) -> Samples:
    storage = Storage(folder)
    index = load_index(storage)
    return {
        key: (index.classes[label], data)
        for shard in index.shards
        for key, label, data in iterate_shard(storage, shard)
    }


def index_of(folder: Path) -> DatasetIndex:
    return load_index(Storage(folder))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make(tmp_path / "dataset", {"a": 12, "b": 6})


def test_reshard_keeps_keys_classes_and_bytes(dataset: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    run("reshard", dataset, tmp_path / "out", "samples_per_shard=9", "seed=3")
    assert read(tmp_path / "out") == read(dataset)
    assert [shard.count for shard in index_of(tmp_path / "out").shards] == [9, 9]
    assert before == {path.name: path.read_bytes() for path in dataset.iterdir()}
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_reshard_made_again_does_nothing(dataset: Path, tmp_path: Path, capsys) -> None:
    run("reshard", dataset, tmp_path / "out")
    capsys.readouterr()
    run("reshard", dataset, tmp_path / "out")
    assert "complete already" in capsys.readouterr().out


def test_an_interrupted_reshard_is_finished(dataset: Path, tmp_path: Path) -> None:
    run("reshard", dataset, tmp_path / "out", "samples_per_shard=6")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name in ("index.json", "shard-000001.tar", "shard-000001.samples.parquet"):
        (tmp_path / "out" / name).unlink()
    run("reshard", dataset, tmp_path / "out", "samples_per_shard=6")
    assert whole == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_reshard_can_make_images_smaller(dataset: Path, tmp_path: Path) -> None:
    run("reshard", dataset, tmp_path / "out", "short_side=32", "name=y")
    index = index_of(tmp_path / "out")
    assert (index.name, index.image_policy["short_side"]) == ("y", 32)
    storage = Storage(tmp_path / "out")
    table = load_samples(storage, index.shards[0])
    assert set(np.minimum(table.widths, table.heights).tolist()) == {32}


def test_the_form_of_reduced_images_is_remembered(tmp_path: Path) -> None:
    made = make(tmp_path / "x", {"a": 6}, "name=x", "split=train", "short_side=32")
    run("reshard", made, tmp_path / "again")
    assert index_of(tmp_path / "again").image_policy == index_of(made).image_policy
    assert read(tmp_path / "again") == read(made)


def test_reduced_images_cannot_be_enlarged(tmp_path: Path, capsys) -> None:
    made = make(tmp_path / "x", {"a": 6}, "name=x", "split=train", "short_side=32")
    run("reshard", made, tmp_path / "out", "short_side=36", code=2)
    assert "expected a smaller size" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(dataset: Path, tmp_path: Path, capsys) -> None:
    capsys.readouterr()
    run("reshard", dataset, tmp_path / "out", "samples_per_shard=6", "--dry-run", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["num_samples"], summary["num_shards"]) == (18, 3)
    assert not (tmp_path / "out").exists()


def test_reshard_takes_indexed_shards(dataset: Path, tmp_path: Path) -> None:
    samples = read(dataset)
    for path in (*dataset.glob("*.json"), *dataset.glob("*.parquet")):
        path.unlink()
    run("index", dataset, "name=x", "split=train", "class_key=json.class")
    run("reshard", dataset, tmp_path / "out")
    assert read(tmp_path / "out") == samples


def test_split_divides_every_class(dataset: Path, tmp_path: Path) -> None:
    whole = read(dataset)
    run("split", dataset, tmp_path / "out", "parts={train: 0.75, val: 0.25}")
    train, val = read(tmp_path / "out" / "train"), read(tmp_path / "out" / "val")
    assert train | val == whole
    assert not train.keys() & val.keys()
    assert Counter(name for name, _ in train.values()) == {"a": 9, "b": 5}
    assert Counter(name for name, _ in val.values()) == {"a": 3, "b": 1}
    assert index_of(tmp_path / "out" / "val").split == "val"
    assert index_of(tmp_path / "out" / "val").classes == ["a", "b"]
    run("split", dataset, tmp_path / "again", "parts={train: 0.75, val: 0.25}")
    assert read(tmp_path / "again" / "val") == val
    run("split", dataset, tmp_path / "other", "parts={train: 0.75, val: 0.25}", "seed=1")
    assert read(tmp_path / "other" / "val") != val


@pytest.mark.parametrize(
    ("parts", "code", "message"),
    [
        ("{train: 0.9, val: 0.2}", 2, "expected positive ones of sum 1"),
        ("{train: 1.2, val: -0.2}", 2, "expected positive ones of sum 1"),
        ("{train: 1.0}", 2, "at least 2"),
        ("{train: 0.9, ../val: 0.1}", 2, "'../val'"),
        ("{train: 0.999, val: 0.001}", 1, "part 'val' would be empty"),
    ],
)
def test_wrong_parts_are_refused(dataset, tmp_path: Path, parts, code, message, capsys) -> None:
    run("split", dataset, tmp_path / "out", f"parts={parts}", code=code)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_of_reduced_images_for_evaluation_must_be_allowed(tmp_path: Path, capsys) -> None:
    made = make(tmp_path / "x", {"a": 6}, "name=x", "split=train", "short_side=32")
    parts = "parts={train: 0.5, val: 0.5}"
    run("split", made, tmp_path / "out", parts, code=2)
    assert "allow_lossy_evaluation" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    run("split", made, tmp_path / "out", parts, "allow_lossy_evaluation=true")
    assert index_of(tmp_path / "out" / "val").image_policy["lossy_evaluation"]
    assert "lossy_evaluation" not in index_of(tmp_path / "out" / "train").image_policy


def test_leave_for_reduced_images_has_no_effect_on_others(dataset, tmp_path: Path, capsys) -> None:
    out, leave = tmp_path / "out", "allow_lossy_evaluation=true"
    run("reshard", dataset, out, leave, "split=val", code=2)
    run("split", dataset, out, "parts={train: 0.5, val: 0.5}", leave, code=2)
    run("merge", dataset, dataset, out, "name=x", leave, code=2)
    assert capsys.readouterr().err.count("allow_lossy_evaluation: has an effect only on") == 3
    assert not out.exists()


def test_shares_hold_in_every_class_and_in_all() -> None:
    names = [f"{label:03d}/{number}" for label in range(50) for number in range(label % 7 + 1)]
    parts = choose_parts(names, [0.8, 0.15, 0.05], seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(names)))
    for rows, share in zip(parts, [0.8, 0.15, 0.05], strict=True):
        assert abs(len(rows) - share * len(names)) <= 1
        counts = Counter(names[row].partition("/")[0] for row in rows)
        for label in range(50):
            assert abs(counts[f"{label:03d}"] - share * (label % 7 + 1)) < 2


def test_merge_unites_classes_by_name(dataset: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", {"b": 3, "c": 2}, "name=y", "split=train", first=20)
    run("merge", dataset, other, tmp_path / "out", "name=both")
    assert read(tmp_path / "out") == read(dataset) | read(other)
    assert index_of(tmp_path / "out").classes == ["a", "b", "c"]


def test_merge_undoes_split(dataset: Path, tmp_path: Path) -> None:
    run("split", dataset, tmp_path / "parts", "parts={train: 0.5, more: 0.5}")
    parts = [tmp_path / "parts" / name for name in ("train", "more")]
    run("merge", *parts, tmp_path / "out", "name=x", "split=train")
    assert read(tmp_path / "out") == read(dataset)


def test_merge_of_the_same_images_is_refused(dataset: Path, tmp_path: Path, capsys) -> None:
    run("merge", dataset, dataset, tmp_path / "out", "name=x", code=1)
    assert "occur in more than one source" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_merge_of_different_splits_needs_one_to_be_named(dataset, tmp_path: Path, capsys) -> None:
    other = make(tmp_path / "other", {"c": 2}, "name=y", "split=val", first=20)
    run("merge", dataset, other, tmp_path / "out", "name=x", code=2)
    assert "say what the new dataset is" in capsys.readouterr().err
    run("merge", dataset, other, tmp_path / "out", "name=x", "split=train")


def test_merge_of_images_of_different_forms_is_refused(dataset, tmp_path: Path, capsys) -> None:
    other = make(tmp_path / "other", {"c": 2}, "name=y", "split=train", "short_side=32", first=20)
    run("merge", dataset, other, tmp_path / "out", "name=x", code=2)
    assert "images that were made alike" in capsys.readouterr().err


def test_what_is_no_dataset_is_not_rearranged(tmp_path: Path, capsys) -> None:
    run("reshard", tmp_path, tmp_path / "out", code=1)
    assert "index.json: no such file" in capsys.readouterr().err

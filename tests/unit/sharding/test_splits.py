"""Files of several splits in one place are told apart."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.containers import CONTAINERS, Images
from support.source_files import png, write_files, write_tar

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.sources.splits import split_of


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train-00000-of-00294.parquet", "train"),
        ("validation-00000-of-00014.parquet", "val"),
        ("test-00000.parquet", "test"),
        ("imagenet1k-train-0000.tar", "train"),
        ("imagenet1k-validation-63.tar", "val"),
        ("ILSVRC2012_val_000.tar", "val"),
        ("dev.tar", "val"),
        ("training0.tar", "train"),
        ("shard-000000.tar", None),
        ("trains-000.tar", None),
        ("latest-000.tar", None),
        ("evaluation.tar", None),
    ],
)
def test_a_name_tells_its_split(file: str, split: str | None) -> None:
    assert split_of(file) == split


def write_table(folder: Path, name: str, color: int) -> None:
    table = pa.table({"image": [png(color)], "label": [0]})
    pq.write_table(table, folder / f"{name}.parquet")


def write_shard(folder: Path, name: str, color: int) -> None:
    write_tar(folder / f"{name}.tar", [(f"k{color}.cls", b"0"), (f"k{color}.png", png(color))])


def write_folders_tar(folder: Path, name: str, color: int) -> None:
    write_tar(folder / f"{name}.tar", [(f"a/{color}.png", png(color))])


def write_folders_zip(folder: Path, name: str, color: int) -> None:
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        archive.writestr(f"a/{color}.png", png(color))


def write_list(folder: Path, name: str, color: int) -> None:
    write_files(folder, [(f"images/{color}.png", png(color))])
    (folder / f"{name}.csv").write_text(f"path,class\nimages/{color}.png,a\n")


TRAIN, VALIDATION, TEST = (
    ["x-train-00-of-02", "x-train-01-of-02"],
    ["x-validation-00-of-01"],
    ["x-test-00-of-01"],
)


@pytest.fixture(params=[write_table, write_shard, write_folders_tar, write_folders_zip])
def write(request: pytest.FixtureRequest) -> Callable[[Path, str, int], None]:
    return request.param


all_kinds = pytest.mark.parametrize(
    "write", [write_table, write_shard, write_folders_tar, write_folders_zip, write_list]
)


@pytest.fixture
def folder(tmp_path: Path, write: Callable[[Path, str, int], None]) -> Path:
    for color, name in enumerate([*TRAIN, *VALIDATION, *TEST]):
        write(tmp_path, name, color)
    return tmp_path


def suffix_of(folder: Path) -> str:
    return next(path.suffix for path in folder.iterdir() if path.is_file())


def read_files(folder: Path, files: str) -> set[bytes]:
    with open_source(str(folder), files=files) as source:
        return {source.read(row) for row in range(len(source))}


def read(uri: str | Path, split: str = "train") -> set[bytes]:
    with open_source(str(uri), split=split) as source:
        return {source.read(row) for row in range(len(source))}


def test_the_split_that_is_asked_for_is_read(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert read(folder) == {png(0), png(1)}
    assert "2 files of train are read; those of test, val are not" in caplog.text
    assert read(folder, "val") == read(folder, "validation") == {png(2)}
    assert read(folder, "test") == {png(3)}
    with open_source(str(folder)) as source:
        assert source.other_splits == {"val", "test"}


def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"test: 1 .*train: 2 .*val: 1 .*asked for is 'mine'"):
        read(folder, "mine")


def test_files_that_do_not_tell_their_split_are_asked_about(
    folder: Path, write: Callable[[Path, str, int], None]
) -> None:
    write(folder, "more", 9)
    with pytest.raises(ConfigError, match=r"no split: 1 \(more\..*pattern such as"):
        read(folder)


def test_files_of_one_split_are_all_read(
    tmp_path: Path, write: Callable[[Path, str, int], None]
) -> None:
    write(tmp_path, "val-0", 0)
    write(tmp_path, "val-1", 1)
    assert read(tmp_path, "train") == {png(0), png(1)}
    with open_source(str(tmp_path)) as source:
        assert source.other_splits == frozenset()


@all_kinds
@pytest.mark.parametrize(
    "pattern",
    [
        "x-train-*",
        "x-train-{00,01}-of-02",
        "x-train-{00..01}-of-02",
        "x-tr???-0[01]-of-02",
        "x-train-*-of-02",
    ],
)
def test_patterns_name_files_of_every_kind(folder: Path, pattern: str) -> None:
    suffix = suffix_of(folder)
    assert read(folder / f"{pattern}{suffix}") == {png(0), png(1)}
    assert read_files(folder, f"{pattern}{suffix}") == {png(0), png(1)}


@all_kinds
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("y-*", r"no such file: none is called 'y-\*\.\w+'; correct it"),
        ("x-train-{00..02}-of-02", r"1 of 3 files are missing: \['x-train-02-of-02\.\w+'\]"),
    ],
)
def test_what_a_pattern_does_not_find_is_an_error(folder: Path, pattern: str, message: str) -> None:
    suffix = suffix_of(folder)
    with pytest.raises(DataError, match=message):
        read(folder / f"{pattern}{suffix}")


@all_kinds
def test_patterns_may_stand_for_folders(
    tmp_path: Path, write: Callable[[Path, str, int], None]
) -> None:
    for color, part in enumerate(["part-0", "part-1", "other"]):
        (tmp_path / part).mkdir()
        write(tmp_path / part, f"x{color}", color)
    suffix = suffix_of(tmp_path / "other")
    assert read(f"{tmp_path}/part-*/x*{suffix}") == {png(0), png(1)}
    assert read(f"{tmp_path}/{{part-1,other}}/x?{suffix}") == {png(1), png(2)}
    with pytest.raises(DataError, match=r"no folder is called 'none-\*'"):
        read(f"{tmp_path}/none-*/x{suffix}")


def test_patterns_of_class_folders_are_joined(tmp_path: Path) -> None:
    for color in range(3):
        write_files(tmp_path / f"part-{color}", [(f"a/{color}.png", png(color))])
    assert read(f"{tmp_path}/part-{{0,2}}") == {png(0), png(2)}
    assert read(f"{tmp_path}/part-[01]") == {png(0), png(1)}
    write_files(tmp_path / "part-3", [("a/0.png", png(9))])
    with pytest.raises(DataError, match=r"a/0\.png"):
        read(f"{tmp_path}/part-*")


Rows = list[tuple[int, str | None]]
"""Colour and split of each image."""


def write_table_rows(folder: Path, rows: Rows, column: str) -> Path:
    splits = pa.array([split for _, split in rows], pa.string())
    images = [png(color) for color, _ in rows]
    table = pa.table({"image": images, "label": [0] * len(rows), column: splits})
    # Several row groups, and pages with dictionaries, as pandas writes them.
    pq.write_table(table, folder / "rows.parquet", row_group_size=2)
    return folder / "rows.parquet"


def write_list_rows(folder: Path, rows: Rows, column: str, ending: str = "csv") -> Path:
    write_files(folder, [(f"i/{color}.png", png(color)) for color, _ in rows])
    path = folder / f"rows.{ending}"
    if ending == "csv":
        lines = [f"path,class,{column}", *(f"i/{color}.png,a,{name or ''}" for color, name in rows)]
    else:
        lines = [
            json.dumps({"path": f"i/{color}.png", "class": "a", column: name})
            for color, name in rows
        ]
    path.write_text("\n".join(lines) + "\n")
    return path


rows_of_every_kind = pytest.mark.parametrize(
    "write_rows", [write_table_rows, write_list_rows, partial(write_list_rows, ending="jsonl")]
)
WriteRows = Callable[[Path, Rows, str], Path]


@rows_of_every_kind
@pytest.mark.parametrize("column", ["split", "Subset", "data set"])
def test_rows_of_the_split_that_is_asked_for_are_read(
    tmp_path: Path, write_rows: WriteRows, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [(0, "train"), (1, "valid"), (2, "train"), (3, "test"), (4, "Training")]
    path = write_rows(tmp_path, rows, column)
    with caplog.at_level("INFO"):
        assert read(path) == {png(0), png(2), png(4)}
    assert f"by the column {column!r} (test: 1, train: 3, val: 1)" in caplog.text
    assert read(path, "validation") == {png(1)}
    with open_source(str(path)) as source:
        assert source.other_splits == {"val", "test"}
    with open_source(str(path), split_key="none") as source:
        assert len(source) == 5
        assert source.other_splits == frozenset()


@rows_of_every_kind
def test_rows_without_a_split_are_asked_about(tmp_path: Path, write_rows: WriteRows) -> None:
    path = write_rows(tmp_path, [(0, "train"), (1, None), (2, "val")], "split")
    with pytest.raises(ConfigError, match=r"none: 1, train: 1, val: 1.*split_key=none"):
        read(path)


@rows_of_every_kind
def test_a_split_of_which_there_is_no_row_is_an_error(
    tmp_path: Path, write_rows: WriteRows
) -> None:
    path = write_rows(tmp_path, [(0, "train"), (1, "extra")], "split")
    with pytest.raises(ConfigError, match=r"extra: 1, train: 1.*asked for is 'val'"):
        read(path, "val")
    assert read(path, "extra") == {png(1)}


@rows_of_every_kind
def test_the_column_of_splits_may_be_named(tmp_path: Path, write_rows: WriteRows) -> None:
    path = write_rows(tmp_path, [(0, "train"), (1, "val"), (2, "extra")], "use")
    assert read(path) == {png(0), png(1), png(2)}
    with open_source(str(path), split="extra", split_key="use") as source:
        assert source.read(0) == png(2)
    with (
        pytest.raises(ConfigError, match=r"split_key: .*none is 'usage'.*split_key=none"),
        open_source(str(path), split_key="usage"),
    ):
        pass


@rows_of_every_kind
def test_a_column_of_something_else_is_none_of_splits(
    tmp_path: Path, write_rows: WriteRows
) -> None:
    path = write_rows(tmp_path, [(0, "train"), (1, "bus"), (2, None)], "set")
    assert read(path) == {png(0), png(1), png(2)}
    path = write_rows(tmp_path, [(0, "val"), (1, "val")], "split")
    assert read(path) == {png(0), png(1)}  # one alone is what was meant, as with files


def test_a_list_of_paths_in_folders_of_splits_is_of_several(tmp_path: Path) -> None:
    files = ["x/train/a/0.png", "x/train/b/1.png", "x/val/a/2.png"]
    write_files(tmp_path, [(name, png(color)) for color, name in enumerate(files)])
    path = tmp_path / "all.csv"
    path.write_text("path,class\n" + "".join(f"{name},{name[-7]}\n" for name in files))
    assert read(path) == {png(0), png(1)}
    assert read(path, "val") == {png(2)}
    with open_source(str(path), split_key="none") as source:
        assert len(source) == 3
    with path.open("a") as file:
        file.write("../secret.png,a\n")  # hides no split
    with open_source(str(path)) as source:
        assert len(source) == 2
        assert [problem.name for problem in source.problems] == ["../secret.png"]


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    files = ["train/0.png", "bus/1.png"]
    write_files(tmp_path, [(name, png(color)) for color, name in enumerate(files)])
    path = tmp_path / "all.csv"
    path.write_text("path,class\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in files))
    assert read(path) == {png(0), png(1)}


IMAGES = [("a", png(0)), ("a", png(1)), ("b", png(2))]


@pytest.mark.parametrize("write", CONTAINERS.values(), ids=CONTAINERS)
def test_files_chooses_images_of_every_kind_of_source(
    tmp_path: Path, write: Callable[[Path, Images], Path]
) -> None:
    uri = str(write(tmp_path / "x", IMAGES))
    assert read_files(Path(uri), "a/*") == {png(0), png(1)}
    with pytest.raises(DataError, match=r"files='c/\*' is the name of none of its 3 images"):
        read_files(Path(uri), "c/*")


def write_tree(path: Path, files: list[tuple[str, bytes]]) -> Path:
    return write_files(path, files)


def write_tree_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    return write_tar(path.with_suffix(".tar"), files)


def write_tree_zip(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, data in files:
            archive.writestr(name, data)
    return path.with_suffix(".zip")


trees = pytest.mark.parametrize("write", [write_tree, write_tree_tar, write_tree_zip])
WriteTree = Callable[[Path, list[tuple[str, bytes]]], Path]


@trees
def test_splits_without_class_folders_are_no_classes(tmp_path: Path, write: WriteTree) -> None:
    uri = write(tmp_path / "x", [("train/0.png", png(0)), ("val/1.png", png(1))])
    with pytest.raises(ConfigError, match=r"called as splits are .*but hold images and no classes"):
        read(uri)
    with open_source(
        str(uri), class_key="none", files="val/*", format=uri.suffix[1:] or "folder"
    ) as source:
        assert [source.read(row) for row in range(len(source))] == [png(1)]


@trees
def test_class_folders_that_lie_deeper_are_found(tmp_path: Path, write: WriteTree) -> None:
    members = [("data/CLS/train/n1/0.png", png(0)), ("data/CLS/val/n1/1.png", png(1))]
    uri = write(tmp_path / "x", members)
    with pytest.raises(DataError, match=r"subfolder=data/CLS/train$"):
        read(uri)
    with open_source(str(uri), subfolder="data/CLS/train") as source:
        assert source.names == ["n1/0.png"]


def test_a_subfolder_may_hold_the_folders_of_splits(tmp_path: Path) -> None:
    write_tree(tmp_path, [("data/train/n1/0.png", png(0)), ("data/val/n1/1.png", png(1))])
    for split, color in (("train", 0), ("val", 1)):
        with open_source(str(tmp_path), subfolder="data", split=split) as source:
            assert source.read(0) == png(color)
            assert source.other_splits == {"train", "val"} - {split}

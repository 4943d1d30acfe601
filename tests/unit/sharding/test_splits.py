"""Files of several splits in one place are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.source_files import png, write_tar

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


TRAIN, VALIDATION, TEST = (
    ["x-train-00-of-02", "x-train-01-of-02"],
    ["x-validation-00-of-01"],
    ["x-test-00-of-01"],
)


@pytest.fixture(params=[write_table, write_shard])
def write(request: pytest.FixtureRequest) -> Callable[[Path, str, int], None]:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, write: Callable[[Path, str, int], None]) -> Path:
    for color, name in enumerate([*TRAIN, *VALIDATION, *TEST]):
        write(tmp_path, name, color)
    return tmp_path


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


@pytest.mark.parametrize(
    "pattern", ["x-train-*", "x-train-{00..01}-of-02", "x-tr???-0[01]-of-02", "x-train-*-of-02"]
)
def test_patterns_name_files_of_every_kind(folder: Path, pattern: str) -> None:
    suffix = next(folder.iterdir()).suffix
    assert read(folder / f"{pattern}{suffix}") == {png(0), png(1)}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("y-*", r"no file is called 'y-\*\.\w+'; correct the pattern"),
        ("x-train-{00..02}-of-02", r"1 of 3 files are missing: \['x-train-02-of-02\.\w+'\]"),
    ],
)
def test_what_a_pattern_does_not_find_is_an_error(folder: Path, pattern: str, message: str) -> None:
    suffix = next(folder.iterdir()).suffix
    with pytest.raises(DataError, match=message):
        read(folder / f"{pattern}{suffix}")

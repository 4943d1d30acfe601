"""What must hold for whatever holds images: classes, missing labels, droppings, ends of tars."""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.containers import (
    CONTAINERS,
    Images,
    write_class_tar,
    write_folder,
    write_manifest,
    write_packed_tar,
    write_parquet,
    write_shards,
    write_zip,
)
from support.source_files import png, tar_bytes, write_files, write_tar

from fqgan_dist.data.index import image_digest
from fqgan_dist.errors import DataError
from fqgan_dist.sharding import problems
from fqgan_dist.sharding.droppings import REASON
from fqgan_dist.sharding.foreign_index import IndexConfig, index_shards
from fqgan_dist.sharding.listing import SourceListing, class_of
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.verification import verify_dataset
from fqgan_dist.storage.storage import Storage

in_every_container = pytest.mark.parametrize("write", CONTAINERS.values(), ids=CONTAINERS)


def content(source: SourceListing) -> set[tuple[int, bytes]]:
    """Give label and digest of every image, as the dataset will have them."""
    numbers = {name: number for number, name in enumerate(source.class_names())}
    return {
        (numbers[class_of(name)], image_digest(source.read(row)))
        for row, name in enumerate(source.names)
    }


@in_every_container
@pytest.mark.parametrize("names", [list(map(str, range(12))), ["n10", "n9", "cat"]])
def test_classes_and_labels_are_the_same(
    tmp_path: Path, write: Callable[[Path, Images], Path], names: list[str]
) -> None:
    images = [
        (name, png(number + 100 * copy)) for number, name in enumerate(names) for copy in (0, 1)
    ]
    expected = names if names[0] == "0" else sorted(names)
    with open_source(str(write(tmp_path / "x", images))) as source:
        assert source.class_names() == expected
        assert content(source) == {
            (expected.index(name), image_digest(data)) for name, data in images
        }
        assert source.problems == []


@pytest.mark.parametrize("kind", sorted(CONTAINERS))
def test_a_source_of_hardly_anything_but_problems_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems, "_MAX_PROBLEMS", 20)
    images = [("a", png(1)), *((f"b{number}", b"") for number in range(40))]
    with (
        pytest.raises(DataError, match=r"[0-9]+ members that are no usable images beside"),
        open_source(str(CONTAINERS[kind](tmp_path / "x", images))),
    ):
        pass


@in_every_container
def test_an_image_without_a_label_is_left_out_and_shifts_no_other(
    tmp_path: Path, write: Callable[[Path, Images], Path]
) -> None:
    images = [(str(label), png(label + 2)) for label in (-1, 0, 1, 2)]
    with open_source(str(write(tmp_path / "x", images))) as source:
        assert source.class_names() == ["0", "1", "2"]
        assert content(source) == {(n, image_digest(png(n + 2))) for n in range(3)}
        # The image is named, and where there is one, the class folder that has no other.
        left_out = [p for p in source.problems if "no label" in p.reason or "'-1'" in p.reason]
        assert len(left_out) == 1
        assert {p.name for p in source.problems} - {left_out[0].name} <= {"-1"}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "tar"])
def test_whole_numbers_with_a_missing_one_among_them_are_the_same_classes(
    tmp_path: Path, suffix: str
) -> None:
    labels = [*map(float, range(12)), math.nan]
    path = tmp_path / f"x.{suffix}"
    files = [(f"{row}.png", png(row)) for row in range(len(labels))]
    match suffix:
        case "csv":
            rows = [
                f"{row}.png,{'' if math.isnan(value) else value}\n"
                for row, value in enumerate(labels)
            ]
            path.write_text("path,class\n" + "".join(rows))
            write_files(tmp_path, files)
        case "jsonl":
            lines = [json.dumps({"path": f"{row}.png", "class": v}) for row, v in enumerate(labels)]
            path.write_text("\n".join(lines))
            write_files(tmp_path, files)
        case "parquet":
            table = pa.table({"image": [data for _, data in files], "label": labels})
            pq.write_table(table, path)
        case _:
            fields = [
                (f"{row}.json", json.dumps({"label": v}).encode()) for row, v in enumerate(labels)
            ]
            write_tar(path, [member for pair in zip(files, fields, strict=True) for member in pair])
    options = {"class_key": "json.label"} if suffix == "tar" else {}
    with open_source(str(path), **options) as source:
        assert source.class_names() == list(map(str, range(12)))
        assert content(source) == {(n, image_digest(png(n))) for n in range(12)}
        assert len(source.problems) == 1


@pytest.mark.parametrize(
    "write", [write_folder, write_class_tar, write_packed_tar, write_zip, write_manifest]
)
@pytest.mark.parametrize(
    ("name", "noted"),
    [
        (".ipynb_checkpoints/a-checkpoint.png", ".ipynb_checkpoints"),
        ("__MACOSX/a/._1.png", "__MACOSX"),
        ("@eaDir/1.png", "@eaDir"),
        (".Trash-1000/files/old.png", ".Trash-1000"),
        ("lost+found/1.png", "lost+found"),
        ("$RECYCLE.BIN/1.png", "$RECYCLE.BIN"),
        ("a/._1.png", "a/._1.png"),
        ("a/Thumbs.db", "a/Thumbs.db"),
        ("b/desktop.ini", "b/desktop.ini"),
        ("a/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "a/@eaDir"),
        (".DS_Store", ".DS_Store"),
    ],
)
def test_what_systems_and_tools_leave_is_no_class_and_no_image(
    tmp_path: Path, write: Callable[[Path, Images], Path], name: str, noted: str
) -> None:
    path = write(tmp_path / "x", [("a", png(1)), ("b", png(2))])
    match path.suffix:
        case ".zip":
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(name, png(3))
        case ".tar" | ".gz":
            images = [("a/000.png", png(1)), ("b/001.png", png(2)), (name, png(3))]
            write_tar(path, images)
        case ".csv":
            write_files(path.parent, [(name, png(3))])
            path.write_text(f"{path.read_text()}{name},a\n")
        case _:
            write_files(path, [(name, png(3))])
    with open_source(str(path)) as source:
        assert source.names == ["a/000.png", "b/001.png"]
        assert source.class_names() == ["a", "b"]
        assert [(p.name, p.reason) for p in source.problems] == [(noted, REASON)]


def test_what_a_mac_packs_into_a_tar_of_tars_is_no_class_and_no_image(tmp_path: Path) -> None:
    inner = tar_bytes([("1.png", png(1)), ("._1.png", b"\0\5\x16\7")])
    path = write_tar(tmp_path / "x.tar", [("a.tar", inner), ("._a.tar", b"\0\5\x16\7")])
    with open_source(str(path)) as source:
        assert source.names == ["a/1.png"]
        assert {p.name: p.reason for p in source.problems} == {
            "._a.tar": REASON,
            "a/._1.png": REASON,
        }


@pytest.mark.parametrize("write", [write_shards, write_parquet])
def test_droppings_beside_shards_and_tables_are_not_read(
    tmp_path: Path, write: Callable[[Path, Images], Path]
) -> None:
    path = write(tmp_path / "x", [("0", png(1))])
    folder = path if path.is_dir() else path.parent
    (folder / f"._a{'.tar' if path.is_dir() else '.parquet'}").write_bytes(b"\0\5\x16\7")
    with open_source(str(folder)) as source:
        assert len(source) == 1


@in_every_container
def test_a_colon_in_a_name_is_a_character(
    tmp_path: Path, write: Callable[[Path, Images], Path]
) -> None:
    with open_source(str(write(tmp_path / "x", [("x:y", png(1)), ("z", png(2))]))) as source:
        assert source.class_names() == ["x:y", "z"]
        assert source.problems == []


def test_a_class_folder_without_an_image_is_named_and_no_class(tmp_path: Path) -> None:
    for write in (write_folder, write_class_tar, write_zip):
        path = write(tmp_path / "x", [("a", png(1)), ("b", b"")])
        with open_source(str(path)) as source:
            assert source.class_names() == ["a"]
            reasons = {problem.name: problem.reason for problem in source.problems}
        assert reasons == {
            "b": "a class folder without a usable image: no class",
            "b/001.png": "empty",
        }


def _concatenate(path: Path, first: Images, second: Images, write: Callable[..., Path]) -> Path:
    """Put two finished tars together as `cat` does."""
    folder = path.parent / "second"
    folder.mkdir()
    one, other = write(path, first), write(folder / path.name, second)
    one, other = (next(p.glob("*.tar")) if p.is_dir() else p for p in (one, other))
    one.write_bytes(one.read_bytes() + other.read_bytes())
    return one


@pytest.mark.parametrize("write", [write_class_tar, write_packed_tar, write_shards])
def test_nothing_behind_the_end_mark_is_passed_over(
    tmp_path: Path, write: Callable[[Path, Images], Path]
) -> None:
    one = tar_bytes([("a/1.png", png(1))])
    if write is write_packed_tar:
        path = tmp_path / "x.tar.gz"
        path.write_bytes(gzip.compress(one + tar_bytes([("b/2.png", png(2))])))
    else:
        path = _concatenate(tmp_path / "x", [("a", png(1))], [("b", png(2))], write)
    with (
        pytest.raises(DataError, match="goes on behind its end mark at byte"),
        open_source(str(path)),
    ):
        pass


def test_nothing_behind_the_end_mark_of_a_class_s_tar_is_passed_over(tmp_path: Path) -> None:
    both = tar_bytes([("1.png", png(1))]) + tar_bytes([("2.png", png(2))])
    path = write_tar(tmp_path / "x.tar", [("a.tar", both)])
    with pytest.raises(DataError, match=r"a\.tar: the tar goes on"), open_source(str(path)):
        pass


def test_index_and_verify_look_behind_the_end_mark(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "x", [("0", png(1))])
    shard = folder / "a-000000.tar"
    whole = shard.read_bytes()
    index_shards(Storage(folder), IndexConfig(name="x", split="train"))
    shard.write_bytes(whole + whole)
    report = verify_dataset(Storage(folder), is_deep=True)
    assert any("behind its end mark" in damage.reason for damage in report.damages)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="goes on behind its end mark"):
        index_shards(Storage(folder), IndexConfig(name="x", split="train"))


def test_zeros_behind_the_end_mark_are_padding(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a/1.png", png(1))])
    path.write_bytes(path.read_bytes() + bytes(100_000))
    with open_source(str(path)) as source:
        assert len(source) == 1

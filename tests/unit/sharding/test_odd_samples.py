"""Shards of which not every sample can be used: `shard` and `index` say the same reason."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.source_files import png, write_tar

from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.foreign_index import IndexConfig, index_shards
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.verification import verify_dataset
from fqgan_dist.storage.storage import Storage

NUM_SAMPLES = 3


def shard(folder: Path, **options: str) -> dict[str, str]:
    with open_source(str(folder), format="webdataset", **options) as source:
        return {problem.name: problem.reason for problem in source.problems}


def index(folder: Path, **options: str) -> dict[str, str]:
    config = IndexConfig(name="n", split="train", view_short_side=1, **options)
    report = index_shards(Storage(folder), config)
    return {problem.name: problem.reason for problem in report.index.problems}


Read = Callable[..., dict[str, str]]
by_both = pytest.mark.parametrize("read", [shard, index])


def write(folder: Path, *endings: str, text: bytes = b"1", joined: str = ".") -> None:
    """Write samples of these members; those of images hold one, others a text."""
    members = [
        (f"k{number}{joined}{ending}", png(number) if "png" in ending else text)
        for number in range(NUM_SAMPLES)
        for ending in endings
    ]
    write_tar(folder / "x.tar", members)


@by_both
@pytest.mark.parametrize(
    ("endings", "reason"),
    [
        (["a.png", "b.png", "cls"], r"2 images: it has \.a\.png, \.b\.png, .*image_key=a\.png"),
        (["png", "jpg", "cls"], r"2 images: it has .*image_key=png"),
        (["png", "png", "cls"], "2 images of one kind"),
        (["rgb.png", "cls"], r"an image of a longer ending.*image_key=rgb\.png"),
        (["5.png", "5.cls"], "key ends at the first dot of the names; replace the dots"),
        (["png", "txt"], r"no member \.cls .*has \.png, \.txt.*class_key=txt or class_key=none"),
        (["png", "json"], r"no member \.cls .*class_key=json\.FIELD or class_key=none"),
        (["png"], r"no member \.cls .* it has \.png; say where the label is with class_key=none"),
        (["npy", "cls"], r"no image: it has \.npy, \.cls; expected one \.jpg"),
        (["png", "cls", "cls"], r"2 members \.cls"),
    ],
)
def test_the_reason_is_that_of_the_samples(
    tmp_path: Path, read: Read, endings: list[str], reason: str
) -> None:
    write(tmp_path, *endings)
    with pytest.raises(DataError, match=reason) as caught:
        read(tmp_path)
    assert str(caught.value).count("x.tar/k") == 1, "said once, not of every sample"


@by_both
@pytest.mark.parametrize(
    ("text", "reason"), [(b"-1", "no label: '-1'"), (b"nan", "no label: 'nan'"), (b"", "no label")]
)
def test_samples_without_a_label_say_so(
    tmp_path: Path, read: Read, text: bytes, reason: str
) -> None:
    write(tmp_path, "png", "cls", text=text)
    with pytest.raises(DataError, match=reason):
        read(tmp_path)


@by_both
def test_an_unsorted_tar_is_named_as_what_it_is(tmp_path: Path, read: Read) -> None:
    images = [(f"k{number}.png", png(number)) for number in range(NUM_SAMPLES)]
    labels = [(f"k{number}.cls", b"1") for number in range(NUM_SAMPLES)]
    write_tar(tmp_path / "x.tar", [*images, *labels])
    with pytest.raises(DataError, match=r"do not follow each other; make the tar again .* sorted"):
        read(tmp_path)


@by_both
def test_names_with_backslashes_are_named(tmp_path: Path, read: Read) -> None:
    write_tar(tmp_path / "x.tar", [("a\\k.png", png()), ("a\\k.cls", b"1")])
    with pytest.raises(DataError, match="a backslash in the name"):
        read(tmp_path)


@by_both
def test_what_systems_leave_is_no_sample(tmp_path: Path, read: Read) -> None:
    good = [("k.png", png()), ("k.cls", b"0")]
    left = ["__MACOSX/k.png", "__MACOSX/k.cls", ".ipynb_checkpoints/c.png", "._k.png", "a.idx"]
    write_tar(tmp_path / "x.tar", [*good, *((name, png(1)) for name in left)])
    found = read(tmp_path)
    assert sorted(found) == [
        f"x.tar/{name}" for name in ("._k.png", ".ipynb_checkpoints", "__MACOSX", "a.idx")
    ]


def to_v7(data: bytes) -> bytes:
    """Write the headers of a tar as they were before POSIX: without a mark and what it brought."""
    blocks = [bytearray(data[start : start + 512]) for start in range(0, len(data), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[257:500] = bytes(243)
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def test_tars_as_old_as_version_7_are_read_like_others(tmp_path: Path) -> None:
    write(tmp_path, "png", "cls")
    path = tmp_path / "x.tar"
    path.write_bytes(to_v7(path.read_bytes()))
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 2 * NUM_SAMPLES
    assert shard(tmp_path) == index(tmp_path) == {}
    assert verify_dataset(Storage(tmp_path), is_deep=True).damages == []
    dataset = Dataset.open(Storage(tmp_path))
    (entry,) = dataset.index.shards
    images = [data for _, _, data in iterate_shard(dataset.folder, entry)]
    assert images == [png(number) for number in range(NUM_SAMPLES)]


def test_a_tar_of_class_folders_of_version_7_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a/0.png", png(0)), ("b/1.png", png(1))])
    path.write_bytes(to_v7(path.read_bytes()))
    with open_source(str(path)) as source:
        assert source.names == ["a/0.png", "b/1.png"]

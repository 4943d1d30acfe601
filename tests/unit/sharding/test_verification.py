from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image
from support.observers import RecordingObserver
from support.source_files import write_files
from support.synthetic_shards import pack

from fqgan_dist.data.index import (
    DatasetIndex,
    ShardEntry,
    encode_samples,
    load_index,
    load_samples,
)
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.building import build_dataset
from fqgan_dist.sharding.extending import ExtensionConfig, extend_dataset
from fqgan_dist.sharding.foreign_index import IndexConfig, index_shards
from fqgan_dist.sharding.plan import ShardingConfig
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.verification import VerifyReport, verify_dataset
from fqgan_dist.storage.hashing import hash_object
from fqgan_dist.storage.storage import Storage


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (24, 20 + number, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def dataset(tmp_path: Path) -> Storage:
    """Three shards of four images of two classes."""
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    storage = Storage(tmp_path / "dataset")
    config = ShardingConfig(name="x", split="train", samples_per_shard=4)
    with open_source(str(tmp_path / "images")) as source:
        build_dataset(source, storage, config)
    return storage


def entries(storage: Storage) -> list[ShardEntry]:
    return load_index(storage).shards


def change(storage: Storage, file: str, edit: Callable[[bytearray], None]) -> None:
    data = bytearray(storage.read_bytes(file))
    edit(data)
    storage.write_bytes(file, bytes(data))


def verify(storage: Storage, *, is_deep: bool = True) -> VerifyReport:
    return verify_dataset(storage, is_deep=is_deep)


def found(report: VerifyReport) -> dict[str, str]:
    return {damage.where: damage.reason for damage in report.damages}


def adopt(storage: Storage, file: str, tar: bytes) -> None:
    """Replace a tar, and let the index vouch for it: as if it had been made so."""
    storage.write_bytes(file, tar)
    sha256, size = hash_object(storage, file)
    index = load_index(storage)
    shards = [
        shard.model_copy(update={"sha256": sha256, "bytes": size}) if shard.file == file else shard
        for shard in index.shards
    ]
    publish(storage, index.model_copy(update={"shards": shards}))


def publish(storage: Storage, index: DatasetIndex) -> None:
    values = index.model_dump()
    storage.write_bytes("index.json", DatasetIndex(**values).to_bytes())


@pytest.mark.parametrize("is_deep", [False, True])
def test_what_never_ends_or_lies_elsewhere_is_damage(dataset: Storage, is_deep: bool) -> None:
    shards = entries(dataset)
    names = [shards[0].file, shards[1].samples_file, shards[2].file, "plan.parquet"]
    root = Path(dataset.root)
    for name in names:
        (root / name).rename(root.parent / name)
    (root / names[0]).symlink_to("/dev/zero")
    (root / names[1]).symlink_to(root.parent / names[1])
    os.mkfifo(root / names[2])
    (root / names[3]).symlink_to("/dev/zero")
    reasons = found(verify(dataset, is_deep=is_deep))
    for name, words in zip(
        names, ("leads out", "leads out", "a device, pipe", "leads out"), strict=True
    ):
        assert words in reasons[name]


@pytest.mark.parametrize("is_deep", [False, True])
def test_a_whole_dataset_is_whole(dataset: Storage, is_deep: bool) -> None:
    report = verify(dataset, is_deep=is_deep)
    assert (report.damages, report.unlisted_files, report.num_shards) == ([], [], 3)
    assert (report.num_samples, report.num_decoded) == (12, 12 if is_deep else 0)


def test_processes_find_the_same(dataset: Storage) -> None:
    change(dataset, entries(dataset)[1].file, lambda data: data.__setitem__(700, data[700] ^ 1))
    alone = verify(dataset)
    together = verify_dataset(dataset, is_deep=True, workers=2)
    assert alone.damages
    assert together == alone


class _NoisyWay(Storage):
    """Flips a bit of every object the first time that it is read."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.seen: set[str] = set()

    def open_read(self, path: str) -> BinaryIO:
        return io.BytesIO(self._spoil(path, super().read_bytes(path)))

    def read_limited(self, path: str, max_bytes: int) -> bytes:
        data = super().read_limited(path, max_bytes)
        return self._spoil(path, data) if path.endswith(".samples.parquet") else data

    def _spoil(self, path: str, data: bytes) -> bytes:
        if path in self.seen or not path.startswith("shard-"):
            return data
        self.seen.add(path)
        return data[:600] + bytes([data[600] ^ 1]) + data[601:]


@pytest.mark.parametrize("is_deep", [False, True])
def test_bytes_that_are_changed_on_the_way_are_no_damage(dataset: Storage, is_deep: bool) -> None:
    noisy = _NoisyWay(dataset.root)
    assert verify(noisy, is_deep=is_deep).damages == []
    assert len(noisy.seen) == 6


@pytest.mark.parametrize("is_deep", [False, True])
def test_every_flipped_bit_is_found(dataset: Storage, is_deep: bool) -> None:
    file = entries(dataset)[1].file
    whole = dataset.read_bytes(file)
    for place in np.random.default_rng(0).integers(0, len(whole), 12).tolist():
        change(dataset, file, lambda data, at=place: data.__setitem__(at, data[at] ^ 4))
        assert file in found(verify(dataset, is_deep=is_deep))
        dataset.write_bytes(file, whole)
    assert verify(dataset, is_deep=is_deep).damages == []


@pytest.mark.parametrize("is_deep", [False, True])
def test_truncation_is_found(dataset: Storage, is_deep: bool) -> None:
    file = entries(dataset)[0].file
    change(dataset, file, lambda data: data.__delitem__(slice(3000, None)))
    report = verify(dataset, is_deep=is_deep)
    assert "3000 bytes" in " ".join(found(report).values())
    assert any("not in the tar" in reason for reason in found(report).values()) == is_deep


def test_a_deep_look_names_the_damaged_image(dataset: Storage) -> None:
    shard = entries(dataset)[1]
    table = load_samples(dataset, shard)
    start = int(table.offsets[2])
    change(dataset, shard.file, lambda data: data.__setitem__(slice(start, start + 8), bytes(8)))
    assert set(found(verify(dataset))) == {shard.file, f"{shard.file}: {table.keys[2]}"}


def test_changed_pixels_that_decode_are_found_by_the_digest(dataset: Storage) -> None:
    shard = entries(dataset)[1]
    table = load_samples(dataset, shard)
    middle = int(table.offsets[2] + table.sizes[2] // 2)
    tar = bytearray(dataset.read_bytes(shard.file))
    tar[middle] ^= 1
    adopt(dataset, shard.file, bytes(tar))
    assert found(verify(dataset)) == {
        f"{shard.file}: {table.keys[2]}": "other bytes than those of the table, though they decode"
    }


def test_a_sample_that_the_table_does_not_have_is_extra(dataset: Storage) -> None:
    shard = entries(dataset)[0]
    file = io.BytesIO(dataset.read_bytes(shard.file))
    with tarfile.open(fileobj=file, mode="a") as archive:
        for name, data in (("extra.jpg", jpeg(1)), ("extra.cls", b"0"), ("evil.pkl", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    adopt(dataset, shard.file, file.getvalue())
    report = found(verify(dataset))
    assert report[f"{shard.file}: extra"] == "not in the table of samples"
    assert "a pickle" in report[f"{shard.file}: evil.pkl"]
    assert verify(dataset, is_deep=False).damages == []


def test_a_sample_that_the_tar_does_not_have_is_missing(dataset: Storage) -> None:
    shard = entries(dataset)[0]
    table = load_samples(dataset, shard)
    file = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(dataset.read_bytes(shard.file))) as old,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for member in old.getmembers():
            if not member.name.startswith(table.keys[-1]):
                new.addfile(member, old.extractfile(member))
    padding = bytes(shard.bytes - len(file.getvalue()))
    adopt(dataset, shard.file, file.getvalue() + padding)
    assert found(verify(dataset)) == {f"{shard.file}: {table.keys[-1]}": "not in the tar"}


def test_a_changed_label_is_found(dataset: Storage) -> None:
    shard = entries(dataset)[0]
    with tarfile.open(fileobj=io.BytesIO(dataset.read_bytes(shard.file))) as archive:
        label = next(member for member in archive if member.name.endswith(".cls"))
    change(
        dataset,
        shard.file,
        lambda data: data.__setitem__(label.offset_data, data[label.offset_data] ^ 1),
    )
    reasons = found(verify(dataset))
    assert "(label, offset, size, width" in reasons[f"{shard.file}: {label.name[:-4]}"]


def test_missing_and_stray_files_are_named(dataset: Storage) -> None:
    shards = entries(dataset)
    dataset.delete(shards[0].file)
    dataset.delete(shards[1].samples_file)
    dataset.write_bytes("notes\x1b[2J.txt", b"x")
    report = verify(dataset, is_deep=False)
    assert set(found(report)) == {shards[0].file, shards[1].samples_file}
    assert report.unlisted_files == ["notes\\x1b[2J.txt"]


def test_a_damaged_plan_is_damage(dataset: Storage) -> None:
    change(dataset, "plan.parquet", lambda data: data.__setitem__(10, data[10] ^ 1))
    assert set(found(verify(dataset, is_deep=False))) == {"plan.parquet"}
    dataset.write_bytes("plan.json", b"{}")
    assert "plan.json" in found(verify(dataset, is_deep=False))


def test_a_damaged_former_index_is_damage(dataset: Storage, tmp_path: Path) -> None:
    write_files(tmp_path / "more", [("a/90.jpg", jpeg(90))])
    former = f"index-{load_index(dataset).dataset_id[:16]}.json"
    with open_source(str(tmp_path / "more")) as source:
        extend_dataset(source, dataset, ExtensionConfig())
    assert verify(dataset, is_deep=False).damages == []
    change(dataset, former, lambda data: data.__setitem__(10, data[10] ^ 1))
    assert set(found(verify(dataset, is_deep=False))) == {former}


def test_a_damaged_index_is_the_only_damage(dataset: Storage) -> None:
    change(dataset, "index.json", lambda data: data.__delitem__(slice(-20, None)))
    report = verify(dataset)
    assert (set(found(report)), report.dataset_id) == ({"index.json"}, None)


def test_without_a_dataset_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the folder of a dataset"):
        verify(Storage(tmp_path))


def test_a_key_of_two_shards_is_damage_and_equal_images_are_a_note(dataset: Storage) -> None:
    index = load_index(dataset)
    first, second = index.shards[:2]
    dataset.write_bytes("copy.tar", dataset.read_bytes(first.file))
    table = dataset.read_bytes(first.samples_file)
    dataset.write_bytes("copy.samples.parquet", table)
    copy = first.model_copy(update={"file": "copy.tar"})
    publish(dataset, index.model_copy(update={"shards": [*index.shards, copy]}))
    report = verify(dataset)
    keys = load_samples(dataset, first).keys
    assert set(found(report)) == {f"copy.samples.parquet: {key}" for key in keys}
    assert report.num_duplicates == 4
    assert report.duplicates[0] == [f"{first.file}: {keys[0]}", f"copy.tar: {keys[0]}"]
    assert verify(dataset, is_deep=False).num_duplicates == 0
    assert second.file not in str(report.duplicates)


def test_a_label_beyond_the_classes_is_damage(dataset: Storage) -> None:
    index = load_index(dataset)
    shard = index.shards[0]
    table = load_samples(dataset, shard)
    labels = table.labels.copy()
    labels[1] = 7
    data = encode_samples(replace(table, labels=labels), {})
    dataset.write_bytes(shard.samples_file, data)
    sha256, _ = hash_object(dataset, shard.samples_file)
    shards = [shard.model_copy(update={"samples_sha256": sha256}), *index.shards[1:]]
    publish(dataset, index.model_copy(update={"shards": shards}))
    where = f"{shard.samples_file}: {table.keys[1]}"
    assert found(verify(dataset, is_deep=False)) == {where: "label 7; there are 2 classes"}


@pytest.fixture
def foreign(tmp_path: Path) -> Storage:
    """Indexed shards with names of classes, and with things that are not in the dataset."""
    members = [("./a.jpg", jpeg(1)), ("./a.txt", b"cat"), ("b.jpg", jpeg(2)), ("b.txt", b"dog")]
    members += [("odd.txt", b"dog"), ("c.pkl", b"x"), ("../up", b"x")]
    storage = Storage(tmp_path / "foreign")
    storage.write_bytes("0.tar", pack(members))
    storage.write_bytes("1.tar", pack([("z.jpg", jpeg(3)), ("z.txt", b"dog")]))
    index_shards(storage, IndexConfig(name="x", split="train", class_key="txt"))
    return storage


def test_indexed_shards_are_verified_by_their_own_rules(foreign: Storage) -> None:
    report = verify(foreign)
    assert (report.damages, report.num_decoded, report.unlisted_files) == ([], 3, [])


def test_what_was_left_out_twice_is_no_damage(tmp_path: Path) -> None:
    members = [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2)), ("b.cls", b"0"), ("a.cls", b"0")]
    storage = Storage(tmp_path / "foreign")
    storage.write_bytes("0.tar", pack(members))
    report = index_shards(storage, IndexConfig(name="x", split="train"))
    assert [problem.name for problem in report.index.problems] == ["0.tar/a", "0.tar/a"]
    assert verify(storage).damages == []


def test_a_wrong_label_of_indexed_shards_is_found(foreign: Storage) -> None:
    tar = foreign.read_bytes("1.tar").replace(b"dog", b"cat")
    adopt(foreign, "1.tar", tar)
    assert "(label, offset" in found(verify(foreign))["1.tar: z"]


def test_an_extension_of_indexed_shards_is_verified_by_our_rules(
    foreign: Storage, tmp_path: Path
) -> None:
    for name in ("cat", "dog"):
        write_files(tmp_path / "more", [(f"{name}/{name}.jpg", jpeg(len(name) + ord(name[0])))])
    with open_source(str(tmp_path / "more")) as source:
        extend_dataset(source, foreign, ExtensionConfig())
    report = verify(foreign)
    assert (report.damages, report.num_decoded, report.unlisted_files) == ([], 5, [])


@pytest.mark.parametrize("is_deep", [False, True])
def test_it_is_told_how_far_the_tables_and_the_shards_are(foreign: Storage, is_deep: bool) -> None:
    observer = RecordingObserver()
    verify_dataset(foreign, is_deep=is_deep, observer=observer)
    assert observer.lines() == ["reading tables: 2/2 shards", "verifying: 2/2 MiB"]


def test_a_damaged_table_of_problems_is_damage(foreign: Storage) -> None:
    change(foreign, "index.problems.jsonl", lambda data: data.__setitem__(3, data[3] ^ 1))
    assert "index.problems.jsonl" in found(verify(foreign, is_deep=False))

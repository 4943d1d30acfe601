from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fqgan_dist.data.index import (
    DatasetIndex,
    SampleTable,
    ShardEntry,
    decode_samples,
    encode_samples,
    load_index,
    load_samples,
    parse_index,
    write_index,
)
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.images import ImagePolicy
from fqgan_dist.sharding.sample_rules import SampleRules
from fqgan_dist.storage.storage import Storage

ZEROS = "0" * 64


def make_table(keys: list[str] | None = None) -> SampleTable:
    keys = ["a_1", "b-2"] if keys is None else keys
    n = len(keys)
    return SampleTable(
        keys=keys,
        labels=np.arange(n, dtype=np.int32),
        offsets=512 + 1024 * np.arange(n, dtype=np.int64),
        sizes=np.full(n, 100, np.int64),
        widths=np.full(n, 20, np.int32),
        heights=np.full(n, 10, np.int32),
        digests=np.arange(16 * n, dtype=np.uint8).reshape(n, 16),
    )


def make_entry(file: str = "shard-000000.tar", **changes: object) -> ShardEntry:
    values = {"count": 2, "bytes": 10240, "sha256": ZEROS, "samples_sha256": ZEROS} | changes
    return ShardEntry.model_validate({"file": file} | values)


def make_index(**changes: object) -> DatasetIndex:
    values = {
        "name": "tiny",
        "split": "train",
        "classes": ["n01", "n02"],
        "image_policy": {"kind": "original"},
        "shards": [make_entry().model_dump()],
    }
    return DatasetIndex.model_validate(values | changes)


def test_index_reads_back_and_its_id_is_the_hash_of_its_bytes(tmp_path: Path):
    storage = Storage(tmp_path)
    index = make_index(class_descriptions={"n01": "tench, ü"})
    write_index(storage.child("data/train"), index)
    assert load_index(storage.child("data/train")) == index
    data = (tmp_path / "data/train/index.json").read_bytes()
    assert load_index(storage.child("data/train")).dataset_id == hashlib.sha256(data).hexdigest()


def test_index_may_be_at_the_root(tmp_path: Path):
    write_index(Storage(tmp_path), make_index())
    assert load_index(Storage(tmp_path)).num_samples == 2


def test_write_index_twice_is_no_error_but_another_index_is(tmp_path: Path):
    storage = Storage(tmp_path)
    write_index(storage, make_index())
    write_index(storage, make_index())
    with pytest.raises(DataError, match="another dataset is there"):
        write_index(storage, make_index(name="other"))


def test_missing_index_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(DataError, match="fqgan-data shard"):
        load_index(Storage(tmp_path))


@pytest.mark.parametrize(
    "file", ["../x.tar", "/x.tar", "a/b.tar", "..tar", "x.tar.gz", "x", "C:x.tar", "a\\b.tar"]
)
def test_shard_names_that_could_leave_the_folder_are_refused(file: str):
    values = make_index().model_dump()
    values["shards"][0]["file"] = file
    with pytest.raises(DataError, match="is not a shard name"):
        parse_index(json.dumps(values).encode(), source="index.json")


@pytest.mark.parametrize("name", ["..", "a/b", "a\nb", "", "\x1b[31m"])
def test_class_names_with_a_slash_or_control_character_are_refused(name: str):
    values = make_index().model_dump() | {"classes": ["n01", name]}
    with pytest.raises(DataError, match="is not a class name"):
        parse_index(json.dumps(values).encode(), source="index.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["a", "a"]}, "classes: .*'a'.* more than once"),
        ({"shards": [make_entry().model_dump()] * 2}, "shards: .* more than once"),
        ({"class_descriptions": {"n99": "x"}}, "n99.* not in classes"),
        ({"format": "fqgan-dataset-9"}, "format"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_inconsistent_index_is_refused(changes: dict[str, object], message: str):
    data = json.dumps(make_index().model_dump() | changes).encode()
    with pytest.raises(DataError, match=message):
        parse_index(data, source="index.json")


def test_index_edited_by_hand_is_refused():
    data = make_index().to_bytes().replace(b": ", b":  ", 1)
    with pytest.raises(DataError, match="changed by hand"):
        parse_index(data, source="index.json")


def test_table_of_samples_reads_back_with_metadata():
    table = make_table()
    found, metadata = decode_samples(encode_samples(table, {"b": "2", "a": "1"}), source="x")
    assert metadata == {"a": "1", "b": "2"}
    assert found.keys == table.keys
    assert np.array_equal(found.digests, table.digests)
    for name in ("labels", "offsets", "sizes", "widths", "heights"):
        expected = getattr(table, name)
        assert getattr(found, name).dtype == expected.dtype
        np.testing.assert_array_equal(getattr(found, name), expected)


def test_table_bytes_do_not_depend_on_the_order_of_metadata():
    table = make_table()
    assert encode_samples(table, {"a": "1", "b": "2"}) == encode_samples(
        table, {"b": "2", "a": "1"}
    )


@pytest.mark.parametrize("key", ["../a", "a.b", "/a", "a//b", "", "C:a", "a\\b", "a\nb", "k" * 201])
def test_unsafe_keys_are_refused(key: str):
    data = encode_samples(make_table(["a", key]), {})
    with pytest.raises(DataError, match="not a safe key"):
        decode_samples(data, source="x")


@pytest.mark.parametrize("key", ["a_1", "train/n01/a b", "-a", "ü"])
def test_keys_may_be_what_webdataset_calls_keys(key: str):
    table, _ = decode_samples(encode_samples(make_table(["a", key]), {}), source="table")
    assert table.keys == ["a", key]


def test_repeated_keys_are_refused():
    with pytest.raises(DataError, match="more than once"):
        decode_samples(encode_samples(make_table(["a", "a"]), {}), source="x")


def test_negative_offset_is_refused():
    table = dataclasses.replace(make_table(), offsets=np.array([-1, 5]))
    with pytest.raises(DataError, match="-1 is below"):
        decode_samples(encode_samples(table, {}), source="x")


def test_something_else_than_parquet_is_refused():
    with pytest.raises(DataError, match="not a table of samples"):
        decode_samples(b"PAR1 something", source="x")


def save_table(
    tmp_path: Path, table: SampleTable | None = None, **changes: object
) -> tuple[Storage, ShardEntry]:
    data = encode_samples(table or make_table(), {})
    (tmp_path / "shard-000000.samples.parquet").write_bytes(data)
    values = {"samples_sha256": hashlib.sha256(data).hexdigest()} | changes
    return Storage(tmp_path), make_entry(**values)


def test_load_samples_checks_nothing_away(tmp_path: Path):
    storage, entry = save_table(tmp_path)
    assert load_samples(storage, entry).keys == ["a_1", "b-2"]


def test_load_samples_refuses_a_table_of_another_hash(tmp_path: Path):
    storage, entry = save_table(tmp_path, samples_sha256=ZEROS)
    with pytest.raises(DataError, match="sha256"):
        load_samples(storage, entry)


def test_load_samples_refuses_another_count(tmp_path: Path):
    storage, entry = save_table(tmp_path, count=3)
    with pytest.raises(DataError, match="2 samples, the index has 3"):
        load_samples(storage, entry)


def test_load_samples_refuses_a_sample_beyond_the_tar(tmp_path: Path):
    storage, entry = save_table(tmp_path, bytes=1600)
    with pytest.raises(DataError, match="beyond the shard"):
        load_samples(storage, entry)


def test_load_samples_names_a_missing_table(tmp_path: Path):
    with pytest.raises(DataError, match=r"samples\.parquet: no such file"):
        load_samples(Storage(tmp_path), make_entry())


def test_a_sample_so_far_away_that_its_end_wraps_around_is_refused(tmp_path: Path):
    greatest = 2**63 - 1
    table = dataclasses.replace(
        make_table(), offsets=np.array([0, greatest]), sizes=np.array([5, greatest])
    )
    storage, entry = save_table(tmp_path, table)
    with pytest.raises(DataError, match="beyond the shard"):
        load_samples(storage, entry)


@pytest.mark.parametrize("num_bytes", [2**63 - 1, 2**63, 2**64, 10**30])
def test_the_greatest_numbers_do_not_wrap_around(tmp_path: Path, num_bytes: int) -> None:
    greatest = 2**63 - 1
    for offset, size in ((greatest, greatest), (2**62, 2**62), (1, greatest), (greatest, 1)):
        table = dataclasses.replace(
            make_table(), offsets=np.array([0, offset]), sizes=np.array([5, size])
        )
        if num_bytes > greatest:
            with pytest.raises(ValueError, match="less than or equal to 9223372036854775807"):
                save_table(tmp_path, table, bytes=num_bytes)
            continue
        storage, entry = save_table(tmp_path, table, bytes=num_bytes)
        with pytest.raises(DataError, match="beyond the shard"):
            load_samples(storage, entry)


@pytest.mark.parametrize(
    ("policy", "read"),
    [
        ({"kind": "indexed", "class_key": "x"}, SampleRules.of_dataset),
        ({"kind": "indexed", "image_key": 3}, SampleRules.of_dataset),
        ({"kind": "crop", "crop": "a"}, ImagePolicy.parse_description),
        ({"view_short_side": -1}, ImagePolicy.parse_description),
        ({"kind": "crop", "crop": 64, "short_side": 64}, ImagePolicy.parse_description),
    ],
)
def test_an_image_policy_that_is_none_is_named(
    policy: dict[str, object], read: Callable[[dict[str, object]], object]
) -> None:
    with pytest.raises(DataError, match=r"index\.json: image_policy: 1 problem"):
        read(policy)

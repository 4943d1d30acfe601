from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqgan_dist.data.index import ShardEntry
from fqgan_dist.data.record_stores import CodeStore, FeatureStore
from fqgan_dist.data.records import (
    RecordTable,
    check_codebook_size,
    decode_records,
    encode_records,
    pack_codes,
    pack_crops,
)
from fqgan_dist.data.views import CropRecord
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.storage.storage import Storage

FINGERPRINT = "0123456789abcdef"
KEYS = ["a_1", "b_2", "c_3"]


def make_entry(count: int = 3, sha: str = "1") -> ShardEntry:
    return ShardEntry(
        file="shard-000007.tar", count=count, bytes=1024, sha256=sha * 64, samples_sha256="2" * 64
    )


def make_crops(count: int) -> list[CropRecord]:
    return [CropRecord(i, 2 * i, 256, 300 + i, flip=i % 2 == 0) for i in range(count)]


def make_features(count: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"clip": random.normal(size=(count, 12)), "dinov2": random.normal(size=(count, 5))}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.data())
def test_records_round_trip_to_the_bit(count: int, data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    table = RecordTable(
        keys=[f"key_{i}" for i in range(count)],
        views=random.integers(0, 128, count).astype(np.int8),
        crops=pack_crops(make_crops(count)),
        columns={
            "clip": random.normal(size=(count, 7)).astype(np.float16),
            "visual": random.integers(0, 2**16, (count, 4, 4)).astype(np.uint16),
        },
    )
    encoded = encode_records(table, fingerprint=FINGERPRINT, shard_sha256="1" * 64)
    found = decode_records(
        encoded, fingerprint=FINGERPRINT, shard_sha256="1" * 64, source="x", max_rows=100
    )
    assert found.keys == table.keys
    assert np.array_equal(found.crops, table.crops)
    assert np.array_equal(found.views, table.views)
    assert list(found.columns) == ["clip", "visual"]
    for name, values in table.columns.items():
        assert found.columns[name].dtype == values.dtype
        assert np.array_equal(found.columns[name], values)


def test_same_records_give_the_same_bytes() -> None:
    def encode() -> bytes:
        columns = {"clip": np.ones((3, 4), np.float16)}
        table = RecordTable(KEYS, np.zeros(3, np.int8), pack_crops(make_crops(3)), columns)
        return encode_records(table, fingerprint=FINGERPRINT, shard_sha256="1" * 64)

    assert encode() == encode()


def test_columns_are_fixed_size_binary_of_two_bytes_a_number(storage: Storage) -> None:
    store = CodeStore(storage, "codes", FINGERPRINT)
    codes = np.random.default_rng(0).integers(0, 16384, (3, 2, 2, 16, 16))
    crops = [make_crops(2) for _ in KEYS]
    store.write(make_entry(), keys=KEYS, crops=crops, codes=codes, codebooks=["visual", "semantic"])
    schema = pq.read_schema(storage.local_path(store.path(make_entry())))
    assert schema.field("visual").type == pa.binary(2 * 256)
    assert schema.names == [
        *("key", "view", "crop_top", "crop_left", "resized_height", "resized_width", "flip"),
        *("visual", "semantic"),
    ]


def test_features_are_stored_by_shard_and_view(storage: Storage) -> None:
    store = FeatureStore(storage, "features", FINGERPRINT)
    features = make_features()
    assert not store.exists(make_entry(), 3)
    store.write(make_entry(), 3, keys=KEYS, crops=make_crops(3), features=features)
    assert store.exists(make_entry(), 3)
    assert storage.exists(f"features/{FINGERPRINT}/view-03/shard-000007.parquet")
    found = store.read(make_entry(), 3, KEYS)
    assert np.array_equal(found.crops, pack_crops(make_crops(3)))
    for name, values in features.items():
        # Half precision: 11 bits.
        np.testing.assert_allclose(found.columns[name], values, rtol=2**-11)


def test_codes_keep_views_and_codebooks_apart(storage: Storage) -> None:
    store = CodeStore(storage, "codes", FINGERPRINT)
    codes = np.arange(3 * 4 * 2 * 6).reshape(3, 4, 2, 2, 3)
    crops = [make_crops(4) for _ in KEYS]
    store.write(make_entry(), keys=KEYS, crops=crops, codes=codes, codebooks=["visual", "semantic"])
    assert store.exists(make_entry())
    found, damaged = store.read(make_entry(), KEYS)
    assert np.array_equal(found, codes)
    assert not damaged


def test_damaged_images_are_told_and_have_zeros(storage: Storage) -> None:
    features = FeatureStore(storage, "features", FINGERPRINT)
    values, crops = make_features(), make_crops(3)
    features.write(make_entry(), 0, keys=KEYS, crops=crops, features=values, damaged=[1])
    table = features.read(make_entry(), 0, KEYS)
    assert table.damaged == {1}
    for name, column in table.columns.items():
        assert not column[1].any()
        assert np.array_equal(column[[0, 2]], values[name].astype(np.float16)[[0, 2]])
    store = CodeStore(storage, "codes", FINGERPRINT)
    codes = np.arange(1, 1 + 3 * 4 * 2 * 6).reshape(3, 4, 2, 2, 3)
    books = ["visual", "semantic"]
    per_key = [make_crops(4) for _ in KEYS]
    store.write(
        make_entry(), keys=KEYS, crops=per_key, codes=codes, codebooks=books, damaged={0, 2}
    )
    found, damaged = store.read(make_entry(), KEYS)
    assert damaged == {0, 2}
    assert np.array_equal(found[1], codes[1])
    assert not found[[0, 2]].any()
    assert codes.all(), "what was handed in is left alone"
    assert store.read_drawn(make_entry(), KEYS, lambda *_: 3).damaged == {0, 2}


def read_metadata(storage: Storage, path: str) -> dict[str, object]:
    local = storage.local_path(path)
    assert local is not None
    return json.loads(pq.read_metadata(local).metadata[b"fqgan_records"])


def test_files_without_damage_are_those_of_former_software(storage: Storage) -> None:
    store = write_features(storage)
    former = {"format", "fingerprint", "shard_sha256", "num_rows", "content_sha256", "columns"}
    path = store.path(make_entry(), 0)
    assert set(read_metadata(storage, path)) == former
    assert store.read(make_entry(), 0, KEYS).damaged == set()
    store.write(
        make_entry(), 0, keys=KEYS, crops=make_crops(3), features=make_features(), damaged=[2]
    )
    assert set(read_metadata(storage, path)) == {*former, "damaged_rows"}


@pytest.mark.parametrize("rows", [[], [0], [1, 2], [2**70], [-1], ["x"]])
def test_other_damaged_rows_than_those_written_are_refused(
    storage: Storage, rows: list[object]
) -> None:
    store = FeatureStore(storage, "features", FINGERPRINT)
    store.write(
        make_entry(), 0, keys=KEYS, crops=make_crops(3), features=make_features(), damaged=[2]
    )
    path = store.path(make_entry(), 0)
    metadata = read_metadata(storage, path) | {"damaged_rows": rows}
    table = pq.read_table(storage.local_path(path))
    table = table.replace_schema_metadata({b"fqgan_records": json.dumps(metadata)})
    pq.write_table(table, storage.local_path(path))
    with pytest.raises(DataError, match="not a file of records"):
        store.read(make_entry(), 0, KEYS)


def test_damaged_rows_that_are_not_there_are_a_mistake(storage: Storage) -> None:
    store = FeatureStore(storage, "features", FINGERPRINT)
    with pytest.raises((ValueError, IndexError)):
        store.write(
            make_entry(), 0, keys=KEYS, crops=make_crops(3), features=make_features(), damaged=[3]
        )


def write_features(storage: Storage) -> FeatureStore:
    store = FeatureStore(storage, "features", FINGERPRINT)
    store.write(make_entry(), 0, keys=KEYS, crops=make_crops(3), features=make_features())
    return store


class FlippingStorage(Storage):
    """Changes one bit of each of the first `num_wrong` reads, as a bad transfer does."""

    num_wrong = 0

    def read_bytes(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        data = bytearray(super().read_bytes(path, offset=offset, length=length))
        if self.num_wrong:
            self.num_wrong -= 1
            data[-1] ^= 1  # of the mark that a parquet file ends with
        return bytes(data)


def test_a_file_that_came_damaged_is_read_once_more(tmp_path: Path) -> None:
    storage = FlippingStorage(tmp_path)
    store = write_features(storage)
    storage.num_wrong = 1
    assert store.read(make_entry(), 0, KEYS).keys == KEYS
    storage.num_wrong = 2
    with pytest.raises(DataError, match="not a file of records"):
        store.read(make_entry(), 0, KEYS)


def test_features_of_another_shard_are_refused(storage: Storage) -> None:
    with pytest.raises(DataError, match=r"shard sha256 is '1111.*expected '3333"):
        write_features(storage).read(make_entry(sha="3"), 0, KEYS)


def test_features_of_other_weights_are_refused(storage: Storage) -> None:
    store = write_features(storage)
    other = FeatureStore(storage, "features", "f" * 16)
    data = storage.read_bytes(store.path(make_entry(), 0))
    storage.write_bytes(other.path(make_entry(), 0), data)
    with pytest.raises(DataError, match="fingerprint is '0123456789abcdef', expected 'ffff"):
        other.read(make_entry(), 0, KEYS)


@pytest.mark.parametrize("keys", [KEYS[:2], [*KEYS, "d"], KEYS[::-1]])
def test_features_of_other_keys_are_refused(storage: Storage, keys: list[str]) -> None:
    with pytest.raises(DataError, match=r"keys or views are not those of 'shard-000007.tar'"):
        write_features(storage).read(make_entry(), 0, keys)


def test_features_of_another_view_are_refused(storage: Storage) -> None:
    store = write_features(storage)
    data = storage.read_bytes(store.path(make_entry(), 0))
    storage.write_bytes(store.path(make_entry(), 1), data)
    with pytest.raises(DataError, match="keys or views"):
        store.read(make_entry(), 1, KEYS)


@pytest.mark.parametrize("keys", [KEYS[:2], KEYS[::-1], []])
def test_codes_of_other_keys_are_refused(storage: Storage, keys: list[str]) -> None:
    store = CodeStore(storage, "codes", FINGERPRINT)
    codes = np.zeros((3, 2, 1, 2, 2), np.int64)
    crops = [make_crops(2) for _ in KEYS]
    store.write(make_entry(), keys=KEYS, crops=crops, codes=codes, codebooks=["visual"])
    with pytest.raises(DataError, match=r"keys or views are not those of 'shard-000007.tar'"):
        store.read(make_entry(), keys)


@pytest.mark.parametrize("kind", ["no views", "no codebooks"])
def test_codes_of_nothing_are_refused(storage: Storage, kind: str) -> None:
    store = CodeStore(storage, "codes", FINGERPRINT)
    count = 0 if kind == "no views" else len(KEYS)
    columns = {"visual": np.zeros((0, 2, 2), np.uint16)} if kind == "no views" else {}
    crops = pack_crops(make_crops(count))
    table = RecordTable(KEYS[:count], np.zeros(count, np.int8), crops, columns)
    data = encode_records(table, fingerprint=FINGERPRINT, shard_sha256=make_entry().sha256)
    storage.write_bytes(store.path(make_entry()), data)
    with pytest.raises(DataError, match="keys or views are not those"):
        store.read_drawn(make_entry(), KEYS, lambda _, num_views: 1 % num_views)


def test_missing_features_name_the_file(storage: Storage) -> None:
    with pytest.raises(DataError, match=r"view-05/shard-000007.parquet: no such file; run"):
        FeatureStore(storage, "features", FINGERPRINT).read(make_entry(), 5, KEYS)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_flipped_bit_is_found_or_without_effect(place: int, bit: int) -> None:
    random = np.random.default_rng(0)
    columns = {"clip": random.normal(size=(3, 12)).astype(np.float16)}
    table = RecordTable(KEYS, np.zeros(3, np.int8), pack_crops(make_crops(3)), columns)
    data = bytearray(encode_records(table, fingerprint=FINGERPRINT, shard_sha256="1" * 64))
    data[place % len(data)] ^= 1 << bit
    try:
        found = decode_records(
            bytes(data), fingerprint=FINGERPRINT, shard_sha256="1" * 64, source="x", max_rows=3
        )
    except DataError:
        return
    assert found.keys == KEYS
    assert np.array_equal(found.crops, table.crops)
    assert np.array_equal(found.columns["clip"], columns["clip"])


@pytest.mark.parametrize("damage", ["cut", "footer", "other"])
def test_damaged_file_is_a_data_error(storage: Storage, damage: str) -> None:
    store = write_features(storage)
    path = store.path(make_entry(), 0)
    data = storage.read_bytes(path)
    damaged = {
        "cut": data[: len(data) // 2],
        "footer": data[:-40] + bytes(40),
        "other": b"PAR1 something else PAR1",
    }[damage]
    storage.write_bytes(path, damaged)
    with pytest.raises(DataError, match="not a file of records"):
        store.read(make_entry(), 0, KEYS)


def test_parquet_of_somebody_else_is_a_data_error(storage: Storage, tmp_path: Path) -> None:
    store = FeatureStore(storage, "features", FINGERPRINT)
    path = storage.local_path(store.path(make_entry(), 0))
    assert path is not None
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"key": KEYS}), path)
    with pytest.raises(DataError, match="not a file of records"):
        store.read(make_entry(), 0, KEYS)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_features_that_are_not_finite_are_refused(storage: Storage, value: float) -> None:
    features = make_features()
    features["dinov2"][1, 2] = value
    store = FeatureStore(storage, "features", FINGERPRINT)
    with pytest.raises(DataError, match="column 'dinov2': values that are not finite"):
        store.write(make_entry(), 0, keys=KEYS, crops=make_crops(3), features=features)


@pytest.mark.parametrize("value", [-1, 65536])
def test_codes_that_do_not_fit_are_refused(value: int) -> None:
    codes = np.zeros((1, 2, 2, 2), np.int64)
    codes[0, 1, 0, 1] = value
    with pytest.raises(ValueError, match=r"expected \[0, 65536\)"):
        pack_codes(codes, ["visual", "semantic"])


def test_codebook_of_more_than_sixteen_bits_is_a_config_error() -> None:
    check_codebook_size(65536)
    with pytest.raises(ConfigError, match="codebook_size: 65537 codes do not fit"):
        check_codebook_size(65537)


def test_unsafe_names_are_refused(storage: Storage) -> None:
    with pytest.raises(ValueError, match=r"fingerprint '../x'"):
        FeatureStore(storage, "features", "../x")
    with pytest.raises(ValueError, match="view 128"):
        FeatureStore(storage, "features", FINGERPRINT).path(make_entry(), 128)
    columns = {"key": np.ones((3, 1), np.float16)}
    table = RecordTable(KEYS, np.zeros(3, np.int8), pack_crops(make_crops(3)), columns)
    with pytest.raises(ValueError, match="column 'key'"):
        encode_records(table, fingerprint=FINGERPRINT, shard_sha256="1")


def test_a_view_beyond_the_greatest_does_not_become_another() -> None:
    entry = make_entry()
    columns = {"clip": np.ones((3, 2), np.float16)}
    table = RecordTable(KEYS, np.ones(3, np.int8), pack_crops(make_crops(3)), columns)
    data = encode_records(table, fingerprint=FINGERPRINT, shard_sha256=entry.sha256)
    stored = pq.read_table(pa.BufferReader(data))
    views = pa.array([257, 257, 257], pa.int32())
    sink = pa.BufferOutputStream()
    pq.write_table(stored.set_column(stored.column_names.index("view"), "view", views), sink)
    with pytest.raises(DataError, match="views from 257 to 257"):
        decode_records(
            sink.getvalue().to_pybytes(),
            fingerprint=FINGERPRINT,
            shard_sha256=entry.sha256,
            source="x",
            max_rows=3,
        )

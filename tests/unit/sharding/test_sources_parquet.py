from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.source_files import png

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.sources import parquet_table
from fqgan_dist.sharding.sources.opening import open_source

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat, a pet", "dog"]


def write_table(path: Path, columns: dict[str, Any], *, names: list[str] | None = None) -> Path:
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, path, row_group_size=2)
    return path


def images(*paths: str | None) -> pa.Array:
    values = [{"bytes": png(number), "path": path} for number, path in enumerate(paths)]
    return pa.array(values, IMAGE)


def test_a_hugging_face_dataset_is_a_source(tmp_path: Path):
    for part in (0, 1):
        columns = {"image": images(f"/home/me/{part}a.png", f"{part}b.png"), "label": [1, 0]}
        write_table(tmp_path / f"train-{part}.parquet", columns, names=NAMES)
    (tmp_path / "README.md").write_text("hello")
    with open_source(str(tmp_path)) as source:
        assert source.class_names() == NAMES
        assert source.names == [
            "cat, a pet/0b.png",
            "cat, a pet/1b.png",
            "dog/0a.png",
            "dog/1a.png",
        ]
        assert [source.read(row) for row in range(4)] == [png(1), png(1), png(0), png(0)]
        assert not source.is_shared_by_nodes
        assert pickle.loads(pickle.dumps(source.reader)).read("x", source.place(1)) == png(1)


def test_rows_without_file_names_are_named_by_their_number(tmp_path: Path):
    columns = {"image": images("0.png", None, "2.png"), "label": [0, 0, 1]}
    with open_source(str(write_table(tmp_path / "x.parquet", columns, names=NAMES))) as source:
        assert source.names == [
            "cat, a pet/x-00000000.png",
            "cat, a pet/x-00000001.png",
            "dog/x-00000002.png",
        ]


def test_file_names_that_are_repeated_are_not_used(tmp_path: Path):
    columns = {"image": images("a/0.png", "b/0.png"), "label": [1, 1]}
    with open_source(str(write_table(tmp_path / "x.parquet", columns, names=NAMES))) as source:
        assert source.names == ["dog/x-00000000.png", "dog/x-00000001.png"]


@pytest.mark.parametrize("names", [["hook/claw", "dog"], ["crane", "crane"], ["", "dog"]])
def test_names_that_cannot_be_classes_describe_numbers(tmp_path: Path, names: list[str]):
    columns = {"image": images("0.png", "1.png"), "label": [0, 1]}
    with open_source(str(write_table(tmp_path / "x.parquet", columns, names=names))) as source:
        assert source.names == ["0/0.png", "1/1.png"]
        assert source.class_names() == ["0", "1"]
        assert source.class_descriptions == {"0": names[0], "1": names[1]}


def test_plain_binary_columns_and_text_classes(tmp_path: Path):
    columns = {
        "id": ["x7", "x8"],
        "jpg": [png(1), png(2)],
        "species": ["fish", "bird"],
        "thumb": [b"", b""],
    }
    path = write_table(tmp_path / "x.parquet", columns)
    with open_source(str(path), class_key="species", id_key="id") as source:
        assert source.names == ["bird/x-00000001.png", "fish/x-00000000.png"]
        assert source.keys == ["x8", "x7"]
        assert source.read(0) == png(2)
        assert source.class_names() == ["bird", "fish"]
    with open_source(str(path), class_key="none") as source:
        assert source.class_names() == ["all"]


def test_numbers_without_names_keep_their_order(tmp_path: Path):
    columns = {"image": images("0.png", "1.png"), "label": [10, 2]}
    with open_source(str(write_table(tmp_path / "x.parquet", columns))) as source:
        assert source.class_names() == [str(label) for label in range(11)]


@pytest.mark.parametrize(
    ("image", "label", "reason"),
    [
        ({"bytes": None, "path": "x.png"}, 0, "only the path 'x.png'"),
        (None, 0, "no bytes"),
        ({"bytes": b"GIF89a", "path": "x.gif"}, 0, "no JPEG, PNG or WebP"),
        ({"bytes": png(), "path": "x.png"}, -1, "no label: -1"),
        ({"bytes": png(), "path": "x.png"}, 2, "'2' is no class"),
        ({"bytes": png(), "path": "x.png"}, None, "no label: None"),
    ],
)
def test_unusable_rows_are_named(tmp_path: Path, image: Any, label: int | None, reason: str):
    good = {"bytes": png(7), "path": "good.png"}
    columns = {"image": pa.array([image, good], IMAGE), "label": [label, 1]}
    with open_source(str(write_table(tmp_path / "x.parquet", columns, names=NAMES))) as source:
        assert source.names == ["dog/good.png"]
        assert source.read(0) == png(7)
        assert source.problems[0].name == "x-00000000"
        assert reason in source.problems[0].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"'caption', 'title' could each be meant; name one with class_key="),
        (
            {"class_key": "nothing"},
            r"class_key: the column 'nothing' .* is not there .*title: string",
        ),
        (
            {"class_key": "image"},
            r"class_key: the column 'image' .* holds something else .*classes: whole",
        ),
        (
            {"class_key": "title", "image_key": "picture"},
            r"image_key: the column 'picture' .* is not there",
        ),
        (
            {"class_key": "title", "image_key": "title"},
            r"the column 'title' .* holds something else .*the bytes",
        ),
        ({"class_key": "title", "id_key": "number"}, "no column 'number'"),
    ],
)
def test_columns_that_cannot_be_told_are_errors(
    tmp_path: Path, options: dict[str, str], message: str
):
    columns = {"image": images("0.png"), "caption": ["x"], "title": ["y"]}
    path = write_table(tmp_path / "x.parquet", columns)
    with pytest.raises(ConfigError, match=message), open_source(str(path), **options):
        pass


def test_a_table_of_paths_is_named_as_what_it_is(tmp_path: Path):
    texts = write_table(tmp_path / "texts.parquet", {"path": ["0.png"], "label": [1]})
    with pytest.raises(ConfigError, match=r"no column with the bytes .*as CSV or JSONL"):
        open_source(str(texts)).__enter__()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = pa.array([{"bytes": None, "path": "0.png"}], kind)
    paths = write_table(tmp_path / "paths.parquet", {"image": column, "label": [1]})
    with pytest.raises(DataError, match=r"only the path '0\.png', which is not followed"):
        open_source(str(paths)).__enter__()


def test_files_of_other_columns_are_named(tmp_path: Path):
    write_table(tmp_path / "0.parquet", {"image": images("0.png"), "label": [1]})
    write_table(tmp_path / "1.parquet", {"image": images("1.png"), "class": [1]})
    with pytest.raises(DataError, match=r"1\.parquet: has no columns \['label'\]"):
        open_source(str(tmp_path)).__enter__()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_damaged_file_is_named(tmp_path: Path, share: float):
    path = write_table(tmp_path / "x.parquet", {"image": images("0.png"), "label": [1]})
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"x\.parquet: not a whole parquet file"):
        open_source(str(path)).__enter__()


@pytest.mark.parametrize("names", ["nonsense", [1, 2], {}])
def test_strange_metadata_is_no_list_of_names(tmp_path: Path, names: Any):
    columns = {"image": images("0.png"), "label": [0]}
    with open_source(str(write_table(tmp_path / "x.parquet", columns, names=names))) as source:
        assert source.class_names() == ["0"]


def test_a_row_without_a_key_is_named(tmp_path: Path):
    columns = {"image": [png(1), png(2)], "label": [0, 0], "id": ["k1", None]}
    with open_source(str(write_table(tmp_path / "x.parquet", columns)), id_key="id") as source:
        assert source.keys == ["k1"]
        assert [(problem.name, problem.reason) for problem in source.problems] == [
            ("x-00000001", "no key in the column 'id', as other rows have")
        ]


def test_a_column_of_keys_that_are_not_kept_has_no_effect(tmp_path: Path):
    columns = {"image": [png(1)], "label": [0], "id": ["k1"]}
    path = write_table(tmp_path / "x.parquet", columns)
    with (
        pytest.raises(ConfigError, match="id_key: 'id' has no effect with keep_keys=false"),
        open_source(str(path), id_key="id", keep_keys=False),
    ):
        pass


def write_bomb(path: Path, *, num_rows: int, num_bytes: int) -> Path:
    """Write a table whose rows hold one image, which the file holds once, as a few bytes."""
    image = b"\xff\xd8\xff" + bytes(num_bytes)
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([image]))
    table = pa.table({"image": rows, "label": [0] * num_rows})
    pq.write_table(table, path, compression="zstd", store_schema=False, data_page_size=2**30)
    return path


def test_a_table_that_expands_like_a_bomb_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parquet_table, "_HARMLESS_BYTES", 2**21)
    path = write_bomb(tmp_path / "rows.parquet", num_rows=64, num_bytes=2**18)
    assert path.stat().st_size < 2**12
    with (
        pytest.raises(DataError, match="a decompression bomb: its first 8 images"),
        open_source(str(path)),
    ):
        pass
    path = write_bomb(tmp_path / "page.parquet", num_rows=1, num_bytes=2**22)
    with pytest.raises(DataError, match="row group 0 expands from"), open_source(str(path)):
        pass


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    columns = [images("a.png", "b.png"), pa.array([0, 1]), pa.array([0, 1])]
    table = pa.Table.from_arrays(columns, names=["image", "label", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    with (
        pytest.raises((DataError, ConfigError), match="label"),
        open_source(str(tmp_path / "a.parquet")),
    ):
        pass


def test_a_column_whose_name_is_no_text_is_damage(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"image": images("a.png"), "label": ["cat"]})
    path.write_bytes(path.read_bytes().replace(b"label", b"l\xffbel"))
    with pytest.raises((DataError, ConfigError)), open_source(str(path)):
        pass

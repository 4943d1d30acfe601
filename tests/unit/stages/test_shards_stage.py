from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.source_files import png, write_files, write_tar

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.foreign_index import IndexConfig, index_shards
from fqgan_dist.sharding.listing import ListingBuilder, Place, SourceListing
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.shards import (
    _hold_out,
    _locate_splits,
    _open_splits,
    _view_short_side,
)
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"


class _NoReader:
    def read(self, name: str, place: Place) -> bytes:
        raise AssertionError(f"{name} was read while listing")


def _listing(count: int) -> SourceListing:
    builder = ListingBuilder("memory")
    for row in range(count):
        builder.add(f"class/{row:03d}.jpg", Place("memory", row, 10))
    return builder.build("tar", _NoReader(), is_shared_by_nodes=False)


def test_folder_with_train_and_val_gives_both(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert _locate_splits(str(tmp_path), None) == (str(tmp_path / "train"), str(tmp_path / "val"))


def test_folder_called_train_finds_val_beside_it_with_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for source in (f"{tmp_path}/train", f"{tmp_path}/train/"):
        assert _locate_splits(source, None) == (f"{tmp_path}/train", f"{tmp_path}/val")


def test_archive_finds_the_validation_archive_beside_it(tmp_path: Path) -> None:
    (tmp_path / "val.tar.gz").touch()
    train = str(tmp_path / "train.tar.gz")
    assert _locate_splits(train, None) == (train, str(tmp_path / "val.tar.gz"))


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_validation_images_are_found_by_any_usual_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / name).mkdir()
    assert _locate_splits(str(tmp_path), None)[1] == str(tmp_path / name)


def test_several_that_may_be_the_validation_images_are_asked_about(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"data\.validation_source: beside .*/test', '.*/val'"):
        _locate_splits(str(tmp_path), None)


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_files_of_several_splits_in_one_folder_give_both(tmp_path: Path, held_out: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for color, name in enumerate(["train-0-of-2", "train-1-of-2", f"{held_out}-0-of-1"]):
        table = pa.table({"image": [png(color)], "label": [0]})
        pq.write_table(table, data / f"{name}.parquet")
    settings = [f"storage.root={tmp_path / 'run'}", f"data.source={data}"]
    config = load_config(TINY, settings, RunConfig)
    storage = Storage(config.storage.root)
    context = RunContext(config=config, storage=storage, world=World(), device=torch.device("cpu"))
    with _open_splits(context) as sources:
        found = {
            split: {source.read(row) for row in range(len(source))}
            for split, source in sources.items()
        }
    assert found == {"train": {png(0), png(1)}, "val": {png(2)}}


def test_what_an_index_holds_together_is_one_set_of_which_a_share_is_held_out(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for shard, colors in (("x-train-0", range(10)), ("x-val-0", range(10, 20))):
        members = [(f"k{c}.{s}", d) for c in colors for s, d in (("cls", b"0"), ("png", png(c)))]
        write_tar(data / f"{shard}.tar", members)
    index_shards(Storage(data), IndexConfig(name="x", split="train"))
    settings = [
        f"storage.root={tmp_path / 'run'}",
        f"data.source={data}",
        "data.validation_fraction=0.25",
    ]
    config = load_config(TINY, settings, RunConfig)
    storage = Storage(config.storage.root)
    context = RunContext(config=config, storage=storage, world=World(), device=torch.device("cpu"))
    with _open_splits(context) as sources:
        train, val = sources["train"], sources["val"]
        assert (len(train), len(val)) == (15, 5)
        assert not set(train.names) & set(val.names)


def test_source_without_validation_images_has_none(tmp_path: Path) -> None:
    assert _locate_splits(str(tmp_path / "photos"), None) == (str(tmp_path / "photos"), None)
    assert _locate_splits(str(tmp_path / "train"), None)[1] is None


def test_named_validation_source_wins(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert _locate_splits(str(tmp_path), "elsewhere")[1] == "elsewhere"


def test_held_out_share_is_disjoint_and_complete() -> None:
    source = _listing(40)
    held_out = _hold_out(source, 0.25, seed=3)
    train, val = held_out["train"], held_out["val"]
    assert len(val) == 10
    assert sorted(train.names + val.names) == source.names
    assert val.names == sorted(val.names)
    assert _hold_out(source, 0.25, seed=4)["val"].names != val.names


def test_empty_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction: 0\.01 of the 3 images"):
        _hold_out(_listing(3), 0.01, seed=0)


@pytest.mark.parametrize(("size", "side"), [(32, 320), (256, 320), (512, 640)])
def test_images_must_be_good_for_the_views_in_use(size: int, side: int) -> None:
    config = load_config(TINY, [f"tokenizer.model.image_size={size}"], RunConfig)
    assert _view_short_side(config, "train") == side
    assert _view_short_side(config, "val") == max(size, 320)


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (
            [("data/CLS/train/n1/0.png", png())],
            [],
            r"subfolder=data/CLS",
        ),
        ([("x.tar", b""), ("a/0.png", png())], [], r"format=folder or \S*format=webdataset"),
        (
            [("a/0.png", png())],
            ["data.{field}.image_key=x"],
            r"image_key: .*correct \S*format=",
        ),
    ],
)
@pytest.mark.parametrize("field", ["source_options", "validation_options"])
def test_options_are_named_as_a_run_takes_them(
    tmp_path: Path, files: list[tuple[str, bytes]], settings: list[str], message: str, field: str
) -> None:
    good = write_files(tmp_path / "good", [("a/0.png", png())])
    odd = write_files(tmp_path / "odd", files)
    source, validation = (odd, good) if field == "source_options" else (good, odd)
    overrides = [
        f"data.source={source}",
        f"data.validation_source={validation}",
        *(setting.format(field=field) for setting in settings),
    ]
    config = load_config(TINY, [f"storage.root={tmp_path}", *overrides], RunConfig)
    storage = Storage(tmp_path)
    context = RunContext(config=config, storage=storage, world=World(), device=torch.device("cpu"))
    with pytest.raises((ConfigError, DataError)) as caught, _open_splits(context):
        pass
    options = r"(?<![\w.])(format|subfolder|image_key)[=:]"
    assert re.search(f"data\\.{field}\\.(format|subfolder|image_key)", str(caught.value))
    assert re.search(message, str(caught.value))
    assert not re.search(options, str(caught.value))

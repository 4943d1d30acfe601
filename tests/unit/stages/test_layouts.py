"""Every layout that ImageNet and its like come in gives the same labels, by `shard` and `run`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.layouts import LAYOUTS, write_unlabelled_validation
from support.source_files import png
from support.tiny_tasks import load_tiny

from data_tools.cli import main
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import image_digest, load_samples
from fqgan_dist.errors import ConfigError
from fqgan_dist.orchestration.pipeline import open_checked_run, run_stage_here, run_stages
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import Storage

CLASSES = ["n01440764", "n01443537", "n01484850"]
TRAIN = [(CLASSES[row % 3], png(row)) for row in range(12)]
VAL = [(CLASSES[label], png(100 + row)) for row, label in enumerate((2, 0, 1, 1, 0))]
in_every_layout = pytest.mark.parametrize("name", LAYOUTS)


def _labels(dataset: Dataset) -> dict[bytes, int]:
    """Give the label of every image by its digest."""
    found: dict[bytes, int] = {}
    for entry in dataset.index.shards:
        table = load_samples(dataset.folder, entry)
        digests = [digest.tobytes() for digest in table.digests]
        found |= dict(zip(digests, table.labels.tolist(), strict=True))
    return found


def _expected(images: list[tuple[str, bytes]], *, has_classes: bool) -> dict[bytes, int]:
    return {image_digest(data): CLASSES.index(name) if has_classes else 0 for name, data in images}


def _run(config: RunConfig) -> None:
    run_stages(open_checked_run(config), run_stage_here)


@in_every_layout
def test_a_run_makes_the_same_shards_of_every_layout(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name](tmp_path, TRAIN, VAL)
    root = tmp_path / "run"
    _run(load_tiny(f"storage.root={root}", "stages=[shards]", *layout.settings(tmp_path)))
    train, val = (Dataset.open(Storage(next(root.glob(f"data/*/{s}")))) for s in ("train", "val"))
    val_has_classes = layout.has_classes and layout.val_has_classes
    assert _labels(train) == _expected(TRAIN, has_classes=layout.has_classes)
    assert _labels(val) == _expected(VAL, has_classes=val_has_classes)
    assert train.index.has_classes == layout.has_classes
    assert val.index.has_classes == val_has_classes
    assert len(train.index.classes) == (3 if layout.has_classes else 1)
    assert not layout.val_has_classes or val.index.classes == train.index.classes


@in_every_layout
@pytest.mark.parametrize("split", ["train", "val"])
def test_shard_makes_the_same_dataset_of_every_layout(
    tmp_path: Path, name: str, split: str
) -> None:
    layout = LAYOUTS[name](tmp_path, TRAIN, VAL)
    source, *options = layout.command(tmp_path, split)
    out = tmp_path / "out"
    arguments = ["shard", source, str(out), "name=x", f"split={split}", "workers=1", *options]
    assert main(arguments) == 0
    images = TRAIN if split == "train" else VAL
    has_classes = layout.has_classes and (split == "train" or layout.val_has_classes)
    assert _labels(Dataset.open(Storage(out))) == _expected(images, has_classes=has_classes)


def test_a_generator_cannot_be_validated_without_classes(tmp_path: Path) -> None:
    layout = write_unlabelled_validation(tmp_path, TRAIN, VAL)
    config = load_tiny(f"storage.root={tmp_path}/run", *layout.settings(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.validation_source: its images have no classes"):
        _run(config)
    assert not (tmp_path / "run" / "data").exists()


def test_options_of_validation_images_need_those(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation_options: have no effect without"):
        load_tiny(f"data.source={tmp_path}", "data.validation_options.class_key=none")


@pytest.mark.parametrize(
    "setting", ["source_options.root", "validation_options.class_map", "classes"]
)
def test_a_missing_file_is_said_before_anything_runs(tmp_path: Path, setting: str) -> None:
    layout = LAYOUTS["caffe"](tmp_path, TRAIN, VAL)
    settings = [*layout.settings(tmp_path), f"data.{setting}={tmp_path}/gone"]
    with pytest.raises(ConfigError, match=rf"data\.{setting}: '.*gone': no such file"):
        _run(load_tiny(f"storage.root={tmp_path}/run", "stages=[shards]", *settings))


DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_document_says_how_every_layout_is_read(tmp_path: Path) -> None:
    """The commands of its table are those that the other tests of this file call."""
    table = DOCUMENT.read_text().partition("| what you have |")[2].partition("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    documented = {(train, val.removesuffix(" (beside)")) for _, train, val in rows}
    is_beside = {train for _, train, val in rows if val.endswith(" (beside)")}
    expected: set[tuple[str, str]] = set()
    for name, write in LAYOUTS.items():
        folder = tmp_path / name
        folder.mkdir()
        layout = write(folder, TRAIN, VAL)
        train, val = (f"`{' '.join(layout.command('DIR', split))}`" for split in ("train", "val"))
        expected.add((train, val))
        assert (train in is_beside) == (layout.validation_source is None), name
    assert documented == expected

"""What a later stage would refuse after hours is said as soon as the images are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.source_files import png
from support.tiny_tasks import load_tiny

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.orchestration.pipeline import open_checked_run, run_stage_here, run_stages
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.data_checks import check_sizes
from fqgan_dist.stages.preflight import check_settings
from fqgan_dist.stages.stage import DataSizes, find_stages

ENOUGH = DataSizes(train_images=8, val_images=2, num_classes=20)


def _check(sizes: DataSizes, *settings: str) -> None:
    config = load_tiny(*settings)
    check_sizes(find_stages(config), config, sizes)


def _write_images(folder: Path, name: str, count: int) -> None:
    (folder / name).mkdir(parents=True)
    for color in range(count):
        (folder / name / f"{color}.png").write_bytes(png(color))


def _load(folder: Path, *settings: str) -> RunConfig:
    return load_tiny(f"storage.root={folder}/run", f"data.source={folder}/images", *settings)


def _run(config: RunConfig) -> None:
    run_stages(open_checked_run(config), run_stage_here)


def test_images_that_suffice_pass() -> None:
    _check(ENOUGH)


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        (
            DataSizes(7, 2, 20),
            [],
            r"tokenizer\.training\.global_batch_size: 8 is more than the 7 training images.*"
            r"\n.*autoregressive\.training\.global_batch_size: 8",
        ),
        (DataSizes(8, 2, 21), [], r"num_classes: 20 is less than the 21 classes"),
        (DataSizes(8, 1, 20), [], r"1 validation image is too few; rFID needs at least 2"),
        (
            DataSizes(3, 2, 20),
            ["stages=[samples,evaluation]"],
            r"3 training images are too few; precision and recall of samples need at least 4",
        ),
    ],
)
def test_what_the_images_do_not_suffice_for_is_named(
    sizes: DataSizes, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _check(sizes, *settings)


@pytest.mark.parametrize("stages", ["shards", "teachers,codes", "evaluation,report"])
def test_a_stage_that_is_not_run_asks_for_nothing(stages: str) -> None:
    _check(DataSizes(1, 2, 1000), f"stages=[{stages}]")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("samples.count=3", r"samples\.count: 3 is too few; precision and recall"),
        ("evaluation.reference_samples=3", r"evaluation\.reference_samples: 3 is too few"),
        ("data.num_views=1000000", r"data\.num_views: 1000000 with policy 'random_crop_flip'"),
    ],
)
def test_what_the_config_alone_tells_is_said_before_anything_starts(
    setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(load_tiny(setting))


def test_too_few_images_are_known_before_a_shard_is_written(tmp_path: Path) -> None:
    _write_images(tmp_path / "images" / "train", "bee", 5)
    _write_images(tmp_path / "images" / "val", "bee", 1)
    with pytest.raises(ConfigError, match=r"(?s)5 training images.*1 validation image"):
        _run(_load(tmp_path))
    assert not (tmp_path / "run" / "data").exists()


def test_an_unknown_validation_class_is_known_before_a_shard_is_written(tmp_path: Path) -> None:
    _write_images(tmp_path / "images" / "train", "bee", 10)
    _write_images(tmp_path / "images" / "val", "wasp", 3)
    with pytest.raises(DataError, match=r"val: 1 of its classes are not among the 1 .*'wasp'"):
        _run(_load(tmp_path))
    assert not (tmp_path / "run" / "data").exists()


def test_finished_datasets_are_measured_before_the_next_stage(tmp_path: Path) -> None:
    _write_images(tmp_path / "images" / "train", "bee", 10)
    _write_images(tmp_path / "images" / "val", "bee", 3)
    for name in ("0.png", "1.png", "2.png"):  # listed, and refused when they are read
        (tmp_path / "images" / "train" / "bee" / name).write_bytes(b"\x89PNG no image")
    with pytest.raises(ConfigError, match=r"global_batch_size: 8 is more than the 7 training"):
        _run(_load(tmp_path, "stages=[shards,teachers,tokenizer]"))
    assert (tmp_path / "run" / "data").exists()
    assert not (tmp_path / "run" / "features").exists()

"""What is stored for the pixels of one view mode is never used with those of the other."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from support.datasets import build_photographs
from support.stage_records import WEIGHTS, save_stage

from fqgan_dist.config import load_config
from fqgan_dist.data.config import DataConfig, ViewConfig, ViewMode
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex
from fqgan_dist.data.loader import ImageLoader
from fqgan_dist.stages.codes import CodesStage, CodeWork
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.images import ImageReader, center_view
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.teachers import TeachersStage, TeacherWork
from fqgan_dist.stages.tokenizer import TokenizerStage
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"
MODES: tuple[ViewMode, ViewMode] = ("reference", "fast")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, DatasetIndex]:
    storage = Storage(tmp_path_factory.mktemp("run"))
    index = build_photographs(storage.child("data/photographs/train"), crops=1)
    return storage, index


def open_context(dataset: tuple[Storage, DatasetIndex], mode: ViewMode) -> RunContext:
    storage, index = dataset
    overrides = [f"storage.root={storage.root}", f"data.views.mode={mode}"]
    config = load_config(TINY, [*overrides, f"codes.views.mode={mode}"], RunConfig)
    context = RunContext(config=config, storage=storage, world=World(), device=torch.device("cpu"))
    save_stage(context, "shards", {"train": index.dataset_id, "val": index.dataset_id})
    save_stage(context, "tokenizer", WEIGHTS)
    return context


def test_stages_tell_the_modes_apart(dataset: tuple[Storage, DatasetIndex]) -> None:
    for stage in (TeachersStage, CodesStage, TokenizerStage):
        reference, fast = (stage(open_context(dataset, mode)).settings() for mode in MODES)
        assert reference["views"] | {"mode": "fast"} == fast["views"]
        assert reference["views"] != fast["views"]


def test_features_and_codes_of_the_modes_have_fingerprints_of_their_own(
    dataset: tuple[Storage, DatasetIndex],
) -> None:
    features = {TeacherWork(open_context(dataset, mode)).store.fingerprint for mode in MODES}
    assert len(features) == 2
    codes = {CodeWork(open_context(dataset, mode), "train").store.fingerprint for mode in MODES}
    assert len(codes) == 2


def test_images_are_evaluated_as_the_reference_does_in_either_mode(
    dataset: tuple[Storage, DatasetIndex],
) -> None:
    for mode in MODES:
        assert center_view(open_context(dataset, mode)).mode == "reference"


@pytest.mark.parametrize("mode", MODES)
def test_teachers_see_the_very_pixels_of_training(
    dataset: tuple[Storage, DatasetIndex], mode: ViewMode
) -> None:
    storage, index = dataset
    view = ViewConfig(policy="random_crop_flip", image_size=16, mode=mode)
    seen: dict[str, torch.Tensor] = {}
    images = Dataset(storage.child("data/photographs/train"), index)
    data = DataConfig.model_validate({"source": "images", "views": view, "seed": 4})
    reader = ImageReader(images, data, view)
    for shard in range(len(index.shards)):
        for batch in reader.read_shard(shard, batch_size=5):
            seen |= dict(zip(batch.keys, batch.images, strict=True))
    loader = ImageLoader(
        Dataset.open(storage.child("data/photographs/train")),
        seed=4,
        view=view,
        num_views=1,
        micro_batch_size=5,
        micro_batches_per_step=1,
        window_shards=8,
        loader_workers=0,
        max_damaged_in_a_row=1,
    )
    with contextlib.closing(loader.batches(0, range(1))) as stream:
        for [batch] in itertools.islice(stream, 3):
            for key, image in zip(batch.keys, batch.images, strict=True):
                assert torch.equal(image, seen[key])

"""The `teachers` stage: features of every training view, stored beside the shards.

One file per shard and view holds all teachers' features; a chunk is one such file. A damaged image
has none (`data.on_damage`): the file says so, and training takes another sample in its stead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.record_stores import FeatureStore
from fqgan_dist.data.views import CropRecord
from fqgan_dist.fingerprint import fingerprint
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.damage import DamagedSample, DamageNotes, publish_damage
from fqgan_dist.stages.images import ImageReader
from fqgan_dist.stages.network_ids import NetworkIds
from fqgan_dist.stages.shards import DatasetIds, open_dataset
from fqgan_dist.stages.stage import RunContext, RunWork, Stage, StageOutcome, StageOutput
from fqgan_dist.stages.tokenizer_task import TeacherFeatures
from fqgan_dist.teachers.teacher import Teacher, build_teacher
from fqgan_dist.weights.staging import resolve_weights

_FOLDER = "features"


class FeatureIds(StageOutput):
    """The id of the stored features."""

    stage = "teachers"

    fingerprint: str
    """Names what decides them; empty where none are stored."""


class TeachersStage(Stage):
    """Stores the features of every training view."""

    output = FeatureIds
    inputs = (DatasetIds,)

    @classmethod
    def uses_pool(cls, config: RunConfig) -> bool:
        return super().uses_pool(config) and stores_features(config)

    def settings(self) -> Mapping[str, Any]:
        config = self.context.config
        return {
            "networks": {
                teacher.name: teacher.model_dump(mode="json")
                for teacher in config.teachers.networks
            },
            "precompute": config.teachers.precompute,
            "batch_size": config.teachers.batch_size,
            "views": config.data.views.model_dump(mode="json"),
            "num_views": config.data.num_views,
            "data_seed": config.data.seed,
        }

    def upstream(self) -> Mapping[str, Any]:
        return {"train": self.context.read(DatasetIds).train}

    def has_output(self) -> bool:
        return bool(self.context.storage.list("features"))

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        if not stores_features(self.context.config):
            return StageOutcome(FeatureIds(fingerprint=""))
        work = TeacherWork(self.context)
        run_chunks(work)
        damaged = work.notes.read(work.chunks())
        num_views = sum(work.size(chunk) for chunk in work.chunks())
        metrics: dict[str, Any] = {
            f"{self.name}/features": num_views - len(damaged),
            f"{self.name}/weights": {
                teacher.name: teacher.weights.source
                for teacher in self.context.config.teachers.networks
            },
        }
        if num_damaged := publish_damage(self.context, self.name, damaged):
            metrics[f"{self.name}/damaged_samples"] = num_damaged
        return StageOutcome(FeatureIds(fingerprint=work.store.fingerprint), metrics)


class TeacherWork(RunWork):
    """Feature extraction; chunk v * num_shards + s is view v of shard s."""

    description = "teacher features"
    unit = "images"

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.network_ids = NetworkIds()
        self.dataset = open_dataset(context, "train")
        self.store = FeatureStore(context.storage, _FOLDER, self._fingerprint())
        self.notes = DamageNotes(context.storage, FeatureIds.stage, self.store.fingerprint)

    def chunks(self) -> Sequence[int]:
        num_views = self.context.config.data.num_views
        assert num_views is not None, "RunConfig requires num_views with precomputed features"
        return range(num_views * len(self.dataset.index.shards))

    def size(self, chunk: int) -> int:
        _, shard = self._locate(chunk)
        return self.dataset.index.shards[shard].count

    def is_done(self, chunk: int) -> bool:
        view, shard = self._locate(chunk)
        return self.store.exists(self.dataset.index.shards[shard], view)

    def process(self, chunk: int) -> None:
        view, shard = self._locate(chunk)
        config = self.context.config
        reader = ImageReader(self.dataset, config.data, config.data.views, (view,))
        keys: list[str] = []
        crops: list[CropRecord] = []
        damage: dict[int, DamagedSample] = {}
        features: dict[str, list[np.ndarray]] = {name: [] for name in self._teachers}
        for batch in reader.read_shard(shard, batch_size=config.teachers.batch_size):
            ACTIVITY.move()
            damage |= {len(keys) + row: sample for row, sample in batch.damage.items()}
            keys += batch.keys
            crops += [crop for (crop,) in batch.crops]
            images = batch.images.to(self.context.device)
            for name, value in compute_features(self._teachers, images).items():
                features[name].append(value.cpu().numpy())
        joined = {name: np.concatenate(parts) for name, parts in features.items()}
        self.notes.write(chunk, list(damage.values()))
        entry = self.dataset.index.shards[shard]
        self.store.write(entry, view, keys=keys, crops=crops, features=joined, damaged=damage)

    @functools.cached_property
    def _teachers(self) -> dict[str, Teacher]:
        return load_same_teachers(self.context, self.network_ids)

    def _fingerprint(self) -> str:
        config = self.context.config
        identity = {
            "dataset": self.dataset.id,
            "teachers": {name: teacher.fingerprint for name, teacher in self._teachers.items()},
            "views": config.data.views.model_dump(mode="json"),
            "seed": config.data.seed,
            "batch_size": config.teachers.batch_size,
        }
        return fingerprint(identity)

    def _locate(self, chunk: int) -> tuple[int, int]:
        """Give the view and the number of the shard."""
        return divmod(chunk, len(self.dataset.index.shards))


def stores_features(config: RunConfig) -> bool:
    return bool(config.teachers.networks) and config.teachers.precompute


def load_teachers(config: RunConfig, device: torch.device) -> dict[str, Teacher]:
    """Build the configured teachers; raises what `resolve_weights` and `build_teacher` do."""
    teachers = {}
    for index, settings in enumerate(config.teachers.networks):
        path = resolve_weights(settings.weights, field=f"teachers.networks.{index}.weights")
        teachers[settings.name] = build_teacher(settings, device=device, weights_path=path)
    return teachers


def load_same_teachers(context: RunContext, network_ids: NetworkIds) -> dict[str, Teacher]:
    """As `load_teachers`; a DataError where they are others than where the work was made."""
    teachers = load_teachers(context.config, context.device)
    for name, teacher in teachers.items():
        network_ids.confirm(f"teacher {name!r}", teacher.fingerprint)
    return teachers


@torch.inference_mode()
def compute_features(teachers: Mapping[str, Teacher], images: Tensor) -> dict[str, Tensor]:
    """Compute every teacher's features (B, F) of images on their device."""
    return {name: teacher(images) for name, teacher in teachers.items()}


def build_online_teachers(context: RunContext) -> TeacherFeatures:
    return functools.partial(compute_features, load_teachers(context.config, context.device))


def feature_store(context: RunContext) -> FeatureStore | None:
    """Open the stored features of a finished `teachers` stage; None if there are none."""
    features = context.read(FeatureIds).fingerprint
    storage = context.storage_of(FeatureIds.stage)
    return FeatureStore(storage, _FOLDER, features) if features else None

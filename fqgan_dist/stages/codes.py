"""The `codes` stage: every crop of every image as codes, the generator's training data.

Training images give the crops of `codes.views` (the paper: ten), validation images their centre
crop. A chunk is one shard. A damaged image has none (`data.on_damage`): the file says so, and
training takes another sample in its stead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import load_samples
from fqgan_dist.data.record_stores import CodeStore
from fqgan_dist.data.records import check_codebook_size
from fqgan_dist.data.views import CropRecord, num_views
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.fingerprint import fingerprint
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.damage import DamagedSample, DamageNotes, publish_damage
from fqgan_dist.stages.images import ImageReader, center_view
from fqgan_dist.stages.shards import DatasetIds, open_dataset
from fqgan_dist.stages.stage import RunContext, RunWork, Stage, StageOutcome, StageOutput
from fqgan_dist.stages.tokenizer import TrainedTokenizer, encode_images, load_tokenizer
from fqgan_dist.tokenizer.model import FactorizedTokenizer


class CodeIds(StageOutput):
    """The ids of the codes of both splits."""

    stage = "codes"

    train: str
    val: str


class CodesStage(Stage):
    """Encodes every crop of every image."""

    output = CodeIds
    inputs = (DatasetIds, TrainedTokenizer)

    @classmethod
    def find_problems(cls, config: RunConfig) -> Iterator[str]:
        for check in (
            lambda: check_codebook_size(config.tokenizer.model.codebook_size),
            lambda: count_code_views(config.codes.views),
        ):
            try:
                check()
            except ConfigError as error:
                yield str(error)

    def settings(self) -> Mapping[str, Any]:
        codes = self.context.config.codes
        return {"views": codes.views.model_dump(mode="json"), "batch_size": codes.batch_size}

    def upstream(self) -> Mapping[str, Any]:
        datasets = self.context.read(DatasetIds)
        return {
            "train": datasets.train,
            "val": datasets.val,
            "tokenizer": self.context.read(TrainedTokenizer).weights,
        }

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        check_codebook_size(self.context.config.tokenizer.model.codebook_size)
        ids: dict[str, str] = {}
        metrics: dict[str, Any] = {}
        damaged: list[DamagedSample] = []
        for split in ("train", "val"):
            work = CodeWork(self.context, split)
            run_chunks(work)
            ids[split] = work.store.fingerprint
            found = work.notes.read(work.chunks())
            num_crops = sum(work.size(chunk) for chunk in work.chunks())
            metrics[f"{self.name}/{split}_crops"] = num_crops - len(found) * len(work.views)
            damaged += found
        if num_damaged := publish_damage(self.context, self.name, damaged):
            metrics[f"{self.name}/damaged_samples"] = num_damaged
        return StageOutcome(CodeIds(**ids), metrics)


class CodeWork(RunWork):
    """Code extraction of one split; chunk s is shard s."""

    unit = "crops"

    def __init__(self, context: RunContext, split: str) -> None:
        self.context = context
        self.split = split
        self.description = f"{split} codes"
        self.dataset = open_dataset(context, split)
        self.view = context.config.codes.views if split == "train" else center_view(context)
        self.views = range(count_code_views(self.view))
        self.store = CodeStore(context.storage, CodeIds.stage, self._fingerprint())
        self.notes = DamageNotes(context.storage, CodeIds.stage, self.store.fingerprint)

    def chunks(self) -> Sequence[int]:
        return range(len(self.dataset.index.shards))

    def size(self, chunk: int) -> int:
        return self.dataset.index.shards[chunk].count * len(self.views)

    def is_done(self, chunk: int) -> bool:
        return self.store.exists(self.dataset.index.shards[chunk])

    def process(self, chunk: int) -> None:
        entry = self.dataset.index.shards[chunk]
        config = self.context.config
        reader = ImageReader(self.dataset, config.data, self.view, self.views)
        keys: list[str] = []
        crops: list[list[CropRecord]] = []
        damage: dict[int, DamagedSample] = {}
        codes: list[np.ndarray] = []
        for batch in reader.read_shard(chunk, batch_size=config.codes.batch_size):
            ACTIVITY.move()
            encoded = encode_images(self._tokenizer, batch.images, self.context.device).numpy()
            codes.append(encoded.reshape(len(batch.keys), len(self.views), *encoded.shape[1:]))
            damage |= {len(keys) + row: sample for row, sample in batch.damage.items()}
            keys += batch.keys
            crops += batch.crops
        self.notes.write(chunk, list(damage.values()))
        self.store.write(
            entry,
            keys=keys,
            crops=crops,
            codes=np.concatenate(codes),
            codebooks=[book.name for book in config.tokenizer.model.codebooks],
            damaged=damage,
        )

    @functools.cached_property
    def _tokenizer(self) -> FactorizedTokenizer:
        return load_tokenizer(self.context)

    def _fingerprint(self) -> str:
        identity = {
            "dataset": self.dataset.id,
            "tokenizer": self.context.read(TrainedTokenizer).weights,
            "views": self.view.model_dump(mode="json"),
            "batch_size": self.context.config.codes.batch_size,
        }
        return fingerprint(identity)


def code_store(context: RunContext, split: str) -> CodeStore:
    storage = context.storage_of(CodeIds.stage)
    return CodeStore(storage, CodeIds.stage, getattr(context.read(CodeIds), split))


def read_all_codes(
    context: RunContext, split: str, dataset: Dataset, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read view 0 of the first `count` samples: codes (n, K, h, w) and labels (n,), both int64.

    Those whose images were damaged are left out.

    Raises:
        DataError: all are.
    """
    store = code_store(context, split)
    codes: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    remaining = count
    for entry in dataset.index.shards:
        if remaining <= 0:
            break
        table = load_samples(dataset.folder, entry)
        found, damaged = store.read(entry, table.keys)
        rows = [row for row in range(min(remaining, len(table))) if row not in damaged]
        codes.append(found[rows, 0].astype(np.int64))
        labels.append(table.labels[rows].astype(np.int64))
        remaining -= entry.count
    if not sum(map(len, codes)):
        raise DataError(
            f"{store.storage.uri(store.folder)}: the images of the first {count} samples were all "
            f"damaged when their codes were made; check {dataset.folder.root} with `fqgan-data "
            "verify`"
        )
    return torch.from_numpy(np.concatenate(codes)), torch.from_numpy(np.concatenate(labels))


def count_code_views(view: ViewConfig) -> int:
    """Count the crops that codes are made of.

    Raises:
        ConfigError: the policy has no fixed number of them.
    """
    count = num_views(view.policy)
    if count is None:
        raise ConfigError(
            f"codes.views.policy: {view.policy!r} has no fixed number of views; "
            f"expected 'ten_crop' or 'center'"
        )
    return count

"""Reading images of a dataset in chunks, in the dataset's order, for everything but training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.decoding import to_float, to_uint8
from fqgan_dist.data.index import SampleTable, ShardEntry, load_samples
from fqgan_dist.data.loader import iterate_shard
from fqgan_dist.data.sample_reader import SampleReader
from fqgan_dist.data.view_loading import load_views
from fqgan_dist.data.views import CropRecord
from fqgan_dist.errors import DataError
from fqgan_dist.evaluation.reconstruction import compute_psnr
from fqgan_dist.stages.shards import open_dataset
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.tokenizer.model import FactorizedTokenizer


@dataclass(frozen=True)
class CroppedImages:
    """Views of some samples; view v of sample i is row i * num_views + v."""

    images: Tensor
    """(n * num_views, 3, H, W) uint8."""
    keys: list[str]
    """n sample keys."""
    labels: Tensor
    """(n,) int64."""
    crops: list[list[CropRecord]]
    """Of each sample, the crop of each view."""


def read_shard(
    dataset: Dataset,
    entry: ShardEntry,
    view: ViewConfig,
    views: Sequence[int],
    *,
    seed: int,
    batch_size: int,
) -> Iterator[CroppedImages]:
    """Read a whole shard as batches of at most `batch_size` crops, whole samples each.

    Raises:
        DataError: the shard is missing or damaged; it is known only after the last batch.
    """
    samples_per_batch = max(1, batch_size // len(views))
    pending: list[tuple[str, int, bytes]] = []
    for sample in iterate_shard(dataset.folder, entry):
        pending.append(sample)
        if len(pending) == samples_per_batch:
            yield _crop_all(pending, entry, view, views, seed)
            pending = []
    if pending:
        yield _crop_all(pending, entry, view, views, seed)


def read_rows(dataset: Dataset, rows: range, view: ViewConfig) -> CroppedImages:
    """Read view 0 of a range of samples of a dataset, by their offsets in the tars.

    Raises:
        DataError: a shard or sample is missing or damaged.
    """
    tables: dict[int, SampleTable] = {}
    pairs: list[tuple[int, int]] = []
    first = 0
    for shard, entry in enumerate(dataset.index.shards):
        wanted = range(max(rows.start - first, 0), min(rows.stop - first, entry.count))
        if wanted:
            tables[shard] = load_samples(dataset.folder, entry)
            pairs += [(shard, row) for row in wanted]
        first += entry.count
    reader = SampleReader(dataset, load_table=tables.__getitem__, cache=None)
    samples: list[tuple[str, int, bytes]] = []
    for (shard, row), data in zip(pairs, reader.read(pairs), strict=True):
        if isinstance(data, DataError):
            raise data
        samples.append((tables[shard].keys[row], int(tables[shard].labels[row]), data))
    return _crop_all(samples, None, view, (0,), seed=0)


def chunk_range(chunk: int, chunk_size: int, total: int) -> range:
    """Return the ids of a chunk: `chunk_size` of them, fewer in the last."""
    return range(chunk * chunk_size, min((chunk + 1) * chunk_size, total))


def count_chunks(total: int, chunk_size: int) -> int:
    return -(-total // chunk_size)


class HeldOutImages:
    """The first validation images, kept in memory as centre crops, to measure a tokenizer on."""

    def __init__(self, context: RunContext, count: int, batch_size: int) -> None:
        # This rank's share: batch b belongs to rank b mod N.
        self.context = context
        dataset = open_dataset(context, "val")
        total = min(count, dataset.index.num_samples)
        view = center_view(context)
        world = context.world
        self.batches = {
            chunk: read_rows(dataset, chunk_range(chunk, batch_size, total), view).images
            for chunk in range(world.rank, count_chunks(total, batch_size), world.world_size)
        }

    @torch.inference_mode()
    def measure_tokenizer(self, tokenizer: FactorizedTokenizer) -> dict[str, float]:
        """Compute the mean PSNR of reconstructions; the same on every rank, for any number."""
        values: dict[int, list[float]] = {}
        for chunk, images in self.batches.items():
            output = tokenizer(to_float(images.to(self.context.device)))
            values[chunk] = compute_psnr(to_uint8(output.reconstruction).cpu(), images).tolist()
        ordered = _gather_chunks(values, self.context.world.world_size)
        return {"tokenizer/validation/psnr": float(np.mean(ordered))}


def center_view(context: RunContext) -> ViewConfig:
    return ViewConfig(policy="center", image_size=context.config.tokenizer.model.image_size)


def _gather_chunks(values: dict[int, list[float]], world_size: int) -> list[float]:
    if world_size > 1:
        gathered: list[dict[int, list[float]]] = [{} for _ in range(world_size)]
        dist.all_gather_object(gathered, values)
        values = {chunk: item for part in gathered for chunk, item in part.items()}
    return [value for chunk in sorted(values) for value in values[chunk]]


def _crop_all(
    samples: Sequence[tuple[str, int, bytes]],
    entry: ShardEntry | None,
    view: ViewConfig,
    views: Sequence[int],
    seed: int,
) -> CroppedImages:
    pixels: list[np.ndarray] = []
    crops: list[list[CropRecord]] = []
    for key, _, data in samples:
        name = f"{entry.file}:{key}" if entry else key
        made = load_views(data, view, seed=seed, key=key, views=views, name=name)
        pixels += [crop for crop, _ in made]
        crops.append([record for _, record in made])
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for _, label, _ in samples])
    return CroppedImages(images, [key for key, _, _ in samples], labels, crops)

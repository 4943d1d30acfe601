"""Reading images of a dataset in chunks, in the dataset's order, for everything but training."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.data.config import DataConfig, ViewConfig
from fqgan_dist.data.damage import find_stand_in
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.decoding import to_float, to_uint8
from fqgan_dist.data.index import SampleTable, load_samples
from fqgan_dist.data.order import SampleOrder
from fqgan_dist.data.prefetch import BoundedCache
from fqgan_dist.data.sample_reader import SampleReader
from fqgan_dist.data.tar_iteration import iterate_images
from fqgan_dist.data.view_loading import load_views
from fqgan_dist.data.views import CropRecord
from fqgan_dist.errors import DataError
from fqgan_dist.evaluation.reconstruction import compute_psnr
from fqgan_dist.stages.damage import DamagedSample
from fqgan_dist.stages.shards import open_dataset
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.tokenizer.model import FactorizedTokenizer

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")

_CACHED_TABLES = 8


@dataclass(frozen=True)
class CroppedImages:
    """Views of some samples; view v of sample i is row i * num_views + v."""

    images: Tensor
    """(n * num_views, 3, H, W) uint8; black where the sample is damaged."""
    keys: list[str]
    """n sample keys."""
    labels: Tensor
    """(n,) int64."""
    crops: list[list[CropRecord]]
    """Of each sample, the crop of each view; empty crops where it is damaged."""
    damage: dict[int, DamagedSample]
    """What is wrong with the samples that are damaged, by their number among the n."""

    @property
    def is_sound(self) -> Tensor:
        """Which of the n samples are not damaged, (n,) bool."""
        return torch.tensor([row not in self.damage for row in range(len(self.keys))])


class ImageReader:
    """Reads views of a split's images in the dataset's order, for everything but training.

    What a damaged image does is `data.on_damage`, as in training. With `replace` a black image
    keeps its place, so that the batches of the others, and with them their numbers to the bit, are
    those of the undamaged dataset; whoever reads leaves it out. As in training it is an error if
    too many in a row of those are damaged that could stand in for it.
    """

    def __init__(
        self, dataset: Dataset, data: DataConfig, view: ViewConfig, views: Sequence[int] = (0,)
    ) -> None:
        """Name what is read: these views of every image, by the settings of a run's data."""
        self.dataset = dataset
        self._view = view
        self._views = views
        self._seed = data.seed
        self._limit = data.damage_limit
        self._tables = BoundedCache(self._load_table, _CACHED_TABLES)
        self._reader = SampleReader(self.dataset, load_table=self._tables.get, cache=None)

    def read_shard(self, shard: int, *, batch_size: int) -> Iterator[CroppedImages]:
        """Read a whole shard as batches of at most `batch_size` crops, whole samples each.

        Args:
            shard: its number in the index.
            batch_size: crops.

        Raises:
            DataError: the shard is missing, or samples are damaged and may not be. With
                `on_damage: fail` also if the shard is not the one of the index to the bit, which is
                known only after the last batch.
        """
        samples_per_batch = max(1, batch_size // len(self._views))
        entry, table = self.dataset.index.shards[shard], self._tables.get(shard)
        is_strict = self._limit == 1
        images = iterate_images(self.dataset.folder, entry, table, is_strict=is_strict)
        rows = iter(range(len(table)))
        while places := [(shard, row) for row in itertools.islice(rows, samples_per_batch)]:
            yield self._crop_all(places, [next(images) for _ in places])
        rest = list(images)  # none, but the shard's hash is compared at the end
        assert not rest, "a table has a row for every image"

    def read_rows(self, rows: range) -> CroppedImages:
        """Read a range of samples by their offsets in the tars.

        Raises:
            DataError: a shard is missing, or samples are damaged and may not be.
        """
        places: list[tuple[int, int]] = []
        first = 0
        for shard, entry in enumerate(self.dataset.index.shards):
            wanted = range(max(rows.start - first, 0), min(rows.stop - first, entry.count))
            places += [(shard, row) for row in wanted]
            first += entry.count
        return self._crop_all(places, self._reader.read(places))

    def _crop_all(
        self, places: Sequence[tuple[int, int]], encoded: Sequence[bytes | DataError]
    ) -> CroppedImages:
        pixels: list[np.ndarray] = []
        crops: list[list[CropRecord]] = []
        damage: dict[int, DamagedSample] = {}
        for number, ((shard, row), data) in enumerate(zip(places, encoded, strict=True)):
            # What came wrong in a stream may be right where it is stored: read it once more.
            is_whole = isinstance(data, bytes)
            found = self._crop(shard, row, data) if is_whole else self._load(shard, row)
            if isinstance(found, DataError):
                damage[number] = self._accept_damage(shard, row, found)
                found = [_black_view(self._view)] * len(self._views)
            pixels += [crop for crop, _ in found]
            crops.append([record for _, record in found])
        tables = [(self._tables.get(shard), row) for shard, row in places]
        return CroppedImages(
            images=torch.from_numpy(np.stack(pixels)),
            keys=[table.keys[row] for table, row in tables],
            labels=torch.tensor([int(table.labels[row]) for table, row in tables]),
            crops=crops,
            damage=damage,
        )

    def _load(self, shard: int, row: int) -> list[tuple[np.ndarray, CropRecord]] | DataError:
        """Read a sample and make its views; a DataError if it is damaged."""
        (data,) = self._reader.read([(shard, row)])
        return data if isinstance(data, DataError) else self._crop(shard, row, data)

    def _crop(
        self, shard: int, row: int, data: bytes
    ) -> list[tuple[np.ndarray, CropRecord]] | DataError:
        key, file = self._tables.get(shard).keys[row], self.dataset.index.shards[shard].file
        name = f"{self.dataset.folder.uri(file)}: sample {key!r}"
        try:
            return load_views(
                data, self._view, seed=self._seed, key=key, views=self._views, name=name
            )
        except DataError as error:
            return error

    def _accept_damage(self, shard: int, row: int, damage: DataError) -> DamagedSample:
        """Say what is damaged, if there is a sound sample that could stand in for it."""
        index = self.dataset.index
        order = SampleOrder(
            [entry.count for entry in index.shards],
            dataset_id=self.dataset.id,
            seed=self._seed,
            window_shards=1,
        )
        others = (place for place in order.walk("stand_in", shard, row) if place != (shard, row))
        find_stand_in(
            damage,
            others,
            self._load,
            max_damaged_in_a_row=self._limit,
            shortage="the dataset has no further sample",
        )
        logger.warning("damaged sample: %s; it is left out", damage)
        key = self._tables.get(shard).keys[row]
        return DamagedSample(
            split=index.split, shard=index.shards[shard].file, key=key, reason=str(damage)
        )

    def _load_table(self, shard: int) -> SampleTable:
        return load_samples(self.dataset.folder, self.dataset.index.shards[shard])


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
        reader = ImageReader(dataset, context.config.data, center_view(context))
        total = min(count, dataset.index.num_samples)
        world = context.world
        self.batches = {
            chunk: reader.read_rows(chunk_range(chunk, batch_size, total))
            for chunk in range(world.rank, count_chunks(total, batch_size), world.world_size)
        }
        sound = {chunk: rows.is_sound.tolist() for chunk, rows in self.batches.items()}
        if not any(_gather_chunks(sound, world.world_size)):
            raise DataError(
                f"{dataset.folder.root}: the first {total} validation images, which the "
                f"tokenizer is measured on, are all damaged; check them with `fqgan-data verify`"
            )

    @torch.inference_mode()
    def measure_tokenizer(self, tokenizer: FactorizedTokenizer) -> dict[str, float]:
        """Compute the mean PSNR of reconstructions; the same on every rank, for any number."""
        values: dict[int, list[float]] = {}
        for chunk, rows in self.batches.items():
            ACTIVITY.move()
            output = tokenizer(to_float(rows.images.to(self.context.device)))
            psnr = compute_psnr(to_uint8(output.reconstruction).cpu(), rows.images)
            values[chunk] = psnr[rows.is_sound].tolist()
        ordered = _gather_chunks(values, self.context.world.world_size)
        return {"tokenizer/validation/psnr": float(np.mean(ordered))}


def center_view(context: RunContext) -> ViewConfig:
    return ViewConfig(policy="center", image_size=context.config.tokenizer.model.image_size)


def _gather_chunks(values: dict[int, list[ValueT]], world_size: int) -> list[ValueT]:
    if world_size > 1:
        gathered: list[dict[int, list[ValueT]]] = [{} for _ in range(world_size)]
        dist.all_gather_object(gathered, values)
        values = {chunk: item for part in gathered for chunk, item in part.items()}
    return [value for chunk in sorted(values) for value in values[chunk]]


def _black_view(view: ViewConfig) -> tuple[np.ndarray, CropRecord]:
    size = view.image_size
    return np.zeros((3, size, size), np.uint8), CropRecord(0, 0, 0, 0, flip=False)

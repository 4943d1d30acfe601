"""The loaders that are compared: ours, webdataset, MosaicML streaming and litData.

Each function runs in a process of its own and yields batches of crops without end: a random scale,
place and mirroring, (B, 3, H, W) uint8, shuffled as the library advises. Peers make their crops in
one of two ways:

* `torchvision`: `torchvision.io.decode_jpeg`, the fastest decoder that any of the three brings
  (litData's; webdataset and streaming bring Pillow's, which is slower), then torchvision's
  `resized_crop`, which crops before it resizes (bicubic and antialiased, as ours), and a flip;
* `ours`: the very function of our fast mode, so that nothing but the loaders differs.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from benchmarks.data_loading.measured_process import Batch
from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.loader import ImageLoader
from fqgan_dist.data.view_loading import load_view
from fqgan_dist.storage.storage import Storage

CropBy = Literal["torchvision", "ours"]
Crop = Callable[[bytes], Tensor]

_SEED = 0
_LARGEST_SCALE = 1.25
_SHUFFLED_SAMPLES = 1000
"""webdataset: size of its shuffle buffer, the default of most of its examples."""


def view_config(size: int) -> ViewConfig:
    """Give the random crops of our fast mode."""
    return ViewConfig.model_validate(
        {"policy": "random_crop_flip", "image_size": size, "mode": "fast"}
    )


def load_ours(folder: Path, size: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """Load with `ImageLoader` from our shards; every image is checked against its digest."""
    loader = ImageLoader(
        Dataset.open(Storage(folder)),
        seed=_SEED,
        view=view_config(size),
        num_views=None,
        micro_batch_size=batch_size,
        micro_batches_per_step=1,
        window_shards=8,
        loader_workers=workers,
        max_damaged_in_a_row=1,
    )
    for (batch,) in loader.batches(0, [0]):
        yield batch.images, batch.labels


def load_webdataset(
    folder: Path, size: int, batch_size: int, workers: int, crop_by: CropBy
) -> Iterator[Batch]:
    """Load with webdataset from our shards."""
    from webdataset.compat import WebDataset
    from webdataset.shardlists import split_by_worker

    crop = make_crop(size, crop_by)
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    # Typed as anything: webdataset's stubs do not know its own fluent methods.
    dataset: Any = WebDataset(
        shards, shardshuffle=len(shards), workersplitter=split_by_worker, seed=_SEED
    )
    dataset = dataset.shuffle(_SHUFFLED_SAMPLES).to_tuple("jpg", "cls").map_tuple(crop, int)
    batches = dataset.batched(batch_size, collation_fn=default_collate, partial=False)
    yield from _loader(DataLoader, batches.repeat(), None, workers)


def load_streaming(
    folder: Path, size: int, batch_size: int, workers: int, crop_by: CropBy
) -> Iterator[Batch]:
    """Load with MosaicML streaming from its own MDS shards."""
    streaming = importlib.import_module("streaming")
    crop = make_crop(size, crop_by)

    class Crops(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return crop(sample["image"]), sample["label"]

    dataset = Crops(local=str(folder), shuffle=True, batch_size=batch_size, num_canonical_nodes=1)
    yield from _repeat(_loader(DataLoader, dataset, batch_size, workers))


def load_litdata(
    folder: Path, size: int, batch_size: int, workers: int, crop_by: CropBy
) -> Iterator[Batch]:
    """Load with litData from its own optimized chunks."""
    litdata = importlib.import_module("litdata")
    crop = make_crop(size, crop_by)

    class Crops(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return crop(sample["image"]), sample["label"]

    dataset = Crops(str(folder), shuffle=True, drop_last=True)
    yield from _repeat(_loader(litdata.StreamingDataLoader, dataset, batch_size, workers))


def make_crop(size: int, crop_by: CropBy) -> Crop:
    """Give the function that decodes and crops for a peer: bytes to (3, size, size) uint8."""
    return _TorchvisionCrop(size) if crop_by == "torchvision" else _OurCrop(size)


class _TorchvisionCrop:
    """Decode whole, crop, resize once with antialiasing, perhaps mirror."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, data: bytes) -> Tensor:
        size = self._size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the bytes are not written to
            encoded = torch.frombuffer(data, dtype=torch.uint8)
        image = decode_jpeg(encoded, mode=ImageReadMode.RGB)
        assert isinstance(image, Tensor), "one image gives one tensor"
        height, width = image.shape[1:]
        short_side, top, left, flip = torch.rand(4).tolist()
        # The same choice as our random crop, in pixels of the image before it is resized.
        scale = (size + int(short_side * (size * (_LARGEST_SCALE - 1) + 1))) / min(height, width)
        side = round(size / scale)
        place = (round(top * (height - side)), round(left * (width - side)), side, side)
        crop = transforms.resized_crop(
            image, *place, [size, size], InterpolationMode.BICUBIC, antialias=True
        )
        return transforms.horizontal_flip(crop) if flip < 0.5 else crop


class _OurCrop:
    """Our fast mode, for a peer: the draws are keyed by a count, where ours have key and epoch."""

    def __init__(self, size: int) -> None:
        self._view = view_config(size)
        self._count = 0

    def __call__(self, data: bytes) -> Tensor:
        self._count += 1
        pixels, _ = load_view(
            data, self._view, seed=_SEED, key="sample", view=self._count, name="sample"
        )
        return torch.from_numpy(pixels)


def _loader(kind: Any, dataset: Any, batch_size: int | None, workers: int) -> Iterable[Batch]:
    """Make a peer's loader; `batch_size` None: the dataset makes batches."""
    return kind(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        drop_last=batch_size is not None,
        persistent_workers=workers > 0,
        # The peers' usual way on Linux; our own workers are spawned.
        multiprocessing_context="fork" if workers else None,
    )


def _repeat(loader: Iterable[Any]) -> Iterator[Batch]:
    while True:
        yield from ((images, labels) for images, labels in loader)

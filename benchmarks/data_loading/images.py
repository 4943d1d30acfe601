"""The images that are measured with, and datasets made from them by the project's own tool."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fqgan_dist.data.index import load_index, load_samples
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.storage import Storage

_JPEG_MAGIC = b"\xff\xd8\xff"
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_ORIENTATION_TAG = 0x0112
_TYPICAL_FACTOR = 1.6


@dataclass(frozen=True)
class SourceImage:
    """One JPEG."""

    name: str
    """Its name in the source."""
    data: bytes
    """The file."""
    width: int
    """Pixels per row."""
    height: int
    """Rows."""


def read_images(path: Path | None, limit: int | None = None) -> list[SourceImage]:
    """Read all JPEGs of a folder, of the tar files in it, or of one tar file, sorted by name.

    Files of other formats are left out, as are JPEGs with an EXIF orientation: the reference
    pipeline does not apply it, ours does, and so the two would show different crops.

    Raises:
        ConfigError: there is no such file or folder, or no JPEG in it.
    """
    if path is None:
        raise ConfigError("images: required for this subject; name a folder of JPEGs or a tar file")
    if not path.exists():
        raise ConfigError(f"images: {str(path)!r}: no such file or folder; correct the path")
    images: list[SourceImage] = []
    for name, data in sorted(_read_files(path)):
        if data.startswith(_JPEG_MAGIC):
            with Image.open(io.BytesIO(data)) as image:
                if image.getexif().get(_ORIENTATION_TAG, 1) == 1:
                    images.append(SourceImage(name, data, *image.size))
    if not images:
        raise ConfigError(f"images: {str(path)!r}: no JPEG there; name a folder or tar with some")
    return images[:limit]


def select_typical(images: Sequence[SourceImage]) -> list[SourceImage]:
    """Keep the images whose bytes and pixels are near the median.

    Loaders draw different images in a round; with these the work of a round is nearly the same.
    """
    keep = np.ones(len(images), bool)
    for values in (
        [len(image.data) for image in images],
        [image.width * image.height for image in images],
    ):
        relative = np.asarray(values) / np.median(values)
        keep &= (relative < _TYPICAL_FACTOR) & (relative > 1 / _TYPICAL_FACTOR)
    return [image for image, is_kept in zip(images, keep, strict=True) if is_kept]


def write_tree(images: Sequence[SourceImage], folder: Path, *, copies: int = 1) -> None:
    """Write images as an image folder: one class per image, so that labels say what a crop shows.

    Args:
        images: the label of each in a dataset of the folder is its position.
        folder: new folder.
        copies: hard links to each image, with names of their own.
    """
    for number, image in enumerate(images):
        class_folder = folder / f"image{number:06d}"
        class_folder.mkdir(parents=True)
        first = class_folder / "copy000.jpg"
        first.write_bytes(image.data)
        for copy in range(1, copies):
            (class_folder / f"copy{copy:03d}.jpg").hardlink_to(first)


def make_shards(tree: Path, destination: Path, *options: str) -> Storage:
    """Make a dataset of an image folder with `fqgan-data shard`.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-m", "data_tools.cli", "shard", str(tree), str(destination)]
    done = subprocess.run(
        [*command, "name=benchmark", "split=train", "workers=1", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"fqgan-data shard failed: {done.stderr[-2000:]}")
    return Storage(destination)


def read_dataset(dataset: Storage) -> list[bytes]:
    """Read all encoded images of a dataset, in the order of their labels."""
    found: list[tuple[int, bytes]] = []
    for entry in load_index(dataset).shards:
        table = load_samples(dataset, entry)
        ranges = [
            (entry.file, int(offset), int(size))
            for offset, size in zip(table.offsets, table.sizes, strict=True)
        ]
        found += zip(table.labels.tolist(), dataset.read_ranges(ranges), strict=True)
    return [data for _, data in sorted(found, key=lambda pair: pair[0])]


def _read_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.name.endswith(_TAR_SUFFIXES):
                yield from _read_tar(file)
            elif file.is_file():
                yield str(file.relative_to(path)), file.read_bytes()
    else:
        yield from _read_tar(path)


def _read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield f"{path.name}/{member.name}", stream.read()

"""The same images in every kind of container that a source may be."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from support.source_files import tar_bytes, write_files, write_tar

from fqgan_dist.sharding.listing import class_of

Images = Sequence[tuple[str, bytes]]
"""Class and image."""


def name_images(images: Images) -> list[tuple[str, bytes]]:
    """Name images as class folders hold them."""
    return [(f"{name}/{row:03d}.png", data) for row, (name, data) in enumerate(images)]


def write_folder(path: Path, images: Images) -> Path:
    """Write class folders."""
    return write_files(path, name_images(images))


def write_class_tar(path: Path, images: Images) -> Path:
    """Write a tar of class folders."""
    return write_tar(path.with_suffix(".tar"), name_images(images))


def write_packed_tar(path: Path, images: Images) -> Path:
    """Write a compressed tar of class folders."""
    return write_tar(path.with_suffix(".tar.gz"), name_images(images))


def write_tar_of_tars(path: Path, images: Images) -> Path:
    """Write a tar of a tar per class, as ImageNet's is."""
    members: dict[str, list[tuple[str, bytes]]] = {}
    for row, (name, data) in enumerate(images):
        members.setdefault(name, []).append((f"{row:03d}.png", data))
    tars = [(f"{name}.tar", tar_bytes(files)) for name, files in members.items()]
    return write_tar(path.with_suffix(".tar"), tars)


def write_zip(path: Path, images: Images) -> Path:
    """Write a zip of class folders."""
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, data in name_images(images):
            archive.writestr(name, data)
    return path.with_suffix(".zip")


def write_shards(path: Path, images: Images) -> Path:
    """Write a folder of WebDataset shards."""
    members = [
        (f"{row:03d}.{suffix}", part)
        for row, (name, data) in enumerate(images)
        for suffix, part in (("cls", name.encode()), ("png", data))
    ]
    path.mkdir()
    write_tar(path / "a-000000.tar", members)
    return path


def write_parquet(path: Path, images: Images) -> Path:
    """Write a table of images; where all classes are numbers, its labels are integers."""
    names, data = zip(*images, strict=True)
    labels: list[str | int] = list(names)
    if all(name.removeprefix("-").isdecimal() for name in names):
        labels = [int(name) for name in names]
    pq.write_table(pa.table({"image": list(data), "label": labels}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_manifest(path: Path, images: Images) -> Path:
    """Write files and a list of them."""
    write_files(path, name_images(images))
    with (path / "list.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(name, class_of(name)) for name, _ in name_images(images)]
        csv.writer(file).writerows([("path", "class"), *rows])
    return path / "list.csv"


CONTAINERS: dict[str, Callable[[Path, Images], Path]] = {
    "folder": write_folder,
    "tar": write_class_tar,
    "packed tar": write_packed_tar,
    "tar of tars": write_tar_of_tars,
    "zip": write_zip,
    "shards": write_shards,
    "parquet": write_parquet,
    "manifest": write_manifest,
}
"""Each writes images near a path, and gives the source."""

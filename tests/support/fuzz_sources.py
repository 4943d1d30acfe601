"""Sources of images for fuzzing: lists, classes, archives, tables, images."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from support.byte_mutations import (
    mutate_bytes,
    mutate_json_lines,
    mutate_text,
    splice,
)
from support.containers import write_parquet, write_zip
from support.file_mutations import (
    mutate_image,
    mutate_parquet,
    mutate_tar,
    mutate_zip,
)
from support.fuzz_files import (
    sharding_config,
    spread_files,
)
from support.fuzzing import Target
from support.source_files import png, tar_bytes

from fqgan_dist.data.decoding import decode_image, decode_jpeg, read_jpeg_header, read_size
from fqgan_dist.data.jpeg_regions import ResizedAxis, resize_jpeg_region
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.class_files import read_class_map, read_classes
from fqgan_dist.sharding.config import SourceOptions
from fqgan_dist.sharding.foreign_scan import ShardScan, scan_shard
from fqgan_dist.sharding.plan import plan_dataset
from fqgan_dist.sharding.sample_rules import SampleRules
from fqgan_dist.sharding.sources.file_list import read_image_list
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.telemetry.observer import SILENT

_MANY = 300
"""Rows of a listing that are read, at most."""

_LISTS = {
    "csv": "path,class,key\na/x.jpg,cat,k1\na/y.jpg,dog,k2\nz.png,3,k3\n",
    "tsv": "x.JPEG\tn01440764\t0\t0\t62\t62\ny.JPEG\tn01443537\t1\t2\t3\t4\n",
    "txt": "a/x.jpg 1\na/y.jpg 2\nb/z.webp 3\n",
    "jsonl": '{"path": "a/x.jpg", "class": 1}\n{"path": "b.png", "class": "dog", "key": "k"}\n',
}


def _list_reader(ending: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        for options in (SourceOptions(), SourceOptions(keep_keys=False)):
            with SILENT.track(None, "x", "rows") as bar:
                images = read_image_list(
                    io.BytesIO(data), f"x.{ending}", options, bar, split="train"
                )
            _ = images.start

    return read


def _list_source_reader(ending: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        images = {name: png(1) for name in ("a/x.jpg", "a/y.jpg", "z.png", "b/z.webp", "x.JPEG")}
        spread_files(folder, images | {f"x.{ending}": data})
        _use_source(folder / f"x.{ending}")

    return read


def _class_file_reader(reader: Callable[[str], object]) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        path = folder / "classes.txt"
        path.write_bytes(data)
        reader(str(path))

    return read


def _make_class_files() -> list[bytes]:
    texts = ("cat\ndog\n", "n01440764\ttench\nn01443537 goldfish\n", "0 cat\n1, dog\n2\tbird\n")
    return [text.encode() for text in texts]


# Sources: archives, tables and shards of others.


def _shard_tar() -> bytes:
    return tar_bytes(
        [
            ("a/1.png", png(1)),
            ("a/1.cls", b"3"),
            ("a/2.png", png(2)),
            ("a/2.json", b'{"label": "cat", "x": [1, 2]}'),
            ("a/2.cls", b"cat"),
            ("b.pkl", b"x"),
            ("c.webp", b"RIFF"),
            ("c.cls", b"-1"),
        ]
    )


def _read_foreign_shard(data: bytes, folder: Path) -> None:
    storage = spread_files(folder, {"a.tar": data})
    for rules in (SampleRules(), SampleRules(class_key="json.label")):
        scan = scan_shard(storage, "a.tar", rules, is_deep=True)
        ShardScan.from_bytes(scan.to_bytes())


def _use_source(path: Path, **options: Any) -> None:
    with open_source(str(path), **options) as listing:
        listing.class_names()
        for row in range(min(len(listing), _MANY)):
            listing.read(row)
        plan_dataset(listing, sharding_config())


def _source_reader(name: str, **options: Any) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        (folder / name).write_bytes(data)
        _use_source(folder / name, **options)

    return read


def _make_image_tar() -> list[bytes]:
    plain = tar_bytes([("cat/1.png", png(1)), ("cat/2.png", png(2)), ("dog/3.png", png(3))])
    nested = tar_bytes([("cat.tar", tar_bytes([("1.png", png(1))])), ("dog.tar", plain)])
    return [plain, nested]


def _make_packed_tars() -> list[bytes]:
    members = [("cat/1.png", png(1)), ("dog/2.png", png(2))]
    return [tar_bytes(members, mode=f"w:{mode}") for mode in ("gz", "bz2", "xz")]


def _make_zips() -> list[bytes]:
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", method) as archive:
            for number in range(3):
                with archive.open(f"cat/{number}.png", "w", force_zip64=number == 1) as member:
                    member.write(png(number))
        found.append(sink.getvalue())
    # As of a file of more than 4 GiB: the numbers stand in the zip64 records.
    with tempfile.TemporaryDirectory() as folder:
        found.append(write_zip(Path(folder) / "x", [("cat", png(1)), ("dog", png(2))]).read_bytes())
    return found


def _make_image_tables() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        images = [("1", png(1)), ("2", png(2)), ("3", png(3))]
        plain = write_parquet(Path(folder) / "x", images).read_bytes()
    rows = [{"bytes": png(4), "path": "a/x.png"}, {"bytes": png(5), "path": None}]
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": rows, "label": [0, 1], "id": ["a", "b"]})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), sink)
    return [plain, sink.getvalue()]


# Images.


def _make_images() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    found = []
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, mode, options in (
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("PNG", "RGB", {"exif": exif}),
        ("PNG", "P", {"transparency": 1}),
        ("PNG", "I;16", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {"exif": exif}),
        ("WEBP", "RGBA", {"lossless": True}),
    ):
        sink = io.BytesIO()
        made = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        made.save(sink, kind, **options)
        found.append(sink.getvalue())
    return found


def _read_image(data: bytes, folder: Path) -> None:
    with_error: list[DataError] = []
    for read in (read_size, _read_jpeg, decode_image):
        try:
            read(data, name="x")
        except DataError as error:
            with_error.append(error)
    if with_error:
        raise with_error[0]


def _read_jpeg(data: bytes, *, name: str) -> None:
    header = read_jpeg_header(data, name=name)
    if header is not None:
        decode_jpeg(data, header)
        decode_jpeg(data, header, reduction=4)
        side = min(header.height, header.width, 64)
        rows = ResizedAxis(header.height - side, side, 1.0, side, 0)
        columns = ResizedAxis(0, header.width, side / header.width, side, 0)
        if columns.scale > 0.25:
            out = np.empty((3, side, side), np.uint8)
            resize_jpeg_region(data, header, rows, columns, side=side, flip=True, out=out)


_ANY_TAR = splice([mutate_tar, mutate_tar, mutate_bytes])


TARGETS: tuple[Target, ...] = (
    *(
        Target(
            f"{what}{ending} list",
            functools.partial(lambda text: [text.encode()], text),
            mutate_json_lines if ending == "jsonl" else mutate_text,
            make_reader(ending),
        )
        for what, make_reader in (("", _list_reader), ("source of a ", _list_source_reader))
        for ending, text in _LISTS.items()
    ),
    Target("classes", _make_class_files, mutate_text, _class_file_reader(read_classes)),
    Target("class map", _make_class_files, mutate_text, _class_file_reader(read_class_map)),
    Target("foreign shard", lambda: [_shard_tar()], _ANY_TAR, _read_foreign_shard),
    Target(
        "shard as a source",
        lambda: [_shard_tar()],
        _ANY_TAR,
        _source_reader("a.tar", format="webdataset"),
    ),
    Target("tar", _make_image_tar, _ANY_TAR, _source_reader("a.tar")),
    Target("packed tar", _make_packed_tars, mutate_bytes, _source_reader("a.tar.gz")),
    Target("zip", _make_zips, mutate_zip, _source_reader("a.zip")),
    Target("parquet table", _make_image_tables, mutate_parquet, _source_reader("a.parquet")),
    # 4 bytes for each pixel that may be, of two copies where a palette has a transparency.
    Target("image", _make_images, mutate_image, _read_image, max_bytes=2**30),
)

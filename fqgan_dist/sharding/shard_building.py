"""Make the bytes of one shard: read, check, perhaps reduce its images, and pack them as a tar."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from webdataset.writer import TarWriter

from fqgan_dist.config import Config
from fqgan_dist.data.decoding import decode_image
from fqgan_dist.data.index import SampleTable, SourceProblem, image_digest, stack_digests
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.listing import SourceListing, class_of, printable

# Extension by content, not by name: ImageNet has a PNG that is named .JPEG.
_EXTENSIONS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}


class ImagePolicy(Config):
    """How a dataset's images are made from the source's."""

    short_side: int | None = Field(default=None, ge=16)
    """Images whose short side is longer are reduced to it and stored as JPEG; all others keep their
    bytes. None: every image keeps its bytes."""
    jpeg_quality: int = Field(default=95, ge=50, le=100)
    """Quality of images that are reduced."""

    @model_validator(mode="after")
    def _check_effect(self) -> ImagePolicy:
        if self.short_side is None and "jpeg_quality" in self.model_fields_set:
            raise ValueError("jpeg_quality: has no effect without short_side; leave it out")
        return self

    def describe_images(self) -> dict[str, Any]:
        """Give what the index tells about the images."""
        if self.short_side is None:
            return {"kind": "original"}
        return {
            "kind": "short_side",
            "short_side": self.short_side,
            "jpeg_quality": self.jpeg_quality,
        }


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One image before it is read."""

    row: int
    """Its row in the source's listing."""
    key: str
    """Key in the dataset."""
    name: str
    """Name in the source."""
    label: int
    """Class index."""


@dataclass(frozen=True, eq=False)
class BuiltShard:
    """One shard in memory."""

    tar: bytes
    """The tar file."""
    table: SampleTable
    """Its samples; none where no image could be decoded."""
    problems: list[SourceProblem]
    """The images that are left out."""


@dataclass(frozen=True, eq=False)
class _EncodedImage:
    data: bytes
    extension: str
    width: int
    height: int


def build_shard(
    samples: Sequence[PlannedSample],
    source: SourceListing,
    policy: ImagePolicy,
    executor: Executor,
) -> BuiltShard:
    """Read and check the images of a shard and pack them, in order.

    Raises:
        DataError: a member of the source cannot be read any more.
    """
    images = executor.map(partial(_encode_image, source=source, policy=policy), samples)
    stored: list[tuple[PlannedSample, _EncodedImage]] = []
    problems: list[SourceProblem] = []
    for sample, image in zip(samples, images, strict=True):
        if isinstance(image, SourceProblem):
            problems.append(image)
        else:
            stored.append((sample, image))
    tar = _pack(stored)
    return BuiltShard(tar, _tabulate(stored, tar), problems)


def _encode_image(
    sample: PlannedSample, *, source: SourceListing, policy: ImagePolicy
) -> _EncodedImage | SourceProblem:
    try:
        data = source.read(sample.row)
    except OSError as error:
        raise DataError(
            f"{source.uri}: {sample.name!r} cannot be read ({error}); "
            "it was there when the source was listed: run again when the source is whole"
        ) from error
    try:
        # Decoded whole, also to keep its bytes: a truncated image shows only so.
        image = decode_image(data, name=sample.name)
    except DataError as error:
        return SourceProblem(name=sample.name, reason=_describe(error), action="skipped")
    short_side = policy.short_side
    if short_side is None or min(image.size) <= short_side:
        return _EncodedImage(data, _find_extension(data), image.width, image.height)
    return _reduce(image, short_side, policy.jpeg_quality)


def _describe(error: DataError) -> str:
    """Say why an image does not decode, in the same words in every run: the index holds them."""
    reason = f"cannot be decoded: {error.__cause__}" if error.__cause__ else str(error)
    # Pillow's message for unknown data prints the stream object, with its address.
    return printable(re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "data", reason))


def _find_extension(data: bytes) -> str:
    return next(extension for start, extension in _EXTENSIONS.items() if data.startswith(start))


def _reduce(image: Image.Image, short_side: int, quality: int) -> _EncodedImage:
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    reduced = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    # No chroma subsampling: it would be the visible part of the loss at this quality.
    reduced.save(file, "JPEG", quality=quality, subsampling=0)
    return _EncodedImage(file.getvalue(), "jpg", *size)


def _pack(stored: Sequence[tuple[PlannedSample, _EncodedImage]]) -> bytes:
    """Write `<key>.cls`, `.jpg` (or png, webp) and `.json` of each sample, with fixed metadata."""
    file = io.BytesIO()
    with TarWriter(
        file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False
    ) as writer:
        for sample, image in stored:
            facts = {
                "class": class_of(sample.name),
                "height": image.height,
                "source": sample.name,
                "width": image.width,
            }
            writer.write(
                {
                    "__key__": sample.key,
                    "cls": str(sample.label).encode(),
                    image.extension: image.data,
                    "json": json.dumps(facts, ensure_ascii=False).encode(),
                }
            )
    return file.getvalue()


def _tabulate(stored: Sequence[tuple[PlannedSample, _EncodedImage]], tar: bytes) -> SampleTable:
    # The places are read back from the tar, so that table and tar cannot disagree.
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        places = {member.name: member.offset_data for member in archive}
    return SampleTable(
        keys=[sample.key for sample, _ in stored],
        labels=np.array([sample.label for sample, _ in stored], np.int32),
        offsets=np.array(
            [places[f"{sample.key}.{image.extension}"] for sample, image in stored], np.int64
        ),
        sizes=np.array([len(image.data) for _, image in stored], np.int64),
        widths=np.array([image.width for _, image in stored], np.int32),
        heights=np.array([image.height for _, image in stored], np.int32),
        digests=stack_digests([image_digest(image.data) for _, image in stored]),
    )

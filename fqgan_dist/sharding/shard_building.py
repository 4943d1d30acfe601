"""Make the bytes of one shard: read its images, bring them into form, and pack them as a tar."""

from __future__ import annotations

import io
import json
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from webdataset.writer import TarWriter

from fqgan_dist.data.index import SampleTable, SourceProblem, image_digest, stack_digests
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.images import EncodedImage, ImagePolicy, make_image
from fqgan_dist.sharding.listing import ImageReader, Place, class_of

_READ_AHEAD = 16
"""Images that are read while others are decoded: a store answers in 20 ms or more."""


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One image before it is read."""

    key: str
    """Key in the dataset."""
    label: int
    """Class index."""
    name: str
    """Name in the source."""
    place: Place
    """Where it lies there."""


@dataclass(frozen=True, eq=False)
class BuiltShard:
    """One shard in memory."""

    tar: bytes
    """The tar file."""
    table: SampleTable
    """Its samples; none where no image could be decoded."""
    problems: list[SourceProblem]
    """The images that are left out."""


def build_shard(
    samples: Sequence[PlannedSample], reader: ImageReader, policy: ImagePolicy
) -> BuiltShard:
    """Read and check the images of a shard and pack them, in order.

    Raises:
        DataError: a member of the source cannot be read any more.
    """
    stored: list[tuple[PlannedSample, EncodedImage]] = []
    problems: list[SourceProblem] = []
    for sample, data in zip(samples, _read_ahead(samples, reader), strict=True):
        image = make_image(data, sample.name, policy)
        if isinstance(image, SourceProblem):
            problems.append(image)
        else:
            stored.append((sample, image))
    tar = _pack(stored)
    return BuiltShard(tar, _tabulate(stored, tar), problems)


def _read_ahead(samples: Sequence[PlannedSample], reader: ImageReader) -> Iterator[bytes]:
    """Read all images in order, a few at a time."""
    rest = iter(samples)
    with ThreadPoolExecutor(_READ_AHEAD) as threads:
        due: deque[Future[bytes]] = deque()
        for sample in islice(rest, _READ_AHEAD):
            due.append(threads.submit(_read, sample, reader))
        while due:
            data = due.popleft().result()
            for sample in islice(rest, 1):
                due.append(threads.submit(_read, sample, reader))
            yield data


def _read(sample: PlannedSample, reader: ImageReader) -> bytes:
    try:
        return reader.read(sample.name, sample.place)
    except OSError as error:
        raise DataError(
            f"{sample.name!r} cannot be read ({error}); it was there when the source was listed: "
            "run again when the source is whole, and on a cluster let every node see it"
        ) from error


def _pack(stored: Sequence[tuple[PlannedSample, EncodedImage]]) -> bytes:
    """Write `<key>.cls`, `.jpg` (or png, webp) and `.json` of each sample, with fixed metadata."""
    file = io.BytesIO()
    # No time, user or mode of the source: the same images give the same bytes, and the same id, on
    # every machine. No encoder: values are bytes, as they were.
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


def _tabulate(stored: Sequence[tuple[PlannedSample, EncodedImage]], tar: bytes) -> SampleTable:
    # The offsets are read back from the tar, so that table and tar cannot disagree.
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        offsets = {member.name: member.offset_data for member in archive}
    return SampleTable(
        keys=[sample.key for sample, _ in stored],
        labels=np.array([sample.label for sample, _ in stored], np.int32),
        offsets=np.array(
            [offsets[f"{sample.key}.{image.extension}"] for sample, image in stored], np.int64
        ),
        sizes=np.array([len(image.data) for _, image in stored], np.int64),
        widths=np.array([image.width for _, image in stored], np.int32),
        heights=np.array([image.height for _, image in stored], np.int32),
        digests=stack_digests([image_digest(image.data) for _, image in stored]),
    )

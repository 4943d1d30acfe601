"""Finds the samples of a shard in the tar itself, without trusting its table."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass

from fqgan_dist.sharding.listing import IMAGE_SUFFIXES

_MAX_LABEL_BYTES = 20


@dataclass(frozen=True)
class StoredSample:
    """One sample of a tar."""

    offset: int
    """Where the image's bytes begin."""
    size: int
    """Number of the image's bytes."""
    label: str
    """Text of the class member; "" where there is none."""


def scan_tar(tar: bytes) -> tuple[dict[str, StoredSample], str | None]:
    """Find the samples of a tar, as far as it can be read.

    Only the places of image members and the text of `.cls` members are taken; other members are
    neither read nor unpacked.

    Returns:
        Key -> sample, and what is wrong with the tar as a whole (None: nothing).
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    fault = None
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
            while (member := archive.next()) is not None:
                key, _, extension = member.name.partition(".")
                place = member.offset_data, member.size
                if not member.isreg():
                    fault = f"member {member.name!r} is not a plain file"
                elif f".{extension}" in IMAGE_SUFFIXES:
                    images[key] = place
                elif extension == "cls" and member.size <= _MAX_LABEL_BYTES:
                    labels[key] = tar[place[0] : sum(place)].decode("ascii", "replace")
    except (tarfile.TarError, OverflowError, ValueError) as error:
        fault = f"not readable as a tar to its end: {error}"
    samples = {key: StoredSample(*place, labels.get(key, "")) for key, place in images.items()}
    return samples, fault

"""The images of a source by name: which members count, and why others do not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fqgan_dist.data.index import SourceProblem
from fqgan_dist.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Endings of image names, in small letters."""

# ImageNet's largest image has 16 MB; a larger "image" would be read into memory whole.
_MAX_IMAGE_BYTES = 2**28
_MAX_NAME_LENGTH = 1000
_SHOWN_NAMES = 3


class ImageReader(Protocol):
    """Reads one member of a source; safe to call from several threads."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Give the bytes of the member with this name, place and size."""
        ...


@dataclass(frozen=True, eq=False)
class SourceListing:
    """The usable members of a source, sorted by name.

    Columns instead of one object per image: 14 million images (ImageNet-21k) have to fit.
    """

    uri: str
    """The source, for messages."""
    names: list[str]
    """`class/name.ext` of each member, sorted."""
    offsets: np.ndarray
    """Where each member begins, for the reader, (n,) int64."""
    sizes: np.ndarray
    """Bytes of each member, (n,) int64."""
    problems: list[SourceProblem]
    """The members that are not listed, sorted by name."""
    reader: ImageReader
    """Reads the members."""

    def __len__(self) -> int:
        return len(self.names)

    def class_names(self) -> list[str]:
        """Give the classes that occur, sorted."""
        return sorted({class_of(name) for name in self.names})

    def select(self, rows: np.ndarray) -> SourceListing:
        """Keep some members, given by their rows in ascending order; problems stay listed."""
        names = [self.names[row] for row in rows]
        return replace(self, names=names, offsets=self.offsets[rows], sizes=self.sizes[rows])

    def read(self, row: int) -> bytes:
        """Read a member."""
        return self.reader.read(self.names[row], int(self.offsets[row]), int(self.sizes[row]))


def class_of(name: str) -> str:
    """Give the class of a member, its folder."""
    return name.partition("/")[0]


class ListingBuilder:
    """Collects the members of a source and sorts out those that cannot be images."""

    def __init__(self, uri: str, subfolder: str) -> None:
        self.uri = uri
        self.subfolder = subfolder.strip("/")
        self._members: dict[str, tuple[int, int]] = {}
        self._problems: list[SourceProblem] = []

    def add(self, name: str, size: int, offset: int) -> None:
        """Take a plain file, or note why not."""
        while name.startswith("./"):
            name = name[2:]
        if danger := _find_danger(name):
            self.refuse(name, danger)
            return
        if self.subfolder:
            if not name.startswith(self.subfolder + "/"):
                return
            name = name[len(self.subfolder) + 1 :]
        if name in self._members:
            self.refuse(name, "the name occurs twice; the first one is used")
        elif reason := _find_fault(name, size):
            self.skip(name, reason)
        else:
            self._members[name] = (size, offset)

    def skip(self, name: str, reason: str) -> None:
        """Note a member that is not a usable image."""
        self._problems.append(SourceProblem(name=printable(name), reason=reason, action="skipped"))

    def refuse(self, name: str, reason: str) -> None:
        """Note a member of a dangerous name or kind."""
        self._problems.append(SourceProblem(name=printable(name), reason=reason, action="refused"))

    def build(self, reader: ImageReader) -> SourceListing:
        """Finish the listing.

        Raises:
            DataError: there is no image.
        """
        if not self._members:
            raise DataError(f"{self.uri}: {self._describe_emptiness()}")
        names = sorted(self._members)
        places = np.array([self._members[name] for name in names], dtype=np.int64)
        problems = sorted(self._problems, key=lambda problem: (problem.name, problem.reason))
        return SourceListing(self.uri, names, places[:, 1], places[:, 0], problems, reader)

    def _describe_emptiness(self) -> str:
        expected = "expected images as class/name.ext"
        if self.subfolder:
            expected += f" below {self.subfolder!r}"
        if not self._problems:
            return f"no files; {expected}"
        first = "; ".join(
            f"{problem.name!r}: {problem.reason}" for problem in self._problems[:_SHOWN_NAMES]
        )
        return (
            f"no images; {expected}, found {len(self._problems)} other members ({first} ...); "
            "if the class folders lie deeper, name their folder with subfolder=..."
        )


def printable(name: str) -> str:
    r"""Make any name fit for UTF-8 files and terminals: `\x1b` and lone bytes are spelled out."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in name
    )


def _find_danger(name: str) -> str | None:
    """Say why a name must not be used at all; None if it is safe."""
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "an absolute name"
    if ".." in name.split("/"):
        return "the name leaves the source's folder"
    if not name or "\\" in name or not name.isprintable():
        return "a name with a backslash, control character or byte that is not UTF-8"
    if len(name) > _MAX_NAME_LENGTH:
        return f"a name of {len(name)} characters; at most {_MAX_NAME_LENGTH} are allowed"
    return None


def _find_fault(name: str, size: int) -> str | None:
    """Say why a member cannot be an image; None if it may be one."""
    if name.count("/") != 1 or not all(name.split("/")):
        return "not class/name.ext"
    if not name.lower().endswith(IMAGE_SUFFIXES):
        return f"not named as an image ({', '.join(IMAGE_SUFFIXES)})"
    if size == 0:
        return "empty"
    if size > _MAX_IMAGE_BYTES:
        return f"{size} bytes; an image may have {_MAX_IMAGE_BYTES}"
    return None

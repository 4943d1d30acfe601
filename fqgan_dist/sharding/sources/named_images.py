"""Join a list of images and classes to the images, in whatever folder or archive they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.file_names import is_image_name
from fqgan_dist.sharding.listing import (
    NO_IMAGE_NAME,
    ImageReader,
    ListingBuilder,
    Place,
    SourceKind,
    SourceListing,
)
from fqgan_dist.sharding.sources.file_list import ImageList, ImageRow

_SHOWN_NAMES = 3


class NamedImagesBuilder(ListingBuilder):
    """Collects the images that a list names, with the classes that it gives them.

    A row means the image of its path, with or without the ending; a bare name means the one image
    that is called so, in whatever folder. Rows without paths are of the images in the order of
    their sorted names.
    """

    lists_all_depths = True
    expected = "rows with the path and class of an image"

    def __init__(
        self,
        images: ImageList,
        uri: str,
        subfolder: str = "",
        *,
        check_bytes: Literal[0, 4, 16] = 0,
    ) -> None:
        """Begin a listing of the images in `uri`; problems and errors are those of the list."""
        super().__init__(images.uri, subfolder, check_bytes=check_bytes)
        self.start = images.start
        self._list = images
        self._root = uri
        self._places: dict[str, Place] = {}
        self._refused: dict[str, str] = {}

    def refuse(self, name: str, reason: str) -> None:
        """Note a file or folder that must not be read."""
        self._refused[name] = reason
        super().refuse(name, reason)

    def take(self, name: str, place: Place) -> None:
        """Note where an image lies; other files are none of the list's."""
        if not is_image_name(name):
            return
        if name in self._places:
            self.refuse(name, "the name occurs twice; the first one is used")
        else:
            self._places[name] = place

    def build(
        self,
        kind: SourceKind,  # noqa: ARG002  whatever holds the images, the source is the list
        reader: ImageReader,
        *,
        is_shared_by_nodes: bool,
        **named: Any,
    ) -> SourceListing:
        """Join, then finish the listing."""
        self._join(self._find_images())
        return super().build("manifest", reader, is_shared_by_nodes=is_shared_by_nodes, **named)

    def _find_images(self) -> list[str | None]:
        """Give the image of each row; None: there is none, which is noted."""
        rows = self._list.rows
        if self._list.has_paths:
            return [self._find_image(row) for row in rows]
        if len(rows) != len(self._places):
            raise DataError(
                f"{self.uri}: {len(rows)} lines with a class each, but {len(self._places)} images "
                f"in {self._root}; expected a line for every image, in the order of their sorted "
                "names: correct root=, or take a list that names the images"
            )
        return [*sorted(self._places)]

    def _find_image(self, row: ImageRow) -> str | None:
        if row.is_dangerous:
            self.refuse(row.path, row.fault or "")
            return None
        if self.skip_dropping(row.path):
            return None
        if row.path in self._places:
            return row.path
        if row.path in self._refused:
            return None
        if fault := self._find_fault_above(row.path):
            self.refuse(row.path, fault)
            return None
        has_ending = is_image_name(row.path)
        found = self._by_name[has_ending].get(row.path, ())
        if len(found) == 1:
            return found[0]
        if found:
            reason = f"row {row.number}: {len(found)} images have this name ({', '.join(found)})"
        else:
            reason = "no such file" if has_ending else f"{NO_IMAGE_NAME}, nor the stem of an image"
        self.skip(row.path, reason)
        return None

    def _find_fault_above(self, path: str) -> str | None:
        """Say why a folder that leads to a path was refused; None if none was."""
        parts = path.split("/")
        folders = ("/".join(parts[:count]) for count in range(1, len(parts)))
        return next((self._refused[name] for name in folders if name in self._refused), None)

    @cached_property
    def _by_name(self) -> dict[bool, dict[str, Sequence[str]]]:
        """Give the images by what else a row may call them, with the ending and without."""
        return {True: self._group(str), False: self._group(lambda name: name.rpartition(".")[0])}

    def _group(self, shorten: Callable[[str], str]) -> dict[str, Sequence[str]]:
        whole: dict[str, list[str]] = {}
        bare: dict[str, list[str]] = {}
        for name in self._places:
            short = shorten(name)
            whole.setdefault(short, []).append(name)
            bare.setdefault(short.rpartition("/")[2], []).append(name)
        # An image at the top goes before others of its name.
        return {**bare, **whole}

    def _join(self, images: Sequence[str | None]) -> None:
        taken: dict[str, int] = {}
        for row, name in zip(self._list.rows, images, strict=True):
            if name is None:
                continue
            first = taken.setdefault(name, row.number)
            if first != row.number:
                self.skip(row.path, f"row {row.number}: named by row {first} already, which counts")
            elif row.fault is not None or row.class_name is None:
                self.skip(name, row.fault or "")
            else:
                # As in class folders, where that is what it is: the same images make the same
                # dataset.
                rest = name.removeprefix(f"{row.class_name}/")
                self.add_labelled(
                    row.class_name, rest, self._places[name], key=row.key, shown_name=name
                )
        self._note_unnamed(sorted(self._places.keys() - taken.keys()))

    def _note_unnamed(self, names: Sequence[str]) -> None:
        if names:
            shown = ", ".join(names[:_SHOWN_NAMES])
            more = ", ..." if len(names) > _SHOWN_NAMES else ""
            self.skip(
                self.uri.rpartition("/")[2], f"{len(names)} images are in no row: {shown}{more}"
            )


class OneFileBuilder(ListingBuilder):
    """Looks for one file of a folder or archive."""

    lists_all_depths = True

    def __init__(
        self,
        wanted: str,
        uri: str,
        subfolder: str = "",
        *,
        check_bytes: Literal[0, 4, 16] = 0,
    ) -> None:
        """Begin to look for a file by its name in `uri`."""
        super().__init__(uri, subfolder, check_bytes=check_bytes, expected=f"a file {wanted!r}")
        self._wanted = wanted

    def take(self, name: str, place: Place) -> None:
        """Take the file if it is the one."""
        if name == self._wanted:
            self.add_labelled("file", name, place)

"""The images of a source by name: which members count, why others do not, and where they lie."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from fqgan_dist.credentials import holds_credentials, redact
from fqgan_dist.data.index import SourceProblem, is_safe_key
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.config import THE_ONLY_CLASS
from fqgan_dist.sharding.droppings import REASON, find_dropping
from fqgan_dist.sharding.file_names import IMAGE_SUFFIXES, is_image_name
from fqgan_dist.sharding.labels import is_no_label, order_classes
from fqgan_dist.sharding.problems import check_problem_count, describe_kinds
from fqgan_dist.sharding.sources.splits import is_split
from fqgan_dist.terminal import printable

MAX_IMAGE_BYTES = 2**28
"""Largest image; ImageNet's largest has 16 MB, and a larger one would be read into memory whole."""

SourceKind = Literal[
    "photographs", "folder", "tar", "zip", "webdataset", "parquet", "manifest", "joined"
]

IN_CLASS_FOLDERS = "images as class/name.ext"
"""What folders and archives are expected to hold."""
NO_IMAGE_NAME = f"not named as an image ({', '.join(IMAGE_SUFFIXES)})"
"""Why a file is passed over."""

_IMAGES_FOLDER = "images"
_ADVICE_WITHOUT_FOLDERS = (
    "name the list of their classes as the source and this as its root, or give class_key=none if "
    "they have none (docs/data.md shows both)"
)
HOLDS_CREDENTIALS = "a URL with credentials; a dataset keeps names, and would spread them"
"""Why a name, key or class is not taken."""

_MAX_NAME_LENGTH = 1000


class Place(NamedTuple):
    """Where one image lies in a source, as plain values: a plan can hold it."""

    file: str
    """File of the source that holds it; for an image that is a file itself, that file."""
    offset: int
    """Where it begins there."""
    size: int
    """Number of the image's bytes."""
    packed_size: int = 0
    """Bytes that it takes there if it is deflated; 0: it is stored as it is."""
    check: bytes = b""
    """What the source says of the bytes, by which they are checked when they are read: nothing, a
    CRC-32 (4 bytes, the greatest first) or an `image_digest` (16 bytes)."""


class ImageReader(Protocol):
    """Reads one member of a source; safe to call from several threads, and picklable."""

    def read(self, name: str, place: Place) -> bytes:
        """Give the bytes of a member.

        Args:
            name: the member's name in the listing.
            place: where it lies.

        Raises:
            DataError: the member is gone, or has other bytes than when it was listed.
        """
        ...


@dataclass(frozen=True, eq=False)
class SourceListing:
    """The usable members of a source, sorted by name.

    Columns instead of one object per image: 14 million images (ImageNet-21k) have to fit.
    """

    uri: str
    """The source, for messages."""
    kind: SourceKind
    """What the source was taken for."""
    names: list[str]
    """`class/name` of each member, sorted and unique: the identity of an image."""
    files: list[str]
    """The files that hold members."""
    file_numbers: np.ndarray
    """Position in `files` of each member's file; -1 where the name is the file. (n,) int32."""
    offsets: np.ndarray
    """Where each member begins in its file, (n,) int64."""
    sizes: np.ndarray
    """Bytes of each member, (n,) int64."""
    packed_sizes: np.ndarray
    """Bytes of each member in its file if it is deflated there, else 0, (n,) int64."""
    checks: np.ndarray
    """See `Place.check`, (n, 0), (n, 4) or (n, 16) uint8."""
    problems: list[SourceProblem]
    """The members that are not listed, sorted by name."""
    reader: ImageReader
    """Reads the members, also in another process."""
    is_shared_by_nodes: bool
    """Whether other machines read the same bytes by `reader`."""
    keys: list[str] | None = None
    """Key of each member where the source gives keys, unique; None: it gives none."""
    classes: list[str] | None = None
    """The source's own classes in the order of their labels; None: it has no such order."""
    class_descriptions: Mapping[str, str] = field(default_factory=dict)
    """Readable names of classes that the source brings."""
    other_splits: frozenset[str] = frozenset()
    """Usual names of the splits of which the source has images that are not listed here."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_classes(self) -> bool:
        """Whether the images have classes; else all are of the one that stands for none."""
        return self.class_names() != [THE_ONLY_CLASS]

    def class_names(self) -> list[str]:
        """Give the classes in the order of their labels.

        They are the source's own, also those without an image here; else as `order_classes` has
        those that occur.
        """
        if self.classes is not None:
            return list(self.classes)
        return order_classes({class_of(name) for name in self.names})

    def select(self, rows: np.ndarray) -> SourceListing:
        """Keep some members, given by their rows in ascending order; problems stay listed."""
        chosen = rows.tolist()
        return replace(
            self,
            names=[self.names[row] for row in chosen],
            file_numbers=self.file_numbers[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            packed_sizes=self.packed_sizes[rows],
            checks=self.checks[rows],
            keys=None if self.keys is None else [self.keys[row] for row in chosen],
        )

    def place(self, row: int) -> Place:
        """Say where a member lies, for the reader."""
        number = int(self.file_numbers[row])
        return Place(
            file=self.files[number] if number >= 0 else self.names[row],
            offset=int(self.offsets[row]),
            size=int(self.sizes[row]),
            packed_size=int(self.packed_sizes[row]),
            check=self.checks[row].tobytes(),
        )

    def read(self, row: int) -> bytes:
        """Read a member."""
        return self.reader.read(self.names[row], self.place(row))


def class_of(name: str) -> str:
    """Give the class of a member, its folder."""
    return name.partition("/")[0]


class ListingBuilder:
    """Collects the members of a source and sorts out those that cannot be images.

    The class of a file is its folder; other builders know it from elsewhere (`take`).
    """

    expected: str = IN_CLASS_FOLDERS
    """What a source of this kind holds, for the error where there is nothing."""
    lists_all_depths: ClassVar[bool] = False
    """Whether images may lie in folders of any depth."""
    start: str = ""
    """Folder below the subfolder that all images lie in, so that others need not be listed."""

    def __init__(
        self,
        uri: str,
        subfolder: str = "",
        *,
        check_bytes: Literal[0, 4, 16] = 0,
        expected: str | None = None,
    ) -> None:
        """Begin a listing.

        Args:
            uri: the source.
            subfolder: folder of the source that holds the class folders.
            check_bytes: length of `Place.check` of all members.
            expected: what a source of this kind holds; None: what the builder expects.
        """
        self.uri = uri
        self.subfolder = subfolder.strip("/")
        self.expected = expected or self.expected
        self._check_bytes = check_bytes
        self._names: list[str] = []
        self._keys: list[str] = []
        self._files: dict[str, int] = {}
        # Packed arrays: 14 million members as Python objects would take gigabytes.
        self._file_numbers = array("i")
        self._numbers = array("q")  # offset, size and packed size of each member
        self._checks = bytearray()
        self._problems: list[SourceProblem] = []
        self._droppings: set[str] = set()
        self._class_folders: set[str] = set()
        self._deeper_image: str | None = None

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, place: Place) -> None:
        """Take a plain file of the source, or note why not."""
        while name.startswith("./"):
            name = name[2:]
        if danger := find_danger(name):
            self.refuse(name, danger)
        elif not self.subfolder:
            self.add_below(name, place)
        elif name.startswith(self.subfolder + "/"):
            self.add_below(name[len(self.subfolder) + 1 :], place)

    def add_below(self, name: str, place: Place) -> None:
        """Take a plain file of a safe name that is relative to the subfolder."""
        if not self.skip_dropping(name):
            self.take(name, place)

    def take(self, name: str, place: Place) -> None:
        """Take a file of a name like `class/name.ext`, or note why not."""
        class_name, _, file_name = name.partition("/")
        if file_name:
            self._class_folders.add(class_name)
        if "/" in file_name and is_folder_of_images(name.rpartition("/")[0]):
            file_name = file_name.rpartition("/")[2]
        if not class_name or not file_name or "/" in file_name:
            self.note_deeper_image(name)
            self.skip(name, "not class/name.ext")
        elif not is_image_name(name):
            self.skip(name, NO_IMAGE_NAME)
        elif reason := _find_fault_of_label(class_name) or _find_fault_of_size(place.size):
            self.skip(name, reason)
        else:
            self._take(f"{class_name}/{file_name}", place)

    def note_deeper_image(self, name: str) -> None:
        """Remember the first image of folders that lie too deep, for the error where all do."""
        if self._deeper_image is None and name.count("/") > 1 and is_image_name(name):
            self._deeper_image = name

    def skip_dropping(self, name: str) -> bool:
        """Note a file or folder that is none of the data, once; whether it is such a one."""
        dropping = find_dropping(name)
        if dropping is not None and dropping not in self._droppings:
            self._droppings.add(dropping)
            self.skip(dropping, REASON)
        return dropping is not None

    def add_labelled(
        self,
        class_name: str,
        name: str,
        place: Place,
        *,
        key: str | None = None,
        shown_name: str | None = None,
    ) -> None:
        """Take an image whose class stands beside it, or note why not.

        Args:
            class_name: its class.
            name: name within the class; may hold folders.
            place: where it lies.
            key: its key; all members of a listing have one, or none.
            shown_name: what problems call it; None: its name.
        """
        shown_name = shown_name or name
        danger = find_danger(name) or find_fault_of_class(class_name)
        if danger is None and key is not None and not is_safe_key(key):
            danger = f"{show_name(key)!r} is not a safe key: printable, without '..' or a dot"
        if danger is None and key is not None and holds_credentials(key):
            danger = f"its key: {HOLDS_CREDENTIALS}"
        if danger is not None:
            self.refuse(shown_name, danger)
        elif reason := _find_fault_of_label(class_name) or _find_fault_of_size(place.size):
            self.skip(shown_name, reason)
        else:
            self._take(f"{class_name}/{name}", place)
            if key is not None:
                self._keys.append(key)

    def skip(self, name: str, reason: str) -> None:
        """Note a member that is not a usable image."""
        self._note(name, reason, "skipped")

    def refuse(self, name: str, reason: str) -> None:
        """Note a member of a dangerous name or kind."""
        self._note(name, reason, "refused")

    def build(
        self,
        kind: SourceKind,
        reader: ImageReader,
        *,
        is_shared_by_nodes: bool,
        classes: Sequence[str] | None = None,
        class_descriptions: Mapping[str, str] | None = None,
    ) -> SourceListing:
        """Finish the listing; of several members of one name the first counts.

        Raises:
            DataError: there is no image, or two members have one key.
        """
        if not self._names:
            raise DataError(f"{self.uri}: {self._describe_emptiness()}")
        if self._class_folders == {_IMAGES_FOLDER}:
            raise DataError(
                f"{self.uri}: all images lie in one folder, {_IMAGES_FOLDER!r}; expected a folder "
                f"per class: {_ADVICE_WITHOUT_FOLDERS}"
            )
        if self._keys:
            assert len(self._keys) == len(self._names), "only some members were given a key"
            _check_keys_are_unique(self.uri, self._keys, self._names)
        for name in sorted(self._class_folders - {class_of(name) for name in self._names}):
            self.skip(name, "a class folder without a usable image: no class")
        order = self._sort()
        numbers = np.frombuffer(self._numbers, np.int64).reshape(-1, 3)[order]
        checks = np.frombuffer(bytes(self._checks), np.uint8)
        chosen = order.tolist()
        return SourceListing(
            uri=self.uri,
            kind=kind,
            names=[self._names[row] for row in chosen],
            files=list(self._files),
            file_numbers=np.frombuffer(self._file_numbers, np.int32)[order],
            offsets=numbers[:, 0],
            sizes=numbers[:, 1],
            packed_sizes=numbers[:, 2],
            checks=checks.reshape(len(self._names), self._check_bytes)[order],
            problems=sort_problems(self._problems),
            reader=reader,
            is_shared_by_nodes=is_shared_by_nodes,
            keys=[self._keys[row] for row in chosen] if self._keys else None,
            classes=None if classes is None else list(classes),
            class_descriptions=dict(class_descriptions or {}),
        )

    def _take(self, name: str, place: Place) -> None:
        assert len(place.check) == self._check_bytes, "members of one listing are checked alike"
        self._names.append(name)
        number = -1 if place.file == name else self._files.setdefault(place.file, len(self._files))
        self._file_numbers.append(number)
        self._numbers.extend((place.offset, place.size, place.packed_size))
        self._checks += place.check

    def _note(self, name: str, reason: str, action: Literal["skipped", "refused"]) -> None:
        self._problems.append(SourceProblem(name=show_name(name), reason=reason, action=action))
        latest = f"{show_name(name)!r}: {reason}"
        check_problem_count(self.uri, len(self._problems), len(self._names), latest=latest)

    def _sort(self) -> np.ndarray:
        """Give the rows in the order of their names, without the later ones of a name."""
        names = self._names
        order = sorted(range(len(names)), key=names.__getitem__)  # stable: the first stays first
        repeated = {late for early, late in pairwise(order) if names[early] == names[late]}
        for row in sorted(repeated):
            self.refuse(names[row], "the name occurs twice; the first one is used")
        return np.array([row for row in order if row not in repeated], np.int64)

    def _describe_emptiness(self) -> str:
        expected = f"expected {self.expected}"
        if self.subfolder:
            expected += f" below {self.subfolder!r}"
        if not self._problems:
            return f"no files; {expected}"
        first = describe_kinds(self._problems)
        count = len(self._problems)
        text = f"no images; {expected}, found {count} other member{'s' * (count > 1)} ({first})"
        if self.expected != IN_CLASS_FOLDERS:
            return text
        if self._deeper_image is not None:
            inner = self._deeper_image.rsplit("/", 2)[0]
            if self.subfolder:
                inner = f"{self.subfolder}/{inner}"
            return f"{text}; the class folders lie deeper: name their folder with subfolder={inner}"
        if any(
            "/" not in problem.name and is_image_name(problem.name) for problem in self._problems
        ):
            return f"{text}; the images lie in no folder: {_ADVICE_WITHOUT_FOLDERS}"
        return text


class UnlabelledBuilder(ListingBuilder):
    """Collects images that have no classes, whatever folders they lie in."""

    expected = "images"
    lists_all_depths = True

    def take(self, name: str, place: Place) -> None:
        """Take an image of any name."""
        if is_image_name(name):
            self.add_labelled(THE_ONLY_CLASS, name, place)
        else:
            self.skip(name, NO_IMAGE_NAME)


class NewBuilder(Protocol):
    """Begins the listing of a folder or archive."""

    def __call__(
        self, uri: str, subfolder: str = "", *, check_bytes: Literal[0, 4, 16] = 0
    ) -> ListingBuilder:
        """Begin a listing; see `ListingBuilder`."""
        ...


def sort_problems(problems: Sequence[SourceProblem]) -> list[SourceProblem]:
    """Put problems in the order in which listings and indices hold them."""
    return sorted(problems, key=lambda problem: (problem.name, problem.reason))


def show_name(name: str) -> str:
    """Make any name fit for a message or an index, which a name of a megabyte is not."""
    shown = printable(redact(name[: 2 * _MAX_NAME_LENGTH])[:_MAX_NAME_LENGTH])
    return shown if len(name) <= _MAX_NAME_LENGTH else f"{shown}..."


def is_folder_of_images(folder: str) -> bool:
    """Whether a folder, `class/images`, stands for its class, as tiny-imagenet has it.

    `val/images` is none: there the images of all classes lie together.
    """
    class_name, _, rest = folder.partition("/")
    return rest == _IMAGES_FOLDER and not is_split(class_name)


def find_danger(name: str) -> str | None:
    """Say why a name must not be used at all; None if it is safe."""
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
        return "an absolute name"
    if ".." in name.split("/"):
        return "the name leaves the source's folder"
    if "\\" in name:
        return "a backslash in the name, where / separates folders"
    if not name or not name.isprintable():
        return "a name with a control character or a byte that is not UTF-8"
    if len(name) > _MAX_NAME_LENGTH:
        return f"a name of {len(name)} characters; at most {_MAX_NAME_LENGTH} are allowed"
    return HOLDS_CREDENTIALS if holds_credentials(name) else None


def _find_fault_of_label(class_name: str) -> str | None:
    return f"no label: {class_name!r}" if is_no_label(class_name) else None


def _find_fault_of_size(size: int) -> str | None:
    """Say why a member of this size cannot be an image; None if it may be one."""
    if size == 0:
        return "empty"
    if size > MAX_IMAGE_BYTES:
        return f"{size} bytes; an image may have {MAX_IMAGE_BYTES}"
    return None


def find_fault_of_class(name: str) -> str | None:
    """Say why a text cannot name a class; None if it may."""
    if not name or name in {".", ".."} or not name.isprintable() or re.search(r"[/\\]", name):
        return f"{show_name(name)!r} is not a class name: printable text without a slash"
    return f"its class: {HOLDS_CREDENTIALS}" if holds_credentials(name) else None


def _check_keys_are_unique(uri: str, keys: Sequence[str], names: Sequence[str]) -> None:
    if len(set(keys)) == len(keys):
        return
    seen: dict[str, str] = {}
    for key, name in zip(keys, names, strict=True):
        if key in seen:
            where = f"as {seen[key]!r} and as {name!r}" if name != seen[key] else f"as {name!r}"
            raise DataError(
                f"{uri}: the key {key!r} occurs twice, {where}; expected "
                "keys that are unique in the whole dataset: give keep_keys=false to make new ones"
            )
        seen[key] = name

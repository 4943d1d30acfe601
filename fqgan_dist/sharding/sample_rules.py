"""Which members of a tar are a sample's image and label, in shards of any maker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import field_validator

from fqgan_dist.config import Config
from fqgan_dist.data.index import DatasetIndex, parse_policy
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.config import NO_CLASSES
from fqgan_dist.sharding.file_names import IMAGE_SUFFIXES
from fqgan_dist.sharding.labels import class_from_value, is_no_label
from fqgan_dist.sharding.listing import show_name
from fqgan_dist.sharding.tar_scanning import TarMember, TarSample
from fqgan_dist.storage.documents import parse_json

_IMAGE_SUFFIXES = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_CLASS_KEYS = ("cls", "txt", NO_CLASSES)
_MAX_LABEL_BYTES = 2**20
_MAX_LABEL_CHARACTERS = 200
_SHOWN_CHARACTERS = 40
_SHOWN_MEMBERS = 10

INDEXED = "indexed"
"""`kind` in the image policy of datasets that were made by others and only indexed."""


class SampleRules(Config):
    """Where a sample's image and label are."""

    class_key: str = "cls"
    """Member of a sample that holds its class, a number or a name: `cls`, `txt`, or `json.FIELD`
    for a field of it; `none`: the images have no classes."""
    image_key: str | None = None
    """Ending of the image's name, as in `rgb.png`; none: the only member that ends in jpg, jpeg,
    png or webp."""

    @field_validator("class_key")
    @classmethod
    def _check_class_key(cls, value: str) -> str:
        if value not in _CLASS_KEYS and re.fullmatch(r"json\..+", value) is None:
            raise ValueError(f"{value!r}: expected cls, txt, json.FIELD or none")
        return value

    @property
    def labels(self) -> str:
        """Ending of the members that hold classes; `none`: there are none."""
        return self.class_key.partition(".")[0]

    @staticmethod
    def of_dataset(image_policy: Mapping[str, Any]) -> SampleRules:
        """Give the rules by which a dataset was indexed; the default ones if it was made by us.

        Raises:
            DataError: the policy holds what are no rules.
        """
        if image_policy.get("kind") != INDEXED:
            return SampleRules()
        return parse_policy(image_policy, SampleRules.model_fields, SampleRules)

    def describe(self) -> dict[str, Any]:
        """Give what an image policy tells about the rules."""
        return self.model_dump(exclude_none=True)

    def is_wanted(self, name: str) -> bool:
        """Whether a member of this name is read, for its image or its label."""
        return _suffix_of(name) in (*self._image_suffixes, self.labels)

    def is_label(self, name: str) -> bool:
        """Whether a member of this name holds labels."""
        return _suffix_of(name) == self.labels

    def find_image(self, sample: TarSample) -> TarMember:
        """Give the member that is a sample's image.

        Raises:
            DataError: there is none, or more than one.
        """
        images = sample.find(*self._image_suffixes)
        if len(images) == 1:
            return images[0]
        found = _describe_members(sample)
        if len(images) > 1:
            raise DataError(
                f"{len(images)} images of one kind: it has {found}; give each sample one, or a key "
                "of its own"
                if len({member.suffix for member in images}) == 1
                else f"{len(images)} images: it has {found}; name the one that is meant with "
                f"image_key={images[0].suffix}"
            )
        if self.image_key is None:
            self._look_behind_dots(sample, found)
        expected = " or ".join(f".{suffix}" for suffix in self._image_suffixes)
        raise DataError(f"no image: it has {found}; expected one {expected}")

    def _look_behind_dots(self, sample: TarSample, found: str) -> None:
        """Tell images whose names have several dots; `x.rgb.png` has the ending `rgb.png`.

        Raises:
            DataError: there are some.
        """
        ends = tuple(f".{suffix}" for suffix in _IMAGE_SUFFIXES)
        images = [member for member in sample.members if member.suffix.endswith(ends)]
        if any(member.suffix.endswith(f".{self.labels}") for member in sample.members):
            raise DataError(
                f"no image: it has {found}, as a sample's key ends at the first dot of the names; "
                "replace the dots in its key by another character"
            )
        if images:
            count = f"{len(images)} images" if len(images) > 1 else "an image of a longer ending"
            raise DataError(
                f"{count}: it has {found}; name the one that is meant with "
                f"image_key={images[0].suffix}"
            )

    def find_label(self, sample: TarSample) -> str:
        """Give the text of a sample's label; "" where there are no labels.

        Raises:
            DataError: the sample has none, or one that cannot be read.
        """
        if self.labels == NO_CLASSES:
            return ""
        members = sample.find(self.labels)
        if len(members) > 1:
            raise DataError(f"{len(members)} members .{self.labels}; expected one, with the label")
        if not members:
            others = {"txt": "txt", "json": "json.FIELD"}
            keys = [key for suffix, key in others.items() if sample.find(suffix)]
            remedies = " or ".join(f"class_key={key}" for key in [*keys, NO_CLASSES])
            raise DataError(
                f"no member .{self.labels} with its label: it has {_describe_members(sample)}; "
                f"say where the label is with {remedies}"
            )
        member = members[0]
        if member.data is None or member.size > _MAX_LABEL_BYTES:
            raise DataError(f".{self.labels}: {member.size} bytes are no label")
        try:
            text = member.data.decode()
            label = self._read_field(text) if self.labels == "json" else text.strip()
        except (ValueError, RecursionError) as error:
            raise DataError(f".{self.labels}: cannot be read: {error}") from error
        if is_no_label(label):
            raise DataError(f".{self.labels}: no label: {label!r}")
        if not label or not label.isprintable() or len(label) > _MAX_LABEL_CHARACTERS:
            raise DataError(
                f".{self.labels}: {label[:_SHOWN_CHARACTERS]!a} is no label; expected a "
                f"number or a name of at most {_MAX_LABEL_CHARACTERS} characters"
            )
        return label

    def _read_field(self, text: str) -> str:
        values, field = parse_json(text), self.class_key.partition(".")[2]
        label = class_from_value(values.get(field) if isinstance(values, dict) else None)
        if label is None:
            raise ValueError(f"field {field!r} holds no class: a number or a name")
        return label

    @property
    def _image_suffixes(self) -> tuple[str, ...]:
        return _IMAGE_SUFFIXES if self.image_key is None else (self.image_key.lower(),)


@dataclass(frozen=True)
class Labelling:
    """Numbers of label texts."""

    classes: list[str]
    """Class names."""
    kind: Literal["numbers", "names", "none"]
    """Whether the texts are the numbers themselves, or names of classes; none: all are of the first
    class."""

    @staticmethod
    def of_dataset(index: DatasetIndex, *, is_foreign: bool) -> Labelling:
        """Give the labelling of shards; those that were made by us hold numbers."""
        kind = index.image_policy.get("label_kind", "numbers") if is_foreign else "numbers"
        return Labelling(index.classes, kind)

    def number_of(self, text: str) -> int | None:
        """Give the label of a text; None if it is none."""
        if self.kind == "none":
            return 0
        if self.kind == "names":
            return self._numbers.get(text)
        number = parse_number(text)
        return number if number is not None and number < len(self.classes) else None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}


def _describe_members(sample: TarSample) -> str:
    shown = [f".{show_name(member.suffix)}" for member in sample.members[:_SHOWN_MEMBERS]]
    return ", ".join(shown + ["..."] * (len(sample.members) > _SHOWN_MEMBERS))


def _suffix_of(name: str) -> str:
    return TarMember(name, 0, 0, None, None).suffix


def parse_number(text: str) -> int | None:
    """Read a label that is a whole number of ordinary size; None if it is something else."""
    is_number = text.isascii() and text.isdigit() and len(text) <= 9  # int32
    return int(text) if is_number else None

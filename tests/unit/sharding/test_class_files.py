"""Files of classes: their order, and which labels stand for them, for every kind of source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.containers import CONTAINERS, Images
from support.source_files import png

from fqgan_dist.data.index import image_digest
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.class_files import read_class_map, read_classes
from fqgan_dist.sharding.labels import order_classes
from fqgan_dist.sharding.listing import class_of
from fqgan_dist.sharding.sources.opening import open_source


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "classes", "descriptions"),
    [
        ("polar bear\nant\tan ant\n", ["polar bear", "ant"], {"ant": "an ant"}),
        ("n01440764 tench, Tinca\n", ["n01440764"], {"n01440764": "tench, Tinca"}),
        ("\ufeffn01440764\r\nn01443537\r\n", ["n01440764", "n01443537"], {}),
    ],
)
def test_classes_have_readable_names(
    tmp_path: Path, text: str, classes: list[str], descriptions: dict[str, str]
) -> None:
    assert read_classes(_write(tmp_path / "c.txt", text)) == (classes, descriptions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 n02\n2 n01\n", {"1": "n02", "2": "n01"}),
        ("01,polar bear\n", {"1": "polar bear"}),
        ("n02\nn01\n", {"0": "n02", "1": "n01"}),
        ("n01440764 tench\nn01443537 goldfish\n", {"0": "n01440764", "1": "n01443537"}),
        ("tench, Tinca\tn01440764\n", {"tench, Tinca": "n01440764"}),
    ],
)
def test_a_map_gives_the_class_of_a_label(
    tmp_path: Path, text: str, expected: dict[str, str]
) -> None:
    assert read_class_map(_write(tmp_path / "m.txt", text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one class"),
        ("1 a\n1 b\n", "'1'.*every label once"),
        ("1 a\n2 a\n", "'a'.*every class once"),
        ("1 a/b\n", "not a class name"),
    ],
)
def test_a_wrong_map_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_class_map(_write(tmp_path / "m.txt", text))


@pytest.mark.parametrize("write", CONTAINERS.values(), ids=CONTAINERS)
def test_labels_of_every_container_become_classes(
    tmp_path: Path, write: Callable[[Path, Images], Path]
) -> None:
    source = write(tmp_path / "x", [("1", png(1)), ("2", png(2)), ("3", png(3))])
    class_map = _write(tmp_path / "map.txt", "1 c\n2 b\n3 a\n4 unused\n")
    with open_source(str(source), class_map=class_map) as listing:
        found = {
            class_of(name): image_digest(listing.read(row))
            for row, name in enumerate(listing.names)
        }
        assert listing.class_names() == ["a", "b", "c"]
        assert listing.names == sorted(listing.names)
    assert found == {
        "a": image_digest(png(3)),
        "b": image_digest(png(2)),
        "c": image_digest(png(1)),
    }


def test_a_label_that_the_map_lacks_is_an_error(tmp_path: Path) -> None:
    # A list that counts from 1 and a map from 0 would shift every image by one.
    source = CONTAINERS["folder"](tmp_path / "x", [("1", png(1)), ("2", png(2))])
    class_map = _write(tmp_path / "map.txt", "a\nb\n")
    with pytest.raises(DataError, match=r"1 labels are not among the 2 .*'0' to '1': \['2'\]"):
        open_source(str(source), class_map=class_map).__enter__()


def test_labels_of_thousands_of_digits_are_names(tmp_path: Path) -> None:
    digits = "9" * 5000
    text = f"0 cat\n{digits} dog\n000 {'x' * 9}\n".replace("000 ", "0001 ")
    expected = {"0": "cat", digits: "dog", "1": "xxxxxxxxx"}
    assert read_class_map(_write(tmp_path / "m.txt", text)) == expected
    assert order_classes({digits, "1"}) == sorted([digits, "1"])

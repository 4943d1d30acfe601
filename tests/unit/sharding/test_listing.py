from __future__ import annotations

import numpy as np
import pytest

from fqgan_dist.data.index import image_digest
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.labels import order_classes
from fqgan_dist.sharding.listing import ListingBuilder, Place, SourceListing
from fqgan_dist.sharding.sources.joining import join_listings


class MemoryReader:
    """Reads `file:offset`, so that a test sees what was asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, name: str, place: Place) -> bytes:
        return f"{self.name}:{place.file}:{place.offset}:{name}".encode()


def keyed(uri: str, rows: list[tuple[str, str]], *, classes: list[str] | None = None):
    builder = ListingBuilder(uri)
    for number, (class_name, key) in enumerate(rows, 1):
        builder.add_labelled(class_name, key, Place("s.tar", number, 1), key=key)
    builder.skip("odd", "not a shard")
    return builder.build("webdataset", MemoryReader(uri), is_shared_by_nodes=True, classes=classes)


def unkeyed(uri: str, names: list[str]) -> SourceListing:
    builder = ListingBuilder(uri)
    for name in names:
        builder.add(name, Place(name, 0, 1))
    return builder.build("folder", MemoryReader(uri), is_shared_by_nodes=False)


def test_members_are_sorted_whatever_their_order():
    first = unkeyed("x", ["b/1.png", "a/2.png", "a/10.png"])
    second = unkeyed("x", ["a/10.png", "b/1.png", "a/2.png"])
    assert first.names == second.names == ["a/10.png", "a/2.png", "b/1.png"]


def test_a_selection_keeps_every_column():
    builder = ListingBuilder("x", check_bytes=4)
    for number in range(3):
        place = Place(f"{number}.zip", number, number + 1, number, bytes([number] * 4))
        builder.add_labelled("c", f"{number}.png", place, key=f"k{number}")
    listing = builder.build("zip", MemoryReader("x"), is_shared_by_nodes=True)
    chosen = listing.select(np.array([0, 2]))
    assert chosen.keys == ["k0", "k2"]
    assert chosen.place(1) == Place("2.zip", 2, 3, 2, bytes([2] * 4))
    assert chosen.read(1) == b"x:2.zip:2:c/2.png"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"10", "2"}, [str(label) for label in range(11)]),
        ({"10", "2x"}, ["10", "2x"]),
        ({"010", "2"}, ["010", "2"]),
        ({"100000", "2"}, ["100000", "2"]),
    ],
)
def test_numbers_are_classes_in_the_order_of_numbers_only_if_all_are(
    names: set[str], expected: list[str]
) -> None:
    assert order_classes(names) == expected


def test_unsafe_keys_are_refused_by_name():
    builder = ListingBuilder("x")
    for key in ("good", "../evil", "/evil", "a.b", "a\\b"):
        builder.add_labelled(
            "c", "x.image" if key == "good" else f"{len(key)}", Place("f", 0, 1), key=key
        )
    listing = builder.build("webdataset", MemoryReader("x"), is_shared_by_nodes=True)
    assert listing.keys == ["good"]
    assert {problem.action for problem in listing.problems} == {"refused"}
    assert len(listing.problems) == 4


def test_joined_listings_read_from_their_own_sources():
    joined = join_listings([keyed("one", [("b", "k1"), ("a", "k2")]), keyed("two", [("a", "k3")])])
    assert joined.names == ["a/k2", "a/k3", "b/k1"]
    assert joined.keys == ["k2", "k3", "k1"]
    assert [joined.read(row) for row in range(3)] == [
        b"one:s.tar:2:a/k2",
        b"two:s.tar:1:a/k3",
        b"one:s.tar:1:b/k1",
    ]
    assert [problem.name for problem in joined.problems] == ["one: odd", "two: odd"]


def test_joined_folders_keep_their_files():
    joined = join_listings([unkeyed("one", ["a/1.png"]), unkeyed("two", ["a/2.png", "b/3.png"])])
    assert [joined.read(row) for row in range(3)] == [
        b"one:a/1.png:0:a/1.png",
        b"two:a/2.png:0:a/2.png",
        b"two:b/3.png:0:b/3.png",
    ]
    assert not joined.is_shared_by_nodes


def test_classes_are_united_in_the_order_of_the_sources():
    one = keyed("one", [("dog", "k1")], classes=["dog", "ape"])
    two = keyed("two", [("cat", "k2")], classes=["cat", "dog"])
    assert join_listings([one, two]).class_names() == ["dog", "ape", "cat"]


def test_sources_with_a_common_key_are_not_joined():
    with pytest.raises(DataError, match=r"1 keys occur in more than one source: \['k1'\]"):
        join_listings([keyed("one", [("a", "k1")]), keyed("two", [("b", "k1")])])


def test_sources_of_other_kinds_are_not_joined():
    with pytest.raises(ConfigError, match="cannot be joined"):
        join_listings([keyed("one", [("a", "k1")]), unkeyed("two", ["a/1.png"])])
    with pytest.raises(ConfigError, match="two or more"):
        join_listings([unkeyed("two", ["a/1.png"])])


def test_a_class_that_means_two_things_is_an_error():
    from dataclasses import replace

    one = replace(keyed("one", [("a", "k1")]), class_descriptions={"a": "ape"})
    two = replace(keyed("two", [("a", "k2")]), class_descriptions={"a": "ant"})
    with pytest.raises(DataError, match="'ape' in one source and 'ant'"):
        join_listings([one, two])


def test_digests_travel_with_places():
    builder = ListingBuilder("x", check_bytes=16)
    builder.add_labelled("c", "1", Place("f", 0, 1, 0, image_digest(b"x")), key="k")
    listing = builder.build("webdataset", MemoryReader("x"), is_shared_by_nodes=True)
    assert listing.place(0).check == image_digest(b"x")

"""Several listings as one, for merging datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from fqgan_dist.data.index import SourceProblem
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.listing import SourceListing, sort_problems
from fqgan_dist.sharding.sources.readers import JoinedReader

_SHOWN_NAMES = 3
_MIN_SOURCES = 2


def join_listings(listings: Sequence[SourceListing]) -> SourceListing:
    """Put the images of several sources into one listing.

    Classes are united by name: those of the first source, then the new ones of the next.

    Raises:
        ConfigError: fewer than two sources, or some give keys or checksums and others do not.
        DataError: two sources have an image of one name or key, or describe a class differently.
    """
    if len(listings) < _MIN_SOURCES:
        raise ConfigError(f"{len(listings)} source; expected two or more to be joined")
    uri = " + ".join(listing.uri for listing in listings)
    _check_alike(listings)
    names = [name for listing in listings for name in listing.names]
    order = sorted(range(len(names)), key=names.__getitem__)
    keys = _join_keys(listings)
    for what, values in (("names", names), ("keys", keys or [])):
        _check_unique(uri, what, values)
    files, numbers = _join_files(listings)
    rows = np.array(order, np.int64)
    return SourceListing(
        uri=uri,
        kind="joined",
        names=[names[row] for row in order],
        files=files,
        file_numbers=numbers[rows],
        offsets=np.concatenate([listing.offsets for listing in listings])[rows],
        sizes=np.concatenate([listing.sizes for listing in listings])[rows],
        packed_sizes=np.concatenate([listing.packed_sizes for listing in listings])[rows],
        checks=np.concatenate([listing.checks for listing in listings])[rows],
        problems=_join_problems(listings),
        reader=JoinedReader([listing.reader for listing in listings]),
        is_shared_by_nodes=all(listing.is_shared_by_nodes for listing in listings),
        keys=None if keys is None else [keys[row] for row in order],
        classes=_join_classes(listings),
        class_descriptions=_join_descriptions(uri, listings),
        other_splits=frozenset().union(*(listing.other_splits for listing in listings)),
    )


def _check_alike(listings: Sequence[SourceListing]) -> None:
    first = listings[0]
    for other in listings[1:]:
        has_keys = (first.keys is None) == (other.keys is None)
        if not has_keys or first.checks.shape[1] != other.checks.shape[1]:
            raise ConfigError(
                f"{first.uri} ({first.kind}) and {other.uri} ({other.kind}) cannot be joined: only "
                "one of them has keys or checksums; index or shard them first"
            )


def _join_keys(listings: Sequence[SourceListing]) -> list[str] | None:
    if listings[0].keys is None:
        return None
    return [key for listing in listings for key in listing.keys or []]


def _check_unique(uri: str, what: str, values: Sequence[str]) -> None:
    if len(set(values)) == len(values):
        return
    counts = Counter(values)
    repeated = sorted(value for value, count in counts.items() if count > 1)
    raise DataError(
        f"{uri}: {len(repeated)} {what} occur in more than one source: "
        f"{repeated[:_SHOWN_NAMES]!r}; expected sources without a common image: "
        "remove it from one, or rename one of the files"
    )


def _join_files(listings: Sequence[SourceListing]) -> tuple[list[str], np.ndarray]:
    """Give the files, each with the number of its source, and the position of each row's file."""
    files: list[str] = []
    numbers: list[np.ndarray] = []
    for source, listing in enumerate(listings):
        start = len(files)
        files += [f"{source}/{file}" for file in listing.files]
        positions = listing.file_numbers.astype(np.int32) + np.int32(start)
        own = np.flatnonzero(listing.file_numbers < 0)
        positions[own] = np.arange(len(files), len(files) + len(own), dtype=np.int32)
        files += [f"{source}/{listing.names[row]}" for row in own.tolist()]
        numbers.append(positions)
    return files, np.concatenate(numbers)


def _join_problems(listings: Sequence[SourceListing]) -> list[SourceProblem]:
    problems = [
        problem.model_copy(update={"name": f"{listing.uri}: {problem.name}"})
        for listing in listings
        for problem in listing.problems
    ]
    return sort_problems(problems)


def _join_classes(listings: Sequence[SourceListing]) -> list[str] | None:
    if all(listing.classes is None for listing in listings):
        return None
    names = [name for listing in listings for name in listing.class_names()]
    return list(dict.fromkeys(names))


def _join_descriptions(uri: str, listings: Sequence[SourceListing]) -> Mapping[str, str]:
    joined: dict[str, str] = {}
    for listing in listings:
        for name, text in listing.class_descriptions.items():
            if joined.setdefault(name, text) != text:
                raise DataError(
                    f"{uri}: class {name!r} is {joined[name]!r} in one source and {text!r} in "
                    "another; expected that a name means the same class: rename one of them"
                )
    return joined

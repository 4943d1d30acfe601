"""The one rule for damaged samples: another one stands in, unless too many in a row are damaged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

from fqgan_dist.errors import DataError

LoadedT = TypeVar("LoadedT")


def find_stand_in(
    damage: DataError,
    candidates: Iterable[tuple[int, int]],
    load: Callable[[int, int], LoadedT | DataError],
    *,
    max_damaged_in_a_row: int,
    shortage: str,
) -> LoadedT:
    """Load the first undamaged sample that may stand in for a damaged one.

    Args:
        damage: what is wrong with the sample.
        candidates: others, as shard and row, best first.
        load: loads one of them; a DataError, not raised, if it is damaged too.
        max_damaged_in_a_row: as many damaged ones one after another, the first included, are an
            error. 1: the first one is.
        shortage: why there may be fewer candidates than that, for the error.

    Raises:
        DataError: that many are damaged, or there is no other.
    """
    errors = [damage]
    for shard, row in itertools.islice(candidates, max_damaged_in_a_row - 1):
        found = load(shard, row)
        if not isinstance(found, DataError):
            return found
        errors.append(found)
    if max_damaged_in_a_row == 1:
        raise damage
    if len(errors) < max_damaged_in_a_row:
        remedy = shortage
    else:
        remedy = f"max_damaged_in_a_row is {max_damaged_in_a_row}"
    raise DataError(
        f"{len(errors)} damaged sample(s) in a row, and {remedy}; check the dataset with "
        f"`fqgan-data verify`: " + "; ".join(map(str, errors))
    ) from errors[-1]

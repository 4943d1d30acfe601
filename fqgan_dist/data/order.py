"""The order of samples: concatenated epoch permutations, as a pure function of the position.

Position n of the endless stream belongs to epoch n // num_samples. Each epoch permutes the shards,
then the samples inside each window of `window_shards` consecutive shards, so that only the shards
of one or two windows are read at a time. Nothing is dropped and nothing repeats within an epoch;
the whole state of the stream is the number of images seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fqgan_dist.randomness import Key, numpy_generator

_CACHED_EPOCHS = 4
_CACHED_WINDOWS = 4


@dataclass(frozen=True)
class SampleLocations:
    """Which samples stand at positions of the stream; three int64 arrays of one length."""

    epochs: np.ndarray
    """Epoch of each position, from 0."""
    shards: np.ndarray
    """Index of the shard in the dataset's index."""
    rows: np.ndarray
    """Row of the sample in its shard."""


class SampleOrder:
    """The order of one dataset's samples for one seed; safe to share between threads."""

    def __init__(
        self,
        shard_counts: Sequence[int],
        *,
        dataset_id: str,
        seed: int,
        window_shards: int,
    ) -> None:
        """Fix the order; nothing is computed yet.

        Args:
            shard_counts: samples in each shard, in the order of the dataset's index.
            dataset_id: sha256 of the dataset's index.
            seed: another seed gives another order.
            window_shards: shards whose samples are mixed with each other, >= 1.
        """
        if not shard_counts or min(shard_counts) < 1:
            raise ValueError(
                f"shard counts {list(shard_counts)[:8]!r}: expected one or more, each > 0"
            )
        if window_shards < 1:
            raise ValueError(f"window_shards {window_shards}: expected at least 1")
        self._counts = np.asarray(shard_counts, dtype=np.int64)
        self._ends = np.cumsum(self._counts)
        self._key: tuple[Key, ...] = (dataset_id, seed, window_shards)
        self.window_shards = window_shards
        # Bound here, not by a decorator: a cache on the class would keep every instance alive.
        self._epoch: Callable[[int], _Epoch] = lru_cache(_CACHED_EPOCHS)(self._permute_epoch)
        self._window: Callable[[int, int], np.ndarray] = lru_cache(_CACHED_WINDOWS)(
            self._permute_window
        )

    @property
    def num_samples(self) -> int:
        """Samples in the dataset, the length of an epoch."""
        return int(self._ends[-1])

    def walk(self, *key: Key) -> Iterator[tuple[int, int]]:
        """Visit every sample once, as shard and row, in a random order of the key's own.

        Samples are drawn as they are asked for: the first ones of millions cost nothing.

        Args:
            key: another key gives another walk.
        """
        # Raw words, as in `_permutation`.
        words = numpy_generator("sample_walk", *self._key, *key).bit_generator
        visited: set[int] = set()
        while len(visited) < self.num_samples:
            # The remainder favours small numbers by less than 1 in 10^12 at 12 million samples.
            sample = int(words.random_raw()) % self.num_samples
            if sample not in visited:
                visited.add(sample)
                shard = int(np.searchsorted(self._ends, sample, side="right"))
                yield shard, int(sample - (self._ends[shard] - self._counts[shard]))

    def upcoming_shards(self, position: int) -> list[int]:
        """Give the shards of the window after a position's, in the order of the epoch."""
        epoch, offset = divmod(position, self.num_samples)
        layout = self._epoch(epoch)
        window = int(np.searchsorted(layout.window_ends, offset, side="right")) + 1
        if window == len(layout.window_ends):
            layout, window = self._epoch(epoch + 1), 0
        first = window * self.window_shards
        return layout.shards[first : first + self.window_shards].tolist()

    def locate(self, positions: Sequence[int] | range | np.ndarray) -> SampleLocations:
        """Find the samples of positions.

        Args:
            positions: numbers >= 0, in any order; consecutive ones are cheapest.

        Raises:
            ValueError: a position is negative.
        """
        numbers = np.asarray(positions, dtype=np.int64)
        if numbers.size and numbers.min() < 0:
            raise ValueError(f"position {numbers.min()}: expected positions from 0")
        epochs, offsets = np.divmod(numbers, self.num_samples)
        shards, rows = np.empty_like(numbers), np.empty_like(numbers)
        for epoch in np.unique(epochs):
            layout = self._epoch(int(epoch))
            windows = np.searchsorted(layout.window_ends, offsets, side="right")
            for window in np.unique(windows[epochs == epoch]):
                chosen = np.flatnonzero((epochs == epoch) & (windows == window))
                found = self._locate_in_window(layout, int(epoch), int(window), offsets[chosen])
                shards[chosen], rows[chosen] = found
        return SampleLocations(epochs, shards, rows)

    def _locate_in_window(
        self, layout: _Epoch, epoch: int, window: int, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        first = window * self.window_shards
        ends = layout.shard_ends[first : first + self.window_shards]
        start = int(layout.window_ends[window - 1]) if window else 0
        shuffled = start + self._window(epoch, window)[offsets - start]
        nth = np.searchsorted(ends, shuffled, side="right")
        shards = layout.shards[first + nth]
        return shards, shuffled - (ends[nth] - self._counts[shards])

    def _permute_epoch(self, epoch: int) -> _Epoch:
        shards = _permutation(len(self._counts), "shard_order", *self._key, epoch)
        shard_ends = np.cumsum(self._counts[shards])
        last = np.arange(self.window_shards, len(shards) + self.window_shards, self.window_shards)
        return _Epoch(shards, shard_ends, shard_ends[np.minimum(last, len(shards)) - 1])

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        ends = self._epoch(epoch).window_ends
        length = int(ends[window] - (ends[window - 1] if window else 0))
        return _permutation(length, "sample_order", *self._key, epoch, window)


@dataclass(frozen=True)
class _Epoch:
    """The permuted shards of an epoch, and the offsets where shards and windows end."""

    shards: np.ndarray
    shard_ends: np.ndarray
    window_ends: np.ndarray


def _permutation(length: int, *key: Key) -> np.ndarray:
    # Philox's raw words are fixed by its definition; what NumPy's Generator makes of them may
    # change between versions, and an order must outlive an upgrade.
    words = numpy_generator(*key).bit_generator.random_raw(length)
    return np.argsort(words, kind="stable")

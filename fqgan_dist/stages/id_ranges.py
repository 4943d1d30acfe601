"""Work whose chunks are ranges of ids of one size, the last one smaller."""

from __future__ import annotations

from collections.abc import Sequence

from fqgan_dist.stages.images import chunk_range, count_chunks
from fqgan_dist.stages.stage import RunWork


class IdRanges(RunWork):
    """The chunks of such work; base of those that implement `fqgan_dist.chunks.ChunkWork`."""

    def __init__(self, count: int, chunk_size: int) -> None:
        """Split the ids [0, count) into ranges of `chunk_size`."""
        self.count = count
        self.chunk_size = chunk_size

    def chunks(self) -> Sequence[int]:
        """All ranges of ids."""
        return range(count_chunks(self.count, self.chunk_size))

    def size(self, chunk: int) -> int:
        """Ids in the range."""
        return len(self.ids(chunk))

    def ids(self, chunk: int) -> range:
        """Return the ids of a chunk."""
        return chunk_range(chunk, self.chunk_size, self.count)

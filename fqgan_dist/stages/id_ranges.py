"""Work whose chunks are ranges of ids of one size, the last one smaller."""

from __future__ import annotations

from collections.abc import Sequence

from fqgan_dist.stages.images import chunk_range, count_chunks
from fqgan_dist.stages.stage import RunWork


class IdRanges(RunWork):
    """Ids [0, count) in chunks of `chunk_size`; base of such `fqgan_dist.chunks.ChunkWork`."""

    def __init__(self, count: int, chunk_size: int) -> None:
        self.count = count
        self.chunk_size = chunk_size

    def chunks(self) -> Sequence[int]:
        return range(count_chunks(self.count, self.chunk_size))

    def size(self, chunk: int) -> int:
        return len(self.ids(chunk))

    def ids(self, chunk: int) -> range:
        return chunk_range(chunk, self.chunk_size, self.count)

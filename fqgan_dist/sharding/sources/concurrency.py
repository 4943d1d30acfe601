"""Read several files of a source at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fqgan_dist.chunks import ReportProgress
from fqgan_dist.storage.storage import Storage

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_CONCURRENT_READS = 8


def map_in_order(
    storage: Storage,
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    description: str,
    progress: ReportProgress,
) -> Iterator[ResultT]:
    """Yield the results for items in their order, while some of the next ones are worked on.

    Args:
        storage: where the function reads.
        function: reads something; called in threads.
        items: its arguments.
        description: of the work, for `progress`.
        progress: told about items.
    """
    # Where a server answers, several wait at once; a local disk gains nothing from it.
    workers = 1 if storage.is_local else _CONCURRENT_READS
    executor = ThreadPoolExecutor(workers)
    due: deque[Future[ResultT]] = deque()
    try:
        for started, item in enumerate(items):
            due.append(executor.submit(function, item))
            # Bounded, so that results do not gather where their taker is slow.
            if len(due) > 2 * workers:
                yield due.popleft().result()
                progress(description, started + 1 - len(due), len(items))
        while due:
            yield due.popleft().result()
            progress(description, len(items) - len(due), len(items))
    finally:
        executor.shutdown(cancel_futures=True)

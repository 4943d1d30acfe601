"""Read several files of a source at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.progress import ProgressBar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_CONCURRENT_READS = 8


def map_in_order(
    storage: Storage,
    function: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    bar: ProgressBar,
) -> Iterator[ResultT]:
    """Yield the results for items in their order, while some of the next ones are worked on.

    Args:
        storage: where the function reads.
        function: reads something; called in threads.
        items: its arguments.
        bar: counts the items whose results were taken.
    """
    # Where a server answers, several wait at once; a local disk gains nothing from it.
    workers = 1 if storage.is_local else _CONCURRENT_READS
    executor = ThreadPoolExecutor(workers)
    due: deque[Future[ResultT]] = deque()
    try:
        for item in items:
            due.append(executor.submit(function, item))
            # Bounded, so that results do not gather where their taker is slow.
            if len(due) > 2 * workers:
                yield due.popleft().result()
                bar.advance()
        while due:
            yield due.popleft().result()
            bar.advance()
    finally:
        executor.shutdown(cancel_futures=True)

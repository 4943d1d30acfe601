"""Tasks of an event loop that end together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def gather(work: Sequence[Awaitable[T]]) -> list[T]:
    """Wait for all; when one fails, the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel(tasks)


async def cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended, in whatever way."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_first(head: asyncio.Task[None], answered: asyncio.Event) -> None:
    """Wait until the answer has begun; raise what came instead of one."""
    waiting = asyncio.create_task(answered.wait())
    try:
        await asyncio.wait((head, waiting), return_when=asyncio.FIRST_COMPLETED)
        if head.done():
            head.result()
    except BaseException:
        head.cancel()
        raise
    finally:
        waiting.cancel()

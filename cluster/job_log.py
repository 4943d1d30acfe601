"""A job's log on the standard output, each character once, over any number of connections."""

from __future__ import annotations

import asyncio
import logging
import sys

import aiohttp

from cluster.ray_jobs import RayJobs
from fqgan_dist.errors import ClusterError
from fqgan_dist.terminal import keep_lines

logger = logging.getLogger(__name__)

# After so long without a word a log is connected anew: a dead tunnel does not say that it is.
SILENCE_S = 600.0


class LogCopier:
    """Copies a job's log while the job runs."""

    def __init__(self, jobs: RayJobs, job_id: str, silence_s: float = SILENCE_S) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._silence_s = silence_s
        self._num_shown = 0
        self._runner = asyncio.Runner()
        self._task: asyncio.Task[None] | None = None

    def copy(self, seconds: float) -> None:
        """Copy what comes in some seconds; connect, or again where the stream was cut."""
        self._runner.run(self._copy(seconds))

    async def _copy(self, seconds: float) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())
        await asyncio.sleep(seconds)

    async def _follow(self) -> None:
        start = 0
        try:
            async with asyncio.timeout(self._silence_s) as limit:
                async for piece in self._jobs.follow_log(self._job_id):
                    limit.reschedule(asyncio.get_running_loop().time() + self._silence_s)
                    self._show(piece, start)
                    start += len(piece)
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            # The job's status says what is wrong; if it still runs, `copy` connects again.
            logger.debug("the log of %s broke off (%s)", self._job_id, error)

    def disconnect(self) -> None:
        """Leave a connection that may hang for ever; the next `copy` makes another."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def finish(self) -> None:
        """Copy the rest of the log of a job that has ended."""
        self.disconnect()
        try:
            self._show(self._jobs.read_log(self._job_id), start=0)
        except ClusterError as error:
            logger.warning("the end of the log of %s cannot be read (%s)", self._job_id, error)

    def close(self) -> None:
        self.disconnect()
        self._runner.close()

    def _show(self, text: str, start: int) -> None:
        """Write what is new in a piece of the log that begins at this character."""
        sys.stdout.write(keep_lines(text[max(0, self._num_shown - start) :]))
        sys.stdout.flush()
        self._num_shown = max(self._num_shown, start + len(text))

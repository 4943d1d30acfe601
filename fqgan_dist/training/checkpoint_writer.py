"""One background thread that writes checkpoints while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Run jobs one at a time; a job's error comes out of every later call, so none is lost.

    Close it before the interpreter exits: from then on Python starts no threads for a running job.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._running: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the job before, raise its error, and start this one."""
        self.wait()
        self._running = self._executor.submit(job)

    def raise_pending(self) -> None:
        """Raise the error of a job that has ended; never waits."""
        if self._running is not None and self._running.done():
            self._running.result()

    def wait(self) -> None:
        """Wait until the running job has ended, and raise its error."""
        if self._running is not None:
            self._running.result()

    def close(self) -> None:
        """Wait, raise as `wait` does, and end the thread."""
        self._executor.shutdown(wait=True)
        self.wait()

"""How fast a training is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class TrainingClock:
    """Throughput and loader stall since the last record."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._last_step: int | None = None
        self._waited_s = 0.0
        self._aside_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a block as time in which the loader kept training waiting."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave a block (evaluation, saving) out of the throughput."""
        start = time.perf_counter()
        yield
        self._aside_s += time.perf_counter() - start

    def measure(self, step: int, global_batch_size: int) -> tuple[float, dict[str, float]]:
        """Return the seconds since the last call and the rates in them, and start anew."""
        now = time.perf_counter()
        elapsed_s = now - self._since - self._aside_s
        rates = {"train/loader_wait_fraction": self._waited_s / elapsed_s}
        if self._last_step is not None:
            rates["train/images_per_s"] = (step - self._last_step) * global_batch_size / elapsed_s
        self._since, self._last_step = now, step
        self._waited_s = self._aside_s = 0.0
        return elapsed_s, rates

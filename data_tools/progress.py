"""Shows what a library function reports through a `ReportProgress` callback."""

from __future__ import annotations

from contextlib import ExitStack

from fqgan_dist.telemetry.progress import ProgressBar, track

_UNITS = {
    "listing": "files",
    "looking for files": "files",
    "reading rows": "rows",
    "scanning": "bytes",
    "unpacking": "bytes",
    "indexing": "MiB",
    "verifying": "MiB",
    "reading shards": "shards",
    "reading tables": "shards",
}
_DEFAULT_UNIT = "images"


class ProgressDisplay(ExitStack):
    """A `ReportProgress`: one bar after the other, on standard error; used as a context."""

    def __init__(self) -> None:
        super().__init__()
        self._description = ""
        self._done = 0
        self._bar: ProgressBar | None = None

    def __call__(self, description: str, done: int, total: int) -> None:
        """Show that `done` of `total` units are done."""
        if self._bar is None or description != self._description:
            self.close()
            unit = _UNITS.get(description, _DEFAULT_UNIT)
            self._bar = self.enter_context(track(total or None, description, unit))
            self._description, self._done = description, done
            self._bar.skip(done)  # done before: no throughput
            return
        self._bar.advance(done - self._done)
        self._done = done

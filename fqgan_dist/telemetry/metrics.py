"""Write and read `metrics.jsonl`: one JSON object per line.

A resumed run continues the file as if it had never been killed (`json_lines.py`).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import Record, parse_records
from fqgan_dist.telemetry.sessions import Session, SessionRecords

__all__ = ["MetricsFile", "Record", "metric_series", "parse_metrics"]

# What a record holds besides its metrics: `time` is in Unix seconds.
RESERVED_NAMES = ("step", "images_seen", "time")

_KIND = "metrics"

_METRIC_NAME = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)+")


class MetricsFile:
    """The metrics of one stage; a `MetricSink` (metric_sink.py), the one that is always there."""

    def __init__(
        self, storage: Storage, path: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._records = SessionRecords(storage, path)
        self._clock = clock

    def open(self, session: Session) -> None:
        self._records.open(session)

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        """Append one record; values that are not finite are stored as null, as JSON has none.

        Raises:
            ValueError: the step goes back, or a name is reserved or not of the form above.
        """
        for name in numbers:
            _check_name(name)
        values = {name: float(value) for name, value in numbers.items()}
        record: Record = {"step": step, "images_seen": images_seen, "time": self._clock()}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._records.write(record)

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def parse_metrics(data: bytes, *, name: str) -> list[Record]:
    """Parse the bytes of a metrics file called `name`, wherever they were stored.

    Raises:
        DataError: a complete line is not a record.
    """
    return parse_records(data, name=name, kind=_KIND)


def metric_series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Collect one metric's steps and values; records without a finite value of it are left out."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _check_name(name: str) -> None:
    if name in RESERVED_NAMES or not _METRIC_NAME.fullmatch(name):
        raise ValueError(
            f"metric name {name!r}: expected <stage>/<group>/<name> of letters, digits, '_', '-', "
            "'.', for example 'tokenizer/loss/commitment'"
        )

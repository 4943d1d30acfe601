"""Write and read `metrics.jsonl`: one JSON object per line.

A resumed run continues the file as if it had never been killed (`json_lines.py`). TensorBoard is an
optional second sink.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fqgan_dist.telemetry.json_lines import (
    JsonLinesWriter,
    Record,
    parse_records,
    read_records,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

__all__ = ["MetricsWriter", "Record", "metric_series", "parse_metrics", "read_metrics"]

RESERVED_NAMES = ("step", "images_seen", "time")
"""What a record holds besides its metrics: `time` is in Unix seconds."""

_KIND = "metrics"

_METRIC_NAME = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)+")


class MetricsWriter:
    """Append metrics of one stage to a local file; one process per file.

    Uploading the file (`path`) to object storage, after `flush`, is the caller's.
    """

    def __init__(
        self,
        path: Path,
        *,
        resumed_step: int = 0,
        tensorboard: bool = False,
        on_write: Callable[[int, Mapping[str, float]], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the file and drop what a killed run logged after `resumed_step`.

        Args:
            path: the `metrics.jsonl`; its directory is made when missing.
            resumed_step: last step that is part of this run's history; 0 starts anew.
            tensorboard: also write event files to `tensorboard/` beside the file.
            on_write: is also given step and values of every record.
            clock: source of Unix seconds.
        """
        self.path = path
        self._clock = clock
        self._on_write = on_write
        self._records = JsonLinesWriter(path, resumed_step=resumed_step)
        path.touch()  # a run has the file from its first moment
        self._tensorboard = _open_tensorboard(path.parent, resumed_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, float], *, images_seen: int) -> None:
        """Append one record, in one write, so that a kill tears at most the last line.

        JSON has no NaN or infinity: values that are not finite are stored as null.

        Args:
            step: steps may repeat (training and validation) but not decrease.
            metrics: `<stage>/<group>/<name>` -> value.
            images_seen: training images consumed up to this step.

        Raises:
            ValueError: the step goes back, or a name is reserved or not of the form above.
        """
        for name in metrics:
            _check_name(name)
        values = {name: float(value) for name, value in metrics.items()}
        record: Record = {"step": step, "images_seen": images_seen, "time": self._clock()}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._records.write(record)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step, walltime=record["time"])
        if self._on_write is not None:
            self._on_write(step, values)

    def flush(self) -> None:
        """Bring everything written so far to the disk."""
        self._records.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close; closing twice is harmless."""
        self._records.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """Read all records in file order; a last line torn by a kill is left out.

    Raises:
        DataError: the file is missing, or a line is not a record.
    """
    return read_records(path, kind=_KIND)


def parse_metrics(data: bytes, *, name: str) -> list[Record]:
    """Parse the bytes of a metrics file, wherever they were stored.

    Args:
        data: content of a `metrics.jsonl`.
        name: what to call it in errors.

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


def _open_tensorboard(directory: Path, resumed_step: int) -> SummaryWriter:
    # Imported here: only runs that ask for TensorBoard pay for it.
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)

"""Files of records on the local disk, read whole."""

from __future__ import annotations

from pathlib import Path

from fqgan_dist.telemetry.json_lines import Record, parse_records

_TIMES = {
    "time",
    "train/loader_wait_fraction",
    "train/images_per_s",
    "train/read_bytes_per_s",
    "train/cache_hit_fraction",
}


def read_records(path: Path) -> list[Record]:
    return parse_records(path.read_bytes(), name=path.stem, kind=path.stem)


def is_time(name: str) -> bool:
    """Whether a metric differs between equal runs: a time, or of each start or recovery."""
    return name in _TIMES or name.startswith(("train/recovery_", "train/num_workers"))

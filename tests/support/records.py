"""Files of records on the local disk, read whole."""

from __future__ import annotations

from pathlib import Path

from fqgan_dist.telemetry.json_lines import Record, parse_records


def read_records(path: Path) -> list[Record]:
    return parse_records(path.read_bytes(), name=path.stem, kind=path.stem)

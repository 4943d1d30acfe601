"""The summary of a run, collected from its stages' records."""

from __future__ import annotations

from typing import Any

from fqgan_dist.stages.manifest import load_record
from fqgan_dist.stages.names import STAGE_NAMES
from fqgan_dist.storage.storage import Storage

Summary = dict[str, dict[str, Any]]
"""Stage -> {state, seconds, metrics}, the content of `summary.json`."""


def load_summary(storage: Storage) -> Summary:
    """Collect the summary.

    A stage may report on another (`<stage>/<metric>`): evaluation's results stand under the stage
    that they judge.
    """
    records = [record for name in STAGE_NAMES if (record := load_record(storage, name))]
    summary: Summary = {
        record.stage: {"state": record.state, "seconds": record.seconds, "metrics": {}}
        for record in records
    }
    for record in records:
        for name, value in record.metrics.items():
            stage, _, metric = name.partition("/")
            if stage in summary:
                summary[stage]["metrics"][metric] = value
    return summary

"""What a run's own records say of it: useful time, recoveries, and whether two runs are equal."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fqgan_dist.config import load_config
from fqgan_dist.stages.checkpoints import run_checkpoint_action
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.config import CheckpointTarget

Recorded = Sequence[Mapping[str, Any]]
"""Records of the metrics of one attempt at a training, in their order; every step is recorded."""

STAGES = ("tokenizer", "autoregressive")
_RECOVERY = "train/recovery_"
_TIMES = {
    "time",
    "train/loader_wait_fraction",
    "train/images_per_s",
    "train/read_bytes_per_s",
    "train/cache_hit_fraction",
    "train/storage_retries",
    "train/storage_wait_s",
}


_BACK = re.compile(r"(\w+): back at step (\d+) after [\d.]+ s \(([^)]*)\)")
_PART = re.compile(r"([a-z][a-z ]*?) ([\d.]+) s")


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """One recovery of a training."""

    stage: str
    step: int
    """The first step that was done."""
    parts: dict[str, float]
    """Seconds by name, those that were known."""

    @property
    def whole_s(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """How much of the time was useful."""

    step_s: dict[str, float]
    """Median seconds of a step, by stage."""
    useful_s: float
    """Steps that count, times that."""
    wall_s: float
    num_repeated: int
    """Steps that were recorded more than once; of a killed attempt only what was published."""

    @property
    def fraction(self) -> float:
        return self.useful_s / self.wall_s


def find_goodput(
    sessions: Mapping[str, Sequence[Recorded]], steps: Mapping[str, int], *, wall_s: float
) -> Goodput:
    """Give the goodput of a run.

    Args:
        sessions: records of every attempt, by stage.
        steps: that count, by stage.
        wall_s: from the first command to the end.
    """
    step_s: dict[str, float] = {}
    useful_s = 0.0
    num_repeated = 0
    for stage, attempts in sessions.items():
        times = [_times_of_steps(attempt) for attempt in attempts]
        pauses = [
            later - earlier
            for each in times
            for (step, earlier), (following, later) in pairwise(each.items())
            if following == step + 1
        ]
        step_s[stage] = statistics.median(pauses)
        useful_s += steps[stage] * step_s[stage]
        done = [step for each in times for step in each]
        num_repeated += len(done) - len(set(done))
    return Goodput(step_s=step_s, useful_s=useful_s, wall_s=wall_s, num_repeated=num_repeated)


def _times_of_steps(attempt: Recorded) -> dict[int, float]:
    # Of a step that is evaluated the first record is of its training.
    times: dict[int, float] = {}
    for record in attempt:
        times.setdefault(record["step"], record["time"])
    return times


def find_recoveries(log: str) -> list[Recovered]:
    """List the recoveries that the log of a run's drivers tells of."""
    found: list[Recovered] = []
    for match in _BACK.finditer(log):
        parts = {name.replace(" ", "_"): float(value) for name, value in _PART.findall(match[3])}
        found.append(Recovered(stage=match[1], step=int(match[2]), parts=parts))
    return found


def find_training(root: str) -> str:
    """Name the stage that trains now; "": none does."""
    storage = Storage(root)
    for stage in STAGES:
        if storage.list(f"{stage}/checkpoints") and not storage.exists(f"manifests/{stage}.json"):
            return stage
    return ""


def read_sessions(root: str) -> dict[str, list[Recorded]]:
    """Read what every attempt at the trainings of a run recorded, also those that were cut off."""
    storage = Storage(root)
    sessions: dict[str, list[Recorded]] = {}
    for stage in STAGES:
        names = sorted(storage.list(f"{stage}/sessions"))
        texts = [_read(storage, f"{stage}/sessions/{name}/metrics.jsonl") for name in names]
        sessions[stage] = [_parse(text) for text in texts if text]
    return sessions


def compare(root: str, calm: str, config: str) -> dict[str, bool]:
    """Say what of two runs is equal to the bit, and whether the ledger of the first is exact."""
    storage, other = Storage(root), Storage(calm)
    same: dict[str, bool] = {}
    for stage in STAGES:
        for name, read in {"weights": _read_weights, "metrics": _read_metrics}.items():
            same[f"{stage}: {name}"] = read(storage, stage) == read(other, stage)
        run = load_config(config, [f"storage.root={root}"], RunConfig)
        result = run_checkpoint_action("verify", run, stage, CheckpointTarget(ledger=True))
        same[f"{stage}: ledger"] = not result.is_damaged
    return same


def _read_weights(storage: Storage, stage: str) -> Any:
    return json.loads(storage.read_bytes(f"manifests/{stage}.json"))["outputs"]


def _read_metrics(storage: Storage, stage: str) -> list[dict[str, Any]]:
    records = _parse(storage.read_bytes(f"{stage}/metrics.jsonl"))
    return [
        {
            name: value
            for name, value in record.items()
            if name not in _TIMES and not name.startswith((_RECOVERY, "train/num_workers"))
        }
        for record in records
    ]


def _read(storage: Storage, path: str) -> bytes:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return b""


def _parse(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]

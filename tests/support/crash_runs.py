"""A whole run in small, of every kind of file that a run writes, to be ended anywhere.

Its task is a walk that depends on all that it has seen: a step that is left out or done twice shows
in every later number.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from fqgan_dist.config import Config
from fqgan_dist.data.batches import LoadReport, Replacement
from fqgan_dist.data.consumption import Consumed, OrderId, consume
from fqgan_dist.stages.stage_record import StageRecord, load_record, save_record
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.sweeping import sweep_leftovers, sweep_root
from fqgan_dist.telemetry.json_lines import Record, parse_records
from fqgan_dist.telemetry.metric_sink import TrackedRun
from fqgan_dist.telemetry.metrics import MetricsFile
from fqgan_dist.telemetry.optional_sinks import build_sinks
from fqgan_dist.telemetry.sessions import SessionRecords
from fqgan_dist.training.anomalies import Evidence
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs
from fqgan_dist.training.config import (
    CheckpointConfig,
    RetentionPolicy,
    ScheduleConfig,
    TrainingConfig,
)
from fqgan_dist.training.hooks import AccountForLoading, WriteMetrics
from fqgan_dist.training.task import Parts
from fqgan_dist.training.trainer import Trainer
from fqgan_dist.world import World

STAGE = "toy"
STEPS = 5
_ORDER = OrderId(dataset_id="d" * 64, num_samples=4, seed=0, window_shards=1)
_LOSS = "toy/loss/total"
_RECORD = "manifests/toy.json"
_CONFIG = TrainingConfig(
    steps=STEPS,
    global_batch_size=2,
    micro_batch_size=2,
    schedule=ScheduleConfig(lr=0.1),
    log_every=1,
    evaluate_every=2,
    evaluation_samples=1,
    checkpoint=CheckpointConfig(every=2),
)


class _Architecture(Config):
    width: int = 3


class _Walk:
    """Adds each batch to what it has, which is halved."""

    architecture = _Architecture()

    def __init__(self) -> None:
        self.weight = torch.zeros(3, dtype=torch.float64)

    def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        self.weight = self.weight / 2 + micro_batches[0] * step
        return {_LOSS: self.weight.sum()}

    def take_evidence(self) -> Sequence[Evidence]:
        return []

    def needed_state(self) -> Mapping[str, Needs]:
        return {"toy": {"weight": None}, "toy_optimizer": {"moment": None}}

    def evaluate(self, step: int) -> dict[str, float]:
        return {"toy/validation/norm": float(self.weight.norm()) + step}

    def state_dict(self) -> Parts:
        return {"toy": {"weight": self.weight}, "toy_optimizer": {"moment": self.weight + 1}}

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
        weight, moment = parts["toy"]["weight"], parts["toy_optimizer"]["moment"]
        assert isinstance(weight, Tensor)
        assert isinstance(moment, Tensor)
        assert torch.equal(weight + 1, moment)
        self.weight = weight.clone()


@dataclass(frozen=True)
class RunState:
    """What a finished run comes to, without what may differ: times, and names of attempts."""

    weight: list[float]
    metrics: list[Record]
    ledger: list[Record]
    tensorboard: list[tuple[int, float]]
    record: dict[str, Any]
    summary: dict[str, Any]
    files: set[str]


def run_session(storage: Storage) -> None:
    """Train to the end, from wherever former sessions came to, and write all records."""
    sweep_leftovers(functools.partial(sweep_root, storage))
    record = load_record(storage, _RECORD)
    if record is not None and record.is_done:
        return
    if record is None:
        save_record(storage, _RECORD, StageRecord(stage=STAGE, state="started", inputs={"x": 1}))
    result = _train(storage)
    done = StageRecord(stage=STAGE, state="done", inputs={"x": 1}, metrics=result)
    # The summary first, as it is the record that says that all is there.
    storage.write_bytes("summary.json", json.dumps({STAGE: result}).encode())
    save_record(storage, _RECORD, done)


def _train(storage: Storage) -> dict[str, float]:
    loaded: list[int] = []

    def batches(first_step: int) -> Generator[list[Tensor], None, None]:
        for step in range(first_step + 1, STEPS + 1):
            loaded.append(step)
            yield [torch.arange(3, dtype=torch.float64) + step]

    def take_report() -> LoadReport:
        consumed = tuple(_consume(step) for step in loaded)
        steps = [step for step in loaded if step in (1, 3, 4)]
        loaded.clear()
        return LoadReport(
            consumed=consumed,
            replacements=tuple(
                Replacement(
                    position=2 * step - 1,
                    shard="s",
                    key=f"k{step}",
                    replacement_key="r",
                    reason="torn",
                )
                for step in steps
            ),
        )

    ledger = SessionRecords(storage, f"{STAGE}/damaged_samples.jsonl")
    sinks = build_sinks(("tensorboard",), TrackedRun(storage=storage, stage=STAGE, name="run"))
    trainer = Trainer(
        _Walk(),
        batches,
        _CONFIG,
        store=open_store(storage),
        dataset_id="d" * 64,
        world=World(),
        hooks=[
            AccountForLoading(
                take_report, ledger, order=_ORDER, world=World(), global_batch_size=2
            ),
            WriteMetrics([MetricsFile(storage, f"{STAGE}/metrics.jsonl"), *sinks]),
        ],
    )
    return trainer.fit().metrics


def _consume(step: int) -> Consumed:
    samples = np.array([[0, 2 * step - 2], [0, 2 * step - 1]])
    return consume(2 * step - 2, samples, samples)


def open_store(storage: Storage) -> CheckpointStore:
    """Open the run's checkpoints, of which it keeps the newest two."""
    return CheckpointStore(storage, f"{STAGE}/checkpoints", retention=RetentionPolicy(keep_last=2))


def read_state(storage: Storage, scratch: Path) -> RunState:
    """Read a finished run back; event files of a bucket are copied to a new scratch folder."""
    loaded = open_store(storage).load_latest()
    assert loaded is not None
    assert loaded.step == STEPS
    assert open_store(storage).verify() == []
    record = load_record(storage, _RECORD)
    assert record is not None
    return RunState(
        weight=loaded.read("toy")["weight"].tolist(),
        metrics=_read_lines(storage, "metrics"),
        ledger=_read_lines(storage, "damaged_samples"),
        tensorboard=_read_events(storage, scratch),
        record=record.model_dump(),
        summary=json.loads(storage.read_bytes("summary.json")),
        files={_normal_name(name) for name, _ in storage.walk()},
    )


def _read_lines(storage: Storage, name: str) -> list[Record]:
    data = storage.read_bytes(f"{STAGE}/{name}.jsonl")
    records = parse_records(data, name=name, kind=name)
    return [
        {key: value for key, value in record.items() if key != "time" and "_per_s" not in key}
        | {"train/loader_wait_fraction": 0}
        for record in records
    ]


def _read_events(storage: Storage, scratch: Path) -> list[tuple[int, float]]:
    scratch.mkdir()
    folder = f"{STAGE}/tensorboard"
    # Readers take the files of a folder in the order of their names, which begin with the time.
    for name, _ in storage.walk(folder):
        (scratch / name).write_bytes(storage.read_bytes(f"{folder}/{name}"))
    events = EventAccumulator(str(scratch)).Reload()
    return [(event.step, event.value) for event in events.Scalars(_LOSS)]


def _normal_name(name: str) -> str:
    """Name a file without the attempt: what each start of a run has of its own has one name."""
    name = re.sub(r"attempt-[0-9a-f]{32}", "attempt", name)
    name = re.sub(r"sessions/[^/]*", "sessions/session", name)
    name = re.sub(r"commits/[0-9]{10}", "commits/number", name)
    return re.sub(r"events\.out\.tfevents\..*", "events", name)

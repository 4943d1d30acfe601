"""Looking after a run's checkpoints: list, verify, export, prune (`fqgan checkpoints`)."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal

import safetensors.torch
import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fqgan_dist.autoregressive import published as published_autoregressive
from fqgan_dist.data.consumption import OrderId
from fqgan_dist.data.order import SampleOrder
from fqgan_dist.errors import CheckpointError, ConfigError, FqganError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.shards import open_dataset
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.training_stage import find_trainings
from fqgan_dist.storage.storage import Storage, locate_file
from fqgan_dist.telemetry.progress import render_text
from fqgan_dist.terminal import join_lines, printable
from fqgan_dist.tokenizer import published as published_tokenizer
from fqgan_dist.tokenizer.config import TokenizerConfig
from fqgan_dist.training.checkpoint import CheckpointStore, CommitRecord, LoadedCheckpoint
from fqgan_dist.training.config import CheckpointTarget
from fqgan_dist.training.ledger import FindOrder
from fqgan_dist.world import World

logger = logging.getLogger(__name__)

Action = Literal["list", "verify", "export", "prune"]
TrainedStage = Literal["tokenizer", "autoregressive"]

_SUFFIXES = {"ours": ".safetensors", "published": ".pt"}
# Which options an action takes; another one has no effect, and is an error.
_OPTIONS: dict[Action, tuple[str, ...]] = {
    "list": (),
    "verify": ("step", "ledger"),
    "export": ("to", "format", "step"),
    "prune": (),
}


@dataclass(frozen=True)
class ActionResult:
    """What an action found or did."""

    report: dict[str, Any]
    """For machines; JSON-able."""
    text: str
    """For people."""
    is_damaged: bool = False
    """Whether verification found damage."""


def run_checkpoint_action(
    action: Action,
    config: RunConfig,
    stage: TrainedStage,
    target: CheckpointTarget | None = None,
) -> ActionResult:
    """Carry out one `fqgan checkpoints` command on a stage's checkpoints.

    Raises:
        ConfigError: an option is missing, wrong or without effect.
        CheckpointError: there are no checkpoints, or none that is good.
    """
    target = target or CheckpointTarget()
    for name in target.model_fields_set - set(_OPTIONS[action]):
        takes = ", ".join(_OPTIONS[action]) or "none"
        raise ConfigError(
            f"{name}: has no effect on `checkpoints {action}`, whose options are: {takes}"
        )
    store = _open_store(config, stage)
    if action != "verify" and (fault := store.find_fault_of_log()) is not None:
        raise CheckpointError(fault)
    match action:
        case "list":
            return _list(store)
        case "verify":
            if target.ledger:
                return _verify_ledger(store, config, target.step)
            return _verify(store, target.step)
        case "export":
            return _export(store, stage, target)
        case "prune":
            return _prune(store, config, stage)


def _open_store(config: RunConfig, stage: TrainedStage) -> CheckpointStore:
    prefix = f"{stage}/checkpoints"
    storage = Storage(config.storage.root)
    if not storage.list(prefix):
        raise CheckpointError(
            f"{storage.uri(prefix)}: no checkpoints of stage {stage!r}; check storage.root, or "
            f"train first (fqgan train CONFIG)"
        )
    return CheckpointStore(storage, prefix)


def _list(store: CheckpointStore) -> ActionResult:
    rows = [_describe(store, commit) for commit in store.list_commits()]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "size", "written", "state"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    table.add_column("metrics")
    for row in rows:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
        size = f"{row['bytes'] / 2**20:,.1f} MiB"
        cells = (str(row["step"]), size, row["written_at"], row["problem"] or "ok", metrics)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    text = render_text(table, width=120) if rows else f"{store}: all checkpoints were given up"
    return ActionResult({"checkpoints": rows}, text)


def _describe(store: CheckpointStore, commit: CommitRecord) -> dict[str, Any]:
    # By its manifest: its files are not read.
    row: dict[str, Any] = {
        "step": commit.step,
        "commit": commit.number,
        "attempt": commit.attempt,
        "written_at": commit.written_at,
        "problem": None,
        "bytes": 0,
        "metrics": {},
    }
    try:
        loaded = store.load(commit.number)
    except CheckpointError as error:
        return row | {"problem": str(error)}
    size = sum(file.bytes for file in loaded.manifest.files)
    return row | {"bytes": size, "metrics": loaded.manifest.metrics}


def _verify(store: CheckpointStore, step: int | None) -> ActionResult:
    problems = store.verify(step)
    steps = [commit.step for commit in store.list_commits() if step in (None, commit.step)]
    report = {"steps": steps, "problems": problems}
    if problems:
        text = join_lines(
            [
                f"{store}: {len(problems)} problem(s)",
                *(f"  {problem}" for problem in problems),
                "A run steps over damaged ones",
            ]
        )
        return ActionResult(report, text, is_damaged=True)
    shown = ", ".join(str(each) for each in steps)
    return ActionResult(report, f"{store}: every byte of steps {shown} is as it was written")


def _verify_ledger(store: CheckpointStore, config: RunConfig, step: int | None) -> ActionResult:
    report = store.check_ledger(_find_order_of(config), step)
    lines = [
        f"epoch {each['epoch']}: {each['images']} of {each['of']} images, {each['stood_in']} of "
        f"them by another in their place, {each['skipped']} skipped"
        for each in report.epochs
    ]
    lines += report.exceptions
    if report.problems:
        head = f"{store}: {len(report.problems)} problem(s) of the ledger at step {report.step}"
        return ActionResult(
            report.to_json(), join_lines([head, *report.problems, *lines]), is_damaged=True
        )
    how = (
        f"{report.num_rehashed} of {report.num_commits} commits' hashes computed again from the "
        "order of the dataset"
    )
    head = (
        f"{store}: up to step {report.step} every image of every epoch was consumed exactly once "
        f"({report.positions} in all; {how})"
    )
    return ActionResult(report.to_json(), join_lines([head, *lines]))


def _find_order_of(config: RunConfig) -> FindOrder:
    """Open the dataset of a run, if it is there, for the order of its samples."""

    @cache
    def find(order: OrderId) -> SampleOrder | None:
        context = RunContext(
            config=config,
            storage=Storage(config.storage.root),
            world=World(),
            device=torch.device("cpu"),
        )
        try:
            dataset = open_dataset(context, "train")
        except FqganError as error:
            logger.info("hashes are not computed again: %s", error)
            return None
        if dataset.id != order.dataset_id:
            return None
        return SampleOrder(
            [shard.count for shard in dataset.index.shards],
            dataset_id=dataset.id,
            seed=order.seed,
            window_shards=order.window_shards,
        )

    return find


def _prune(store: CheckpointStore, config: RunConfig, stage: TrainedStage) -> ActionResult:
    retention = find_trainings(config)[stage].checkpoint.retention
    removed = [commit.step for commit in store.prune(retention)]
    kept = [commit.step for commit in store.list_commits()]
    text = f"{store}: deleted steps {removed or 'none'}, kept {kept}"
    return ActionResult({"removed": removed, "kept": kept}, text)


def _export(store: CheckpointStore, stage: TrainedStage, target: CheckpointTarget) -> ActionResult:
    folder, name = _check_file(target)
    ema = f"{stage}_ema"

    def read(loaded: LoadedCheckpoint) -> tuple[LoadedCheckpoint, dict[str, Tensor]]:
        # An average covers parameters, not buffers.
        averages = loaded.read(ema) if ema in loaded.manifest.parts else {}
        return loaded, loaded.read(stage) | averages

    found = store.read_newest(read, step=target.step)
    if found is None:
        raise CheckpointError(f"{store}: no checkpoint was ever committed; train first")
    loaded, weights = found
    has_ema = ema in loaded.manifest.parts
    if target.format == "published":
        data = _encode_published(stage, weights, loaded)
    else:
        data = safetensors.torch.save(
            {key: value.contiguous() for key, value in weights.items()}, metadata={"format": "pt"}
        )
    report = {
        "file": folder.uri(name),
        "format": target.format,
        "stage": stage,
        "step": loaded.step,
        "is_ema": has_ema,
        "parameters": sum(value.numel() for value in weights.values()),
        "sha256": hashlib.sha256(data).hexdigest(),
        "config": loaded.manifest.config,
        "dataset_id": loaded.manifest.dataset_id,
        "state": loaded.manifest.state,
        "metrics": loaded.manifest.metrics,
    }
    folder.write_bytes(name, data)
    # The description comes last: a weights file without one is half an export.
    folder.write_bytes(_description_name(name), json.dumps(report, indent=1).encode())
    text = (
        f"{folder.uri(name)}: {'averaged ' if has_ema else ''}weights of the {stage} at step "
        f"{loaded.step}, {len(data) / 2**20:,.1f} MiB; described in {_description_name(name)}"
    )
    return ActionResult(report, text)


def _check_file(target: CheckpointTarget) -> tuple[Storage, str]:
    suffix = _SUFFIXES[target.format]
    if target.to is None:
        raise ConfigError(f"to: required by `checkpoints export`; name a file: to=FILE{suffix}")
    if not target.to.endswith(suffix):
        raise ConfigError(
            f"to: {target.to!r} does not end in {suffix}, as files of format={target.format} do"
        )
    folder, name = locate_file(target.to)
    for each in (name, _description_name(name)):
        if folder.exists(each):
            raise ConfigError(f"to: {folder.uri(each)} is there already; name another file")
    return folder, name


def _description_name(name: str) -> str:
    return f"{PurePosixPath(name).stem}.json"


def _encode_published(
    stage: TrainedStage, weights: Mapping[str, Tensor], loaded: LoadedCheckpoint
) -> bytes:
    """Encode weights by the released names, as the dict that the released code loads."""
    if stage == "tokenizer":
        config = TokenizerConfig.model_validate(loaded.manifest.config)
        state = published_tokenizer.to_published_state_dict(weights, config)
    else:
        try:
            state = published_autoregressive.to_published_state_dict(weights)
        except ValueError as error:
            raise ConfigError(f"format: 'published': {error}; use format=ours") from error
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    return buffer.getvalue()

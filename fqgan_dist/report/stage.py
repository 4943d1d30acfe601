"""The `report` stage: collect a run's results and write `report.html` beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.report.figures import render_pngs
from fqgan_dist.report.inputs import ReportInputs
from fqgan_dist.report.page import build_report
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.evaluation_work import FIGURES_PATH
from fqgan_dist.stages.frozen_networks import describe_random_weights
from fqgan_dist.stages.manifest import load_record
from fqgan_dist.stages.names import STAGE_NAMES, StageName
from fqgan_dist.stages.stage import RunContext, StageOutcome
from fqgan_dist.stages.summary import load_summary
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metrics import Record, parse_metrics

STAGE: StageName = "report"


class ReportStage:
    """Implements `fqgan_dist.stages.stage.Stage`."""

    name: StageName = STAGE

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def settings(self) -> Mapping[str, Any]:
        """The title."""
        return {"name": self.context.config.name}

    def upstream(self) -> Mapping[str, Any]:
        """Return everything that is shown: the inputs of the evaluation."""
        return {"evaluation": self.context.require("evaluation").inputs}

    def run(self, run_chunks: RunChunks) -> StageOutcome:  # noqa: ARG002  one process
        """Write `report.html` and the figures as PNG files."""
        if not self.context.world.is_main:
            return StageOutcome()
        storage = self.context.storage
        inputs = collect_inputs(self.context)
        for name, data in render_pngs(inputs).items():
            storage.write_bytes(f"figures/{name}", data)
        storage.write_bytes("report.html", build_report(inputs).encode())
        return StageOutcome(outputs={"report": "report.html"})


def collect_inputs(context: RunContext) -> ReportInputs:
    """Read what the report shows from a run's storage."""
    storage = context.storage
    figures = TensorFiles(storage, FIGURES_PATH, "report").read(0)
    summary = load_summary(storage)
    summary.pop(STAGE, None)  # it is being written
    return ReportInputs(
        run_name=context.config.name,
        summary=summary,
        config_yaml=storage.read_bytes("config.yaml").decode(),
        environment=json.loads(storage.read_bytes("environment.json")),
        metrics=_read_metrics(storage),
        originals=_to_pixels(figures["originals"]),
        reconstructions=_to_pixels(figures["reconstructions"]),
        single_codebook=_group(
            figures, "single/", [book.name for book in context.config.tokenizer.model.codebooks]
        ),
        samples=_group(figures, "samples/", context.load_dataset("train").classes),
        notes=_collect_notes(context.config, storage),
    )


def _read_metrics(storage: Storage) -> dict[str, list[Record]]:
    paths = {stage: f"{stage}/metrics.jsonl" for stage in ("tokenizer", "autoregressive")}
    return {
        stage: parse_metrics(storage.read_bytes(path), name=storage.uri(path))
        for stage, path in paths.items()
        if storage.exists(path)
    }


def _group(
    figures: Mapping[str, Tensor], prefix: str, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Select the figures of a group, in the order of its names (files keep none)."""
    return {name: _to_pixels(figures[prefix + name]) for name in names if prefix + name in figures}


def _to_pixels(images: Tensor) -> np.ndarray:
    """Change (n, 3, H, W) to (n, H, W, 3)."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _collect_notes(config: RunConfig, storage: Storage) -> list[str]:
    """Say what a reader must know before comparing numbers."""
    notes = describe_random_weights(config)
    problems = [
        f"{split}: {count} images of the source were left out (see index.json)"
        for split in ("train", "val")
        for record in [load_record(storage, "shards")]
        if record is not None and (count := record.metrics.get(f"shards/{split}_problems"))
    ]
    unfinished = [
        name
        for name in STAGE_NAMES
        if name != STAGE
        and ((found := load_record(storage, name)) is None or found.state != "done")
    ]
    if unfinished:
        problems.append(f"stages that have not finished: {', '.join(unfinished)}")
    return notes + problems

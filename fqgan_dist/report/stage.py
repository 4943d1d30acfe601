"""The `report` stage: collect a run's results and write `report.html` beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fqgan_dist.chunks import RunChunks
from fqgan_dist.report.inputs import ReportInputs
from fqgan_dist.stages.evaluation import Evaluated, EvaluationStage, figure_file
from fqgan_dist.stages.frozen_networks import describe_random_weights
from fqgan_dist.stages.shards import DatasetIds, open_dataset
from fqgan_dist.stages.stage import (
    RunContext,
    Stage,
    StageOutcome,
    StageOutput,
    build_stages,
)
from fqgan_dist.stages.summary import load_summary
from fqgan_dist.stages.training_stage import find_trainings
from fqgan_dist.storage.derived import write_derived
from fqgan_dist.storage.documents import parse_json, read_document
from fqgan_dist.telemetry.metrics import Record, parse_metrics

_PAGE = "report.html"


class ReportFile(StageOutput):
    """The report of a run."""

    stage = "report"

    report: str
    """The page, below the storage root."""


class ReportStage(Stage):
    """Writes the report, anew whenever there is something else to show."""

    output = ReportFile
    inputs = (DatasetIds, Evaluated)
    runs_in = "driver"
    uses_device = False
    records = "newest"
    can_be_taken = False

    def settings(self) -> Mapping[str, Any]:
        # The title decides the page and nothing else.
        return {"name": self.context.config.name}

    def upstream(self) -> Mapping[str, Any]:
        self.context.read(Evaluated)
        return {"evaluation": EvaluationStage(self.context).collect_inputs()}

    def has_output(self) -> bool:
        return self.context.storage.exists(_PAGE)

    def run(self, run_chunks: RunChunks) -> StageOutcome:  # noqa: ARG002  one process
        if not self.context.world.is_main:
            return StageOutcome(None)
        # matplotlib: half a CPU-second of every process that knows the stages.
        from fqgan_dist.report.figures import render_pngs
        from fqgan_dist.report.page import build_report

        storage = self.context.storage

        def build() -> bytes:
            inputs = collect_inputs(self.context)
            for name, data in render_pngs(inputs).items():
                write_derived(storage, f"figures/{name}", lambda data=data: data)
            return build_report(inputs).encode()

        write_derived(storage, _PAGE, build)
        return StageOutcome(ReportFile(report=_PAGE))


def collect_inputs(context: RunContext) -> ReportInputs:
    """Read what the report shows from a run's storage."""
    storage = context.storage
    figures = figure_file(context, context.read(Evaluated).figures).read(0)
    summary = load_summary(context)
    summary.pop(ReportFile.stage, None)  # it is being written
    return ReportInputs(
        run_name=context.config.name,
        summary=summary,
        config_yaml=storage.read_bytes("config.yaml").decode(),
        environment=parse_json(read_document(storage, "environment.json")),
        metrics=_read_metrics(context),
        originals=_to_pixels(figures["originals"]),
        reconstructions=_to_pixels(figures["reconstructions"]),
        single_codebook=_group(
            figures, "single/", [book.name for book in context.config.tokenizer.model.codebooks]
        ),
        samples=_group(figures, "samples/", open_dataset(context, "train").index.classes),
        notes=_collect_notes(context),
    )


def _read_metrics(context: RunContext) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for stage in find_trainings(context.config):
        storage, path = context.storage_of(stage), f"{stage}/metrics.jsonl"
        if storage.exists(path):
            found[stage] = parse_metrics(storage.read_bytes(path), name=storage.uri(path))
    return found


def _group(
    figures: Mapping[str, Tensor], prefix: str, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Select the figures of a group, in the order of its names (files keep none)."""
    return {name: _to_pixels(figures[prefix + name]) for name in names if prefix + name in figures}


def _to_pixels(images: Tensor) -> np.ndarray:
    """Change (n, 3, H, W) to (n, H, W, 3)."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _collect_notes(context: RunContext) -> list[str]:
    notes = describe_random_weights(context.config)
    records = {
        stage.name: stage.find_record()
        for stage in build_stages(context)
        if stage.is_wanted(context.config)
    }
    shards = records[DatasetIds.stage]
    problems = [
        f"{split}: {count} images of the source were left out (see index.json)"
        for split in ("train", "val")
        if shards and (count := shards.metrics.get(f"{DatasetIds.stage}/{split}_problems"))
    ]
    unfinished = [
        name
        for name, record in records.items()
        if name != ReportFile.stage and (record is None or not record.is_done)
    ]
    if unfinished:
        problems.append(f"stages that have not finished: {', '.join(unfinished)}")
    return notes + problems

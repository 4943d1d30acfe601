"""Exported samples: what is in the files, and that a killed export goes on."""

from __future__ import annotations

import csv
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.stage_records import DATASETS, WEIGHTS, save_stage

from fqgan_dist.chunks import ChunkWork, run_in_processes
from fqgan_dist.config import load_config
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.exports import ExportFormat, ExportsStage, export_samples
from fqgan_dist.stages.run import check_static_inputs, is_stage_done
from fqgan_dist.stages.samples import Samples, SamplesStage
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.stage_record import StageRecord, record_path, save_record
from fqgan_dist.stages.summary import load_summary
from fqgan_dist.storage.storage import Storage
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.world import World

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"
COUNT, CHUNK_SIZE, SIDE = 5, 2, 32
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """A run whose tokenizer has finished; its weights are random."""
    overrides = [
        f"samples.count={COUNT}",
        f"samples.chunk_size={CHUNK_SIZE}",
        "tokenizer.training.ema_decay=null",
    ]
    config = load_config(TINY, [f"storage.root={tmp_path}", *overrides], RunConfig)
    storage = Storage(tmp_path)
    context = RunContext(config=config, storage=storage, world=World(), device=torch.device("cpu"))
    for stage, outputs in (
        ("shards", DATASETS),
        ("tokenizer", WEIGHTS),
        ("autoregressive", WEIGHTS),
    ):
        save_stage(context, stage, outputs)
    torch.manual_seed(0)
    tokenizer = FactorizedTokenizer(config.tokenizer.model)
    with CheckpointStore(storage, "tokenizer/checkpoints").begin_attempt() as attempt:
        attempt.save(
            1,
            tensors={"tokenizer": tokenizer.state_dict()},
            state={},
            metrics={},
            config={},
            dataset_id="d" * 64,
        )
    return context


@pytest.fixture
def samples(context: RunContext) -> TensorFiles:
    """Codes and labels of five samples in chunks of two."""
    files = TensorFiles(context.storage, "samples", "codes")
    generator = torch.Generator().manual_seed(0)
    model = context.config.autoregressive.model
    for chunk, first in enumerate(range(0, COUNT, CHUNK_SIZE)):
        labels = torch.arange(first, min(first + CHUNK_SIZE, COUNT))
        shape = (len(labels), model.num_codebooks, model.grid_size, model.grid_size)
        codes = torch.randint(model.codebook_size, shape, generator=generator, dtype=torch.int32)
        files.write(chunk, {"codes": codes, "labels": labels})
    return files


def export(context: RunContext, samples: TensorFiles, kind: ExportFormat) -> Path:
    name = export_samples(context, samples, kind, run_in_processes)
    path = context.storage.local_path(name)
    assert path is not None
    return path


def read_npz(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with np.load(path, allow_pickle=False) as stored:
        assert sorted(stored) == ["arr_0", "arr_1"]
        return stored["arr_0"], stored["arr_1"]


def test_npz_holds_all_images_and_labels_in_order_and_no_parts_stay(
    context: RunContext, samples: TensorFiles
) -> None:
    path = export(context, samples, "npz")
    images, labels = read_npz(path)
    assert images.dtype == np.uint8
    assert images.shape == (COUNT, SIDE, SIDE, 3)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert len(np.unique(images.reshape(COUNT, -1), axis=0)) == COUNT
    assert not [file for file in path.parent.rglob("*") if file.is_file() and file != path]


def test_png_and_webdataset_hold_the_same_images_and_labels(
    context: RunContext, samples: TensorFiles
) -> None:
    images, labels = read_npz(export(context, samples, "npz"))
    png = export(context, samples, "png")
    tables = [path.read_text().splitlines() for path in sorted(png.glob("*.csv"))]
    rows = [row for table in tables for row in csv.DictReader(table)]
    assert [int(row["label"]) for row in rows] == labels.tolist()
    for row, image in zip(rows, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(png / row["file"])), image)
    members: dict[str, bytes] = {}
    for path in sorted(export(context, samples, "webdataset").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                members[member.name] = content.read()
    for sample in range(COUNT):
        stored = np.asarray(Image.open(io.BytesIO(members[f"{sample:08d}.png"])))
        assert np.array_equal(stored, images[sample])
        assert int(members[f"{sample:08d}.cls"]) == labels[sample]


@pytest.mark.parametrize("kind", EXPORT_FORMATS)
def test_killed_export_goes_on_at_its_chunk_and_gives_the_same_bytes(
    context: RunContext, samples: TensorFiles, kind: ExportFormat, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    def die_after_one(work: ChunkWork) -> None:
        work.process(0)
        raise KilledError

    with pytest.raises(KilledError):
        export_samples(context, samples, kind, die_after_one)
    done: list[int] = []

    def go_on(work: ChunkWork) -> None:
        done.extend(chunk for chunk in work.chunks() if not work.is_done(chunk))
        run_in_processes(work)

    export_samples(context, samples, kind, go_on)
    assert done == [1, 2]
    first = contents(tmp_path / "samples" / "exports")
    for path in (tmp_path / "samples" / "exports").rglob("*"):
        if path.is_file():
            path.unlink()
    export(context, samples, kind)
    assert contents(tmp_path / "samples" / "exports") == first


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def with_export(context: RunContext, export: str) -> RunContext:
    settings = context.config.samples.model_copy(update={"export": export})
    return replace(context, config=context.config.model_copy(update={"samples": settings}))


def test_each_format_has_a_record_and_the_samples_know_of_none(context: RunContext) -> None:
    save_stage(context, "samples", {"fingerprint": "s"})
    assert not ExportsStage.is_wanted(with_export(context, "none").config)
    for done in ([], ["npz"], ["npz", "png"]):
        for export in EXPORT_FORMATS:
            stage = ExportsStage(with_export(context, export))
            assert stage.is_wanted(stage.context.config)
            assert (stage.load_record() is not None) == (export in done)
            samples = with_export(context, export).find(Samples)
            assert samples is not None
            assert samples.fingerprint == "s"
        save_stage(
            with_export(context, EXPORT_FORMATS[len(done)]), "exports", {"path": "samples/exports"}
        )


def test_samples_of_a_run_whose_record_names_its_exports_are_done(context: RunContext) -> None:
    """As versions wrote it for which exports were no stage."""
    inputs = SamplesStage(context).collect_inputs() | {"upstream.exports.npz": True}
    outputs = {"fingerprint": "s", "exports": {"npz": "samples/exports/x/samples.npz"}}
    record = StageRecord(stage="samples", state="done", inputs=inputs, outputs=outputs)
    save_record(context.storage, record_path("samples"), record)
    assert is_stage_done(SamplesStage(context))
    samples = context.find(Samples)
    assert samples is not None
    assert samples.fingerprint == "s"


def test_other_samples_are_another_record_beside_the_first(context: RunContext) -> None:
    save_stage(context, "samples", {"fingerprint": "five"}, metrics={"samples/count": 5})
    settings = context.config.samples.model_copy(update={"count": 7})
    more = replace(context, config=context.config.model_copy(update={"samples": settings}))
    check_static_inputs(SamplesStage(more))
    assert not is_stage_done(SamplesStage(more))
    assert more.find(Samples) is None
    save_stage(more, "samples", {"fingerprint": "seven"}, metrics={"samples/count": 7})
    for run, here, other in ((context, 5, 7), (more, 7, 5)):
        summary = load_summary(run)["samples"]
        assert summary["metrics"] == {"count": here}
        (listed,) = summary["others"]
        assert listed["inputs"] == {"settings.count": other}
        assert listed["metrics"] == {"samples/count": other}


def test_a_config_that_names_samples_alone_exports_them_as_before_exports_were_a_stage() -> None:
    config = load_config(TINY, ["stages=[samples]", "samples.export=png"], RunConfig)
    assert config.stages == ("samples", "exports")
    assert load_config(TINY, ["stages=[codes]"], RunConfig).stages == ("codes",)

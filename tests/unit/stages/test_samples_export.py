"""Exported samples: what is in the files, and that a killed export goes on."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fqgan_dist.chunks import ChunkWork, run_in_processes
from fqgan_dist.config import load_config
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.errors import DataError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.manifest import StageRecord, check_inputs, flatten, save_record
from fqgan_dist.stages.samples import SamplesStage
from fqgan_dist.stages.samples_export import EXPORT_FORMATS, ExportFormat, export_samples
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.storage.storage import Storage
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.world import World

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"
COUNT, CHUNK_SIZE, SIDE = 5, 2, 32


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
    for stage, outputs in (
        ("tokenizer", {"weights": "t", "step": 1}),
        ("autoregressive", {"weights": "a", "step": 1}),
        ("shards", {"train": "d", "val": "v"}),
    ):
        record = StageRecord(stage=stage, state="done", inputs={}, outputs=outputs)
        save_record(storage, record)
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
    return RunContext(config=config, storage=storage, world=World(), device=torch.device("cpu"))


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


def stage_inputs(context: RunContext, export: str) -> dict[str, object]:
    settings = context.config.samples.model_copy(update={"export": export})
    config = context.config.model_copy(update={"samples": settings})
    stage = SamplesStage(
        RunContext(config=config, storage=context.storage, world=World(), device=context.device)
    )
    return flatten({"settings": stage.settings(), "upstream": stage.upstream()})


def test_finished_samples_are_extended_by_an_export_and_never_refused_for_one(
    context: RunContext,
) -> None:
    def save(export: str) -> None:
        record = StageRecord(stage="samples", state="done", inputs=stage_inputs(context, export))
        save_record(context.storage, record)

    def state(export: str) -> str:
        record = check_inputs(context.storage, "samples", stage_inputs(context, export))
        assert record is not None
        return record.state

    save("none")
    assert state("none") == "done"
    assert state("npz") == "started"
    save("npz")
    assert state("npz") == "done"
    assert state("none") == "done"
    assert state("png") == "started"
    changed = stage_inputs(context, "none") | {"settings.count": 7}
    with pytest.raises(DataError, match=r"settings\.count: was 5, now 7"):
        check_inputs(context.storage, "samples", changed)

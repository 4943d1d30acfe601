"""Damaged images in the stages that do not train: left out and told of, or an error."""

from __future__ import annotations

import functools
import io
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.stage_records import WEIGHTS, save_stage
from support.tiny_shards import NOT_AN_IMAGE, damage_samples, key_of, write_tiny_dataset

from fqgan_dist.chunks import ChunkWork, find_pending
from fqgan_dist.config import load_config
from fqgan_dist.data.index import load_samples
from fqgan_dist.data.record_stores import FeatureStore
from fqgan_dist.errors import DataError
from fqgan_dist.stages.autoregressive import HeldOutCodes
from fqgan_dist.stages.codes import CodesStage, CodeWork, code_store
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.damage import DamagedSample, DamageNotes
from fqgan_dist.stages.evaluation import EvaluationStage
from fqgan_dist.stages.evaluation_work import (
    EvaluationModels,
    ImageWork,
    ReconstructionWork,
    ReferenceWork,
    build_figures,
)
from fqgan_dist.stages.images import HeldOutImages
from fqgan_dist.stages.shards import open_dataset
from fqgan_dist.stages.stage import RunContext, Stage, StageOutcome
from fqgan_dist.stages.teachers import TeachersStage, TeacherWork
from fqgan_dist.storage.storage import Storage
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.world import World

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"
COUNTS = {"train": (6, 5), "val": (5, 4)}
DAMAGED = {"train": key_of(7), "val": key_of(2)}
"""Row 1 of the second training shard, row 2 of the first validation shard."""
KINDS = pytest.mark.parametrize("kind", ["flipped", "undecodable", "thin"])
"""A bit that flipped since the dataset was made; no image; an image that no view can be made of."""
REASONS = {
    "flipped": "are not those of the table of samples, also when read again",
    "undecodable": "cannot decode",
    "thin": "would have",
}


def make_run(
    root: Path, kind: str, *overrides: str, damaged: Mapping[str, Collection[str]] | None = None
) -> RunContext:
    """Make a run with finished datasets in which these keys, or `DAMAGED`, are of a kind."""
    storage, ids = Storage(root), {}
    for split, counts in COUNTS.items():
        keys = damaged.get(split, ()) if damaged else [DAMAGED[split]]
        folder = storage.child(f"data/photographs/{split}")
        index = write_tiny_dataset(
            folder,
            counts,
            undecodable=keys if kind in ("undecodable", "thin") else (),
            contents=draw_thin_image() if kind == "thin" else NOT_AN_IMAGE,
            split=split,
        )
        if kind == "flipped":
            damage_samples(folder, index, keys)
        ids[split] = index.dataset_id
    context = open_run(root, *overrides)
    save_stage(context, "shards", ids)
    save_stage(context, "tokenizer", WEIGHTS)
    return context


@functools.cache
def draw_thin_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 200_000)).save(file, "PNG")
    return file.getvalue()


def open_run(root: Path, *overrides: str) -> RunContext:
    settings = [f"storage.root={root}", "evaluation.chunk_size=4", *overrides]
    config = load_config(TINY, settings, RunConfig)
    return RunContext(
        config=config, storage=Storage(root), world=World(), device=torch.device("cpu")
    )


@functools.cache
def build_tokenizer() -> FactorizedTokenizer:
    torch.manual_seed(0)
    config = load_config(TINY, [], RunConfig)
    return FactorizedTokenizer(config.tokenizer.model).eval().requires_grad_(False)


def run_here(work: ChunkWork) -> None:
    if isinstance(work, CodeWork):
        work.__dict__["_tokenizer"] = build_tokenizer()  # as if it had been loaded already
    for chunk in find_pending(work):
        work.process(chunk)


def run_stage(stage: Stage) -> StageOutcome:
    outcome = stage.run(run_here)
    assert outcome.output is not None
    save_stage(stage.context, stage.name, outcome.output.model_dump())
    return outcome


@functools.cache
def build_networks() -> dict[str, Any]:
    """Build what every run of these settings would, but once: it takes a second."""
    models = EvaluationModels(open_run(Path("unused")))
    networks = {"inception": models.inception, "teachers": models.teachers}
    return networks | {"tokenizer": build_tokenizer()}


def open_evaluation(context: RunContext) -> tuple[ReconstructionWork, ReferenceWork]:
    models = EvaluationModels(context)
    models.__dict__.update(build_networks())
    return ReconstructionWork(context, models), ReferenceWork(context, models)


def read_ledger(context: RunContext, stage: str) -> list[dict[str, Any]]:
    data = context.storage.read_bytes(f"{stage}/damaged_samples.jsonl")
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """A run of undamaged data that has features and codes."""
    context = make_run(tmp_path_factory.mktemp("sound"), "sound")
    for stage in (TeachersStage, CodesStage):
        metrics = run_stage(stage(context)).metrics
        assert not [name for name in metrics if "damaged" in name]
        assert not context.storage.exists(f"{stage.name}/damaged_samples.jsonl")
        assert not context.storage.list(f"{stage.name}/damage")
    return context


def read_features(context: RunContext) -> dict[tuple[int, str, str], np.ndarray | None]:
    """Read what is stored, by view, key and teacher; None for a damaged image."""
    found: dict[tuple[int, str, str], np.ndarray | None] = {}
    work = TeacherWork(context)
    dataset = open_dataset(context, "train")
    for entry in dataset.index.shards:
        for view in range(2):
            table = work.store.read(entry, view, load_samples(dataset.folder, entry).keys)
            for name, values in table.columns.items():
                for row, key in enumerate(table.keys):
                    is_damaged = row in table.damaged
                    found[view, key, name] = None if is_damaged else values[row]
                    assert not is_damaged or not values[row].any()
    return found


def read_codes(context: RunContext) -> dict[tuple[str, str], np.ndarray | None]:
    """Read what is stored, by split and key; None for a damaged image."""
    found: dict[tuple[str, str], np.ndarray | None] = {}
    for split in COUNTS:
        dataset, store = open_dataset(context, split), code_store(context, split)
        for entry in dataset.index.shards:
            keys = load_samples(dataset.folder, entry).keys
            codes, damaged = store.read(entry, keys)
            found |= {
                (split, key): None if row in damaged else codes[row] for row, key in enumerate(keys)
            }
    return found


def assert_equal_but_for(found: Mapping[Any, Any], sound: Mapping[Any, Any], damaged: int) -> None:
    """Compare values to the bit; `damaged` of those found are None."""
    assert list(found) == list(sound)
    assert sum(value is None for value in found.values()) == damaged
    assert all(value is None or np.array_equal(value, sound[name]) for name, value in found.items())


@KINDS
def test_teachers_leave_a_damaged_image_out_and_say_so(
    kind: str, sound: RunContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = make_run(tmp_path, kind)
    with caplog.at_level(logging.WARNING):
        metrics = run_stage(TeachersStage(context)).metrics
    found = read_features(context)
    assert_equal_but_for(found, read_features(sound), damaged=2 * 2)  # views and teachers
    assert {key for (_, key, _), value in found.items() if value is None} == {DAMAGED["train"]}
    assert metrics["teachers/features"] == 2 * (sum(COUNTS["train"]) - 1)
    assert metrics["teachers/damaged_samples"] == 1
    (line,) = read_ledger(context, "teachers")
    assert (line["split"], line["shard"]) == ("train", "shard-000001.tar")
    assert line["key"] == DAMAGED["train"]
    assert REASONS[kind] in line["reason"]
    assert "teachers: 1 damaged samples are left out, see teachers/damaged_samples" in caplog.text


@KINDS
def test_codes_leave_a_damaged_image_out_and_say_so(
    kind: str, sound: RunContext, tmp_path: Path
) -> None:
    context = make_run(tmp_path, kind)
    metrics = run_stage(CodesStage(context)).metrics
    found = read_codes(context)
    assert_equal_but_for(found, read_codes(sound), damaged=2)
    assert {name for name, value in found.items() if value is None} == set(DAMAGED.items())
    assert metrics == {
        "codes/train_crops": 10 * (sum(COUNTS["train"]) - 1),
        "codes/val_crops": sum(COUNTS["val"]) - 1,
        "codes/damaged_samples": 2,
    }
    assert {(line["split"], line["key"]) for line in read_ledger(context, "codes")} == set(
        DAMAGED.items()
    )


@pytest.mark.parametrize("kind", ["flipped", "undecodable"])
def test_evaluation_leaves_a_damaged_image_out_of_both_sides(
    kind: str, sound: RunContext, tmp_path: Path
) -> None:
    context = make_run(tmp_path, kind)
    for work, whole in zip(open_evaluation(context), open_evaluation(sound), strict=True):
        run_here(work)
        run_here(whole)
        split = work.dataset.index.split
        row = int(DAMAGED[split][-1])
        assert work.read_damaged_ids() == [row]
        assert whole.read_damaged_ids() == []
        for name, values in join_chunks(whole).items():
            if name not in ("psnr_mean_image",) and not name.startswith("info_nce"):
                kept = torch.cat([values[:row], values[row + 1 :]])
                assert torch.equal(join_chunks(work)[name], kept), name
    work, reference = open_evaluation(context)
    noted = [note.key for note in reference.notes.read(reference.chunks())]
    assert noted == [DAMAGED["train"]]
    # The mean of training images, a baseline, is of the undamaged ones alone.
    noted = {note.key for note in work.notes.read(work.chunks())}
    assert noted == set(DAMAGED.values())
    figures = build_figures(
        context, build_tokenizer(), with_samples=False, damaged=work.read_damaged_ids()
    )
    assert len(figures["originals"]) == sum(COUNTS["val"]) - 1


def join_chunks(work: ImageWork) -> dict[str, torch.Tensor]:
    chunks = [work.files.read(chunk) for chunk in work.chunks()]
    names = [name for name in chunks[-1] if name != "damaged_ids"]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in names}


def test_the_result_of_an_evaluation_counts_what_was_left_out(tmp_path: Path) -> None:
    context = make_run(tmp_path, "flipped")
    work, _ = open_evaluation(context)
    run_here(work)
    results = EvaluationStage(context)._judge_reconstructions(work)
    assert results["tokenizer/images"] == sum(COUNTS["val"]) - 1
    assert results["tokenizer/damaged_images"] == 1
    assert set(results["tokenizer/info_nce"]) == {"semantic_mid", "semantic_high"}


def test_evaluation_says_when_too_few_images_are_left(tmp_path: Path) -> None:
    keys = [key_of(number) for number in range(sum(COUNTS["val"]))]
    # With so few images left only a long search finds one that could stand in.
    limit = "data.max_damaged_in_a_row=10"
    context = make_run(tmp_path, "flipped", limit, damaged={"val": keys[:2] + keys[3:]})
    work, _ = open_evaluation(context)
    run_here(work)  # of two chunks nothing is left
    with pytest.raises(DataError, match=r"val: rFID needs at least 2 images, but 8 of 9 are dam"):
        EvaluationStage(context)._judge_reconstructions(work)


@KINDS
def test_with_fail_each_stage_ends_with_the_name_of_the_sample(kind: str, tmp_path: Path) -> None:
    context = make_run(tmp_path, kind, "data.on_damage=fail")
    works: list[tuple[str, ChunkWork]] = [
        ("train", TeacherWork(context)),
        ("train", CodeWork(context, "train")),
        ("val", CodeWork(context, "val")),
        *zip(("val", "train"), open_evaluation(context), strict=True),
    ]
    for split, work in works:
        shard = {"train": "shard-000001", "val": "shard-000000"}[split]
        with pytest.raises(DataError, match=rf"{shard}\.tar: sample '{DAMAGED[split]}': "):
            run_here(work)
    with pytest.raises(DataError, match=f"sample '{DAMAGED['val']}'"):
        HeldOutImages(context, 8, 4)


def test_data_that_are_broken_as_a_whole_end_each_stage(tmp_path: Path) -> None:
    every = {split: list(map(key_of, range(sum(counts)))) for split, counts in COUNTS.items()}
    context = make_run(tmp_path, "undecodable", damaged=every)
    for work in (TeacherWork(context), CodeWork(context, "val"), open_evaluation(context)[0]):
        with pytest.raises(DataError, match=r"^5 damaged sample.*max_damaged_in_a_row is 5"):
            run_here(work)
    last = make_run(
        tmp_path / "rest", "flipped", "data.max_damaged_in_a_row=99", damaged={"val": every["val"]}
    )
    with pytest.raises(DataError, match=r"^9 damaged sample.*the dataset has no further sample"):
        run_here(CodeWork(last, "val"))


def test_a_stage_that_was_killed_goes_on_to_the_same_files_and_ledger(
    sound: RunContext, tmp_path: Path
) -> None:
    context = make_run(tmp_path, "flipped")
    expected = run_stage(TeachersStage(make_run(tmp_path / "unbroken", "flipped")))
    work = TeacherWork(context)
    for chunk in (1, 2):  # the damaged one of view 0, and another
        work.process(chunk)
    # The next one was killed between its note and its output.
    TeacherWork(context).notes.write(3, work.notes.read([1]))
    outcome = run_stage(TeachersStage(open_run(tmp_path)))
    assert outcome.metrics == expected.metrics
    assert_equal_but_for(read_features(context), read_features(sound), damaged=2 * 2)
    assert len(read_ledger(context, "teachers")) == 1


def test_a_shard_that_was_copied_again_after_a_kill_leaves_no_note(
    sound: RunContext, tmp_path: Path
) -> None:
    context = make_run(tmp_path, "sound")
    work = TeacherWork(context)
    found = DamagedSample(split="train", shard="shard-000001.tar", key="a", reason="its bytes")
    work.notes.write(1, [found])
    context.storage.write_bytes("teachers/damaged_samples.jsonl", b"of a former attempt")
    outcome = run_stage(TeachersStage(context))
    assert "teachers/damaged_samples" not in outcome.metrics
    assert not context.storage.exists("teachers/damaged_samples.jsonl")
    assert_equal_but_for(read_features(context), read_features(sound), damaged=0)


def test_on_damage_may_change_between_sessions(tmp_path: Path) -> None:
    make_run(tmp_path, "flipped")
    with pytest.raises(DataError, match="damaged"):
        run_stage(TeachersStage(open_run(tmp_path, "data.on_damage=fail")))
    stage = TeachersStage(open_run(tmp_path))
    assert (
        stage.collect_inputs()
        == TeachersStage(open_run(tmp_path, "data.on_damage=fail")).collect_inputs()
    )
    assert run_stage(stage).metrics["teachers/damaged_samples"] == 1


def test_a_training_measures_itself_on_the_undamaged_held_out_images(
    sound: RunContext, tmp_path: Path
) -> None:
    context = make_run(tmp_path, "flipped")
    run_stage(CodesStage(context))
    tokenizer = build_tokenizer()
    (psnr,) = HeldOutImages(context, 8, 4).measure_tokenizer(tokenizer).values()
    values = [HeldOutImages(sound, count, 1).measure_tokenizer(tokenizer) for count in (2, 3, 8)]
    two, three, all_eight = (next(iter(value.values())) for value in values)
    damaged = 3 * three - 2 * two
    assert psnr == pytest.approx((8 * all_eight - damaged) / 7, rel=1e-6)
    held_out, whole = HeldOutCodes(context), HeldOutCodes(sound)
    assert torch.equal(held_out.codes, torch.cat([whole.codes[:2], whole.codes[3:]]))
    assert torch.equal(held_out.labels, torch.cat([whole.labels[:2], whole.labels[3:]]))


def test_held_out_images_that_are_all_damaged_are_an_error(tmp_path: Path) -> None:
    damaged = {"val": [key_of(0), key_of(1)]}
    context = make_run(
        tmp_path, "flipped", "autoregressive.training.evaluation_samples=2", damaged=damaged
    )
    run_stage(CodesStage(context))
    with pytest.raises(DataError, match=r"val: the first 2 validation images.* are all damaged"):
        HeldOutImages(context, 2, 1)
    with pytest.raises(DataError, match=r"codes/.*the first 2 samples were all damaged"):
        HeldOutCodes(context)


def test_a_note_of_something_else_is_refused(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    notes = DamageNotes(storage, "codes", "f" * 8)
    storage.write_bytes(f"codes/damage/{'f' * 8}/chunk-000002.json", b"{}")
    assert notes.read([0, 1]) == []
    with pytest.raises(DataError, match=r"chunk-000002\.json: not a note of damage"):
        notes.read([0, 1, 2])


def test_stored_features_of_former_software_have_no_damaged_rows(sound: RunContext) -> None:
    work = TeacherWork(sound)
    assert isinstance(work.store, FeatureStore)
    entry = work.dataset.index.shards[0]
    assert b"damaged" not in sound.storage.read_bytes(work.store.path(entry, 0))

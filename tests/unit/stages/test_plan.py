"""Plans: numbers that follow from a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.plan import plan_run
from fqgan_dist.stages.plan_rendering import render_plan
from fqgan_dist.stages.stage_record import StageRecord, record_path, save_record
from fqgan_dist.storage.storage import Storage

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"


def plan(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    root = f"storage.root={tmp_path}"
    return plan_run(load_config(TINY, [root, *overrides], RunConfig))


def test_a_plan_is_json_and_readable(tmp_path: Path) -> None:
    made = plan(tmp_path, "name='[red]'")
    assert json.loads(json.dumps(made)) == made
    assert "run [red]" in render_plan(made)


def test_states_follow_from_parameters_and_average(tmp_path: Path) -> None:
    made = plan(tmp_path)["tokenizer"]
    counts, states = made["parameters"], made["memory"]
    trained = counts["tokenizer"] + counts["discriminator"]
    assert states["engine"] == {"name": "plain", "zero_stage": None, "ranks": 1}
    assert states["states_bytes"]["ema"] == 4 * counts["tokenizer"]
    assert states["states_bytes"]["total"] == 16 * trained + 4 * counts["tokenizer"]
    # One process alone is compared with the two that its two micro-batches could have.
    others = states["other_engines"]
    assert others["ranks"] == 2
    assert others["states_bytes"]["plain/DDP"] == states["states_bytes"]["total"]
    assert others["states_bytes"]["ZeRO-1"] == (8 + 12 // 2) * trained + 4 * counts["tokenizer"]
    assert "ZeRO-3" not in others["states_bytes"]
    assert states["checkpoint_bytes"] == 12 * trained + 4 * counts["tokenizer"]


def test_activations_grow_with_the_micro_batch(tmp_path: Path) -> None:
    def saved(size: int) -> int:
        override = f"autoregressive.training.micro_batch_size={size}"
        return plan(tmp_path, override)["autoregressive"]["memory"]["saved_activations_bytes"][
            "pass"
        ]

    one, two, four = saved(1), saved(2), saved(4)
    assert one > 0
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_the_discriminator_counts_only_where_it_takes_part(tmp_path: Path) -> None:
    with_it = plan(tmp_path)
    without = plan(tmp_path, "tokenizer.losses.discriminator_start_step=7")
    saved = [made["tokenizer"]["memory"]["saved_activations_bytes"] for made in (with_it, without)]
    assert saved[0]["discriminator_pass"] > 0
    assert saved[1]["discriminator_pass"] == 0
    assert saved[0]["tokenizer_pass"] > saved[1]["tokenizer_pass"]
    assert any("never starts" in note for note in without["notes"])


def test_finished_shards_give_the_number_of_images(tmp_path: Path) -> None:
    assumed = plan(tmp_path)
    assert assumed["dataset"]["training_images"] == 1_281_167
    record = StageRecord(
        stage="shards", state="done", inputs={}, metrics={"shards/train_images": 48}
    )
    save_record(Storage(tmp_path), record_path("shards"), record)
    made = plan(tmp_path)
    assert made["dataset"] == {"training_images": 48, "known_from": "the run's shards"}
    # Two views of two teachers of 16 float16; ten crops of 3 x 16 uint16.
    assert made["stored"]["features_bytes"] == 48 * 2 * 32 * 2
    assert made["stored"]["codes_bytes"] == 48 * 10 * 48 * 2


def test_missing_files_are_notes_but_conflicts_are_errors(tmp_path: Path) -> None:
    notes = plan(tmp_path, f"data.source={tmp_path}/nowhere")["notes"]
    assert any("data.source" in note for note in notes)
    with pytest.raises(ConfigError) as caught:
        plan(
            tmp_path,
            "tokenizer.model.codebook_size=70000",
            "codes.views={policy: random_crop_flip, image_size: 32}",
        )
    assert "70000" in str(caught.value)
    assert "codes.views.policy" in str(caught.value)


ON_RAY = (
    "execution=ray",
    "ray.train.num_workers=4",
    *(
        f"{stage}.training.{setting}"
        for stage in ("tokenizer", "autoregressive")
        for setting in ("engine=deepspeed", "ranks_per_micro_batch=2")
    ),
)


def test_memory_on_a_cluster_is_of_the_chosen_engine_and_world_size(tmp_path: Path) -> None:
    made = plan(tmp_path, *ON_RAY, "autoregressive.training.zero_stage=3")
    tokenizer, far = made["tokenizer"], made["autoregressive"]
    assert tokenizer["memory"]["engine"] == {"name": "deepspeed", "zero_stage": 1, "ranks": 4}
    assert far["memory"]["engine"] == {"name": "deepspeed", "zero_stage": 3, "ranks": 4}
    total = far["parameters"]["autoregressive"]
    assert far["memory"]["states_bytes"]["parameters"] == total
    for memory in (tokenizer["memory"], far["memory"]):
        activations = max(memory["saved_activations_bytes"].values())
        assert memory["per_gpu_bytes"] == (
            memory["states_bytes"]["total"] + memory["frozen_bytes"] + activations
        )
        name = f"ZeRO-{memory['engine']['zero_stage']}"
        assert memory["other_engines"]["states_bytes"][name] == memory["states_bytes"]["total"]
        assert memory["other_engines"]["ranks"] == 4


def test_ranks_that_share_a_micro_batch_keep_activations_of_their_images_only(
    tmp_path: Path,
) -> None:
    def saved(*overrides: str) -> int:
        memory = plan(tmp_path, *overrides)["tokenizer"]["memory"]
        return memory["saved_activations_bytes"]["tokenizer_pass"]

    two_images = saved("tokenizer.training.micro_batch_size=2")
    assert saved(*ON_RAY) == two_images


def test_ranks_and_passes_are_counted(tmp_path: Path) -> None:
    training = plan(tmp_path, *ON_RAY)["tokenizer"]["training"]
    assert training["largest_world_size"] == 8  # M x micro-batch: one image per rank
    assert (training["ranks"], training["ranks_per_micro_batch"]) == (4, 2)
    assert (training["images_per_pass"], training["passes_per_step"]) == (2, 1)
    assert training["idle_passes_per_step"] == 0


def test_idle_passes_are_said(tmp_path: Path) -> None:
    made = plan(
        tmp_path,
        *ON_RAY,
        "ray.train.num_workers=6",
        "tokenizer.training.global_batch_size=16",
        "autoregressive.training.global_batch_size=16",
    )
    assert made["tokenizer"]["training"]["idle_passes_per_step"] == 2
    assert any(note.startswith("tokenizer: 2 of 6 passes") for note in made["notes"])
    assert "2 pass(es) of all are idle" in render_plan(made)


def test_of_a_range_passes_are_of_the_largest_size_and_memory_of_the_smallest(
    tmp_path: Path,
) -> None:
    made = plan(tmp_path, *ON_RAY, "ray.train.num_workers=[1,9]")
    assert made["tokenizer"]["training"]["ranks"] == 4
    assert made["tokenizer"]["memory"]["engine"]["ranks"] == 2
    text = " ".join(render_plan(made).split())
    assert "2 to 4 with 1 CPU each, PACK" in text
    assert "tokenizer: valid numbers of train workers: 2, 4." in text


def test_a_plan_on_a_cluster_is_readable(tmp_path: Path) -> None:
    rendered = render_plan(plan(tmp_path, *ON_RAY, "ray.pools.codes.max_actors=3"))
    text = " ".join(rendered.split())  # lines of the table are wrapped
    for words in (
        "4 with 1 CPU each, PACK",
        "pool of codes",
        "1 to 3 with 1 CPU each",
        "4, 2 to a micro-batch: 1 pass(es) of 2 image(s) each per step",
        "states, ZeRO-1 x4",
    ):
        assert words in text


def test_stages_that_do_not_run_are_not_planned(tmp_path: Path) -> None:
    made = plan(tmp_path, "stages=[tokenizer, codes]")
    assert "tokenizer" in made
    assert "autoregressive" not in made
    assert render_plan(made)


def test_a_world_size_that_cannot_train_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="6 train workers cannot share 2 micro-batches"):
        plan(tmp_path, *ON_RAY, "ray.train.num_workers=6")

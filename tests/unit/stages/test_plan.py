"""Plans: numbers that follow from a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fqgan_dist.config import load_config
from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.manifest import StageRecord, save_record
from fqgan_dist.stages.plan import plan_run
from fqgan_dist.stages.plan_rendering import render_plan

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
    assert states["plain_bytes"]["ema"] == 4 * counts["tokenizer"]
    assert states["plain_bytes"]["total"] == 16 * trained + 4 * counts["tokenizer"]
    assert states["zero1_ranks"] == 2
    assert states["zero1_bytes"]["adam_moments"] == 4 * trained
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
    save_record(Storage(tmp_path), record)
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
            "tokenizer.model.codebooks.1.feature_dim=18",
            "codes.views={policy: random_crop_flip, image_size: 32}",
        )
    assert "'dinov2' is 18" in str(caught.value)
    assert "codes.views.policy" in str(caught.value)

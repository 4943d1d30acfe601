"""Stages name their settings as they did when the records of older runs were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import RunContext, build_stages
from fqgan_dist.stages.stage_record import flatten
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

ROOT = Path(__file__).resolve().parents[3]
RECORDED = json.loads((ROOT / "tests" / "golden" / "stage_settings.json").read_text())
"""Written by the stages of commit 029e7dd; what they name so, run directories hold."""


@pytest.mark.parametrize("config_file", RECORDED)
def test_a_run_directory_of_before_is_of_the_same_settings(
    config_file: str, tmp_path: Path
) -> None:
    context = RunContext(
        config=load_config(ROOT / "configs" / config_file, [], RunConfig),
        storage=Storage(tmp_path),
        world=World(),
        device=torch.device("cpu"),
    )
    settings = {
        stage.name: json.loads(json.dumps(flatten(stage.settings())))
        for stage in build_stages(context)
        if stage.name in RECORDED[config_file]
    }
    assert settings == RECORDED[config_file]

from __future__ import annotations

import sys

import pytest
from support.tiny_tasks import load_tiny

from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.preflight import check_settings


def test_a_metric_sink_whose_package_is_missing_is_found_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_tiny("telemetry.sinks=[tensorboard, wandb]")
    check_settings(config)
    monkeypatch.delitem(sys.modules, "fqgan_dist.telemetry.sinks.wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)  # imports of it fail
    with pytest.raises(ConfigError, match=r"telemetry\.sinks: 'wandb' needs the package 'wandb'"):
        check_settings(config)

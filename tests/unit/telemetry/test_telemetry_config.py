from __future__ import annotations

import pytest
from pydantic import ValidationError

from fqgan_dist.telemetry.config import TelemetryConfig


def test_tensorboard_is_on_unless_told_otherwise() -> None:
    assert TelemetryConfig().sinks == ("tensorboard",)
    assert TelemetryConfig.model_validate({"sinks": []}).sinks == ()


def test_an_unknown_sink_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ValidationError, match=r"'tensorbord' is no sink; did you mean 'tensorboard'"
    ):
        TelemetryConfig.model_validate({"sinks": ["tensorbord"]})


def test_a_sink_that_is_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="wandb is named twice; name each once"):
        TelemetryConfig.model_validate({"sinks": ["wandb", "mlflow", "wandb"]})

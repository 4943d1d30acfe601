from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fqgan_dist.errors import ConfigError
from fqgan_dist.weights.config import WeightsConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "weights.bin"}, "no weights source"),
        ({"source": "s3://key:secret@bucket/a.safetensors"}, "holds credentials"),
        ({"source": "random", "sha256": "0" * 64}, "no file to check"),
        ({"source": "hub", "seed": 3}, "has no effect"),
        ({"source": "hub", "sha256": "xyz"}, "pattern"),
    ],
)
def test_settings_without_sense_are_refused(values: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        WeightsConfig.model_validate(values)


def test_error_does_not_show_credentials():
    with pytest.raises(ValidationError) as caught:
        WeightsConfig(source="s3://key:secret@bucket/a.safetensors")
    assert "secret" not in caught.value.errors()[0]["msg"]


def test_find_file(tmp_path: Path):
    assert WeightsConfig(source="a/b.safetensors").find_file(None) == Path("a/b.safetensors")
    remote = WeightsConfig(source="s3://bucket/b.safetensors")
    assert remote.find_file(tmp_path / "b.safetensors") == tmp_path / "b.safetensors"
    with pytest.raises(ConfigError, match="stage it first"):
        remote.find_file(None)


def test_a_file_of_a_known_hash_may_be_moved():
    here, there = (
        WeightsConfig(source=f"{folder}/a.safetensors", sha256="0" * 64) for folder in ("a", "b")
    )
    assert here.identity() == there.identity()
    assert here.identity() != WeightsConfig(source="a/a.safetensors").identity()

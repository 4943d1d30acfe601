from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from support.small_s3 import run_small_s3, set_credentials
from torch import nn

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.weights.config import WeightsConfig
from fqgan_dist.weights.files import save_safetensors
from fqgan_dist.weights.staging import load_initial_weights, resolve_weights


@pytest.mark.parametrize("source", ["hub", "random"])
def test_what_is_no_file_has_no_place(source: str) -> None:
    assert resolve_weights(WeightsConfig(source=source), field="x") is None


def test_a_local_file_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.touch()
    assert resolve_weights(WeightsConfig(source=str(path)), field="x") == path


def test_a_missing_file_is_named_with_its_setting(tmp_path: Path) -> None:
    weights = WeightsConfig(source=str(tmp_path / "a.safetensors"))
    with pytest.raises(ConfigError, match=r"^tokenizer\.init_from\.source: '.*': no such file"):
        resolve_weights(weights, field="tokenizer.init_from")


def test_an_object_is_copied_under_the_hash_of_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with run_small_s3() as server:
        server.objects["/bucket/a.safetensors"] = b"weights"
        set_credentials(monkeypatch, server.endpoint)
        weights = WeightsConfig(source="s3://bucket/a.safetensors")
        path = resolve_weights(weights, field="x")
        with pytest.raises(ConfigError, match=r"x\.source: 's3://bucket/b.*': no such object"):
            resolve_weights(WeightsConfig(source="s3://bucket/b.safetensors"), field="x")
    assert path is not None
    assert path.read_bytes() == b"weights"
    assert path.stem == hashlib.sha256(b"weights").hexdigest()
    assert path.is_relative_to(tmp_path / "cache")


def test_a_module_starts_from_the_weights_of_a_file(tmp_path: Path) -> None:
    source, path = nn.Linear(3, 2), tmp_path / "a.safetensors"
    sha256 = save_safetensors(path, source.state_dict())
    module = nn.Linear(3, 2)
    load_initial_weights(module, WeightsConfig(source=str(path), sha256=sha256), field="x")
    assert torch.equal(module.weight, source.weight)
    with pytest.raises(DataError, match="sha256 is"):
        load_initial_weights(module, WeightsConfig(source=str(path), sha256="0" * 64), field="x")
    with pytest.raises(DataError, match=r"x: .*a\.safetensors: not the weights of the configured"):
        load_initial_weights(nn.Linear(4, 2), WeightsConfig(source=str(path)), field="x")


def test_without_a_file_a_module_stays_as_it_is() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    load_initial_weights(module, None, field="x")
    assert torch.equal(module.weight, before)

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.weights import (
    WeightsConfig,
    draw_normal,
    hash_tensors,
    load_into,
    load_safetensors_checked,
    load_torch_checked,
    save_safetensors,
)


def make_tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2), "n": torch.tensor(3)}


def test_file_round_trip_with_its_sha256(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    sha256 = save_safetensors(path, make_tensors())
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_safetensors_checked(path, sha256)
    assert hash_tensors(loaded) == hash_tensors(make_tensors())


def test_other_bytes_are_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    sha256 = save_safetensors(path, make_tensors())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"expected {sha256}"):
        load_safetensors_checked(path, sha256)


def test_a_truncated_or_missing_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, make_tensors())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="not a safetensors file"):
        load_safetensors_checked(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_safetensors_checked(tmp_path / "absent.safetensors")


class _Trap:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_executed(tmp_path: Path):
    trace = tmp_path / "executed"
    torch.save({"weight": _Trap(trace)}, tmp_path / "hostile.pth")
    with pytest.raises(DataError, match="not a file of plain tensors"):
        load_torch_checked(tmp_path / "hostile.pth")
    (tmp_path / "hostile.safetensors").write_bytes(pickle.dumps(_Trap(trace)))
    with pytest.raises(DataError, match="not a safetensors file"):
        load_safetensors_checked(tmp_path / "hostile.safetensors")
    assert not trace.exists()


def test_a_torch_file_of_tensors_is_read(tmp_path: Path):
    torch.save(make_tensors(), tmp_path / "a.pth")
    assert hash_tensors(load_torch_checked(tmp_path / "a.pth")) == hash_tensors(make_tensors())
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(DataError, match="expected tensors by name"):
        load_torch_checked(tmp_path / "b.pth")


def test_load_into_names_every_difference():
    network = nn.Linear(3, 2)
    tensors = {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    with pytest.raises(
        DataError,
        match=r"x\.safetensors: .*missing \(bias\).*unknown \(extra\).*weight is \(3, 2\)",
    ):
        load_into(network, tensors, source="x.safetensors")


def test_load_into_copies():
    network = nn.Linear(3, 2)
    load_into(network, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, source="x")
    assert torch.equal(network.weight, torch.ones(2, 3))


def test_hash_covers_names_values_shapes_and_types():
    base = {"a": torch.arange(4.0)}
    others = [
        {"b": torch.arange(4.0)},
        {"a": torch.arange(4.0) + 1e-6},
        {"a": torch.arange(4.0).reshape(2, 2)},
        {"a": torch.arange(4.0).double()},
    ]
    hashes = {hash_tensors(tensors) for tensors in [base, *others]}
    assert len(hashes) == 5
    assert hash_tensors({"a": torch.arange(8.0)[::2] / 2}) == hash_tensors(base)


def test_drawn_numbers_are_normal_and_keyed():
    numbers = draw_normal((100, 200), 0, "a")
    assert torch.equal(numbers, draw_normal((100, 200), 0, "a"))
    assert not torch.equal(numbers, draw_normal((100, 200), 1, "a"))
    assert abs(numbers.mean().item()) < 0.03
    assert abs(numbers.std().item() - 1) < 0.03


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

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from fqgan_dist.errors import CheckpointError, DataError
from fqgan_dist.tokenizer.published import read_published_file
from fqgan_dist.weights.files import (
    load_safetensors_checked,
    load_torch_checked,
    parse_safetensors,
    save_safetensors,
)
from fqgan_dist.weights.tensors import hash_tensors


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


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4"])
def test_numbers_of_a_kind_that_torch_lacks_are_named(dtype: str) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2]}})
    size = 1 if dtype == "F4" else 2
    header = header.replace("[0, 2]", f"[0, {size}]")
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(size)
    with pytest.raises(ValueError, match=f"dtype '{dtype}', which torch has not"):
        parse_safetensors(data)


@pytest.mark.parametrize(
    "pickled",
    [b"\x80\x02h\x07.", b"\x80\x02}q\0X\x02\0\0\0\xff\xfe.", b"\x80\x020.", b"\x80\x02)R.", b""],
    ids=["KeyError", "UnicodeDecodeError", "IndexError", "TypeError", "EOFError"],
)
def test_a_damaged_pickle_is_named_whatever_its_reader_raises(
    tmp_path: Path, pickled: bytes
) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", data)
    with pytest.raises(DataError, match="not a file of plain tensors"):
        load_torch_checked(path)
    with pytest.raises(CheckpointError, match="cannot be read as a released model"):
        read_published_file(path)


def test_tensors_have_names(tmp_path: Path) -> None:
    torch.save({"model": {1: torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_published_file(tmp_path / "a.pt")
    torch.save({1: torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="expected tensors by name"):
        load_torch_checked(tmp_path / "a.pth")

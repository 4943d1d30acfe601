from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

NAME = r"x/f/chunk-000003\.safetensors"


def test_tensors_come_back_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    files = TensorFiles(Storage(tmp_path), "x", "f")
    files.write(3, {"codes": torch.arange(4)})
    tensors = files.read(3)
    assert torch.equal(tensors["codes"], torch.arange(4))
    assert "labels" not in tensors
    with pytest.raises(DataError, match=rf"{NAME}: has no tensor 'labels', only \['codes'\]"):
        _ = tensors["labels"]


def test_a_missing_or_damaged_chunk_is_named(tmp_path: Path) -> None:
    files = TensorFiles(Storage(tmp_path), "x", "f")
    with pytest.raises(DataError, match=f"{NAME}: no such file"):
        files.read(3)
    files.write(3, {"codes": torch.arange(4)})
    path = tmp_path / "x" / "f" / "chunk-000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{NAME}: not a safetensors file"):
        files.read(3)

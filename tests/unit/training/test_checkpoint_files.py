from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.file_images import write_images
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training import checkpoint_files
from fqgan_dist.training.checkpoint_files import Fragment, HostStaging
from fqgan_dist.training.checkpoint_format import FileRecord, Needs
from fqgan_dist.training.checkpoint_reading import (
    CheckpointFolder,
    ReadCounter,
    find_damage,
    read_tensors,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def _random(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Draw random bits, so that NaNs, denormals and extremes are among the values."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    width = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 256, (*shape, width), dtype=torch.uint8)
    return bits.view(dtype).view(shape)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    left, right = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def _folder(storage: Storage) -> CheckpointFolder:
    return CheckpointFolder(storage, "step", ReadCounter())


def _read(
    storage: Storage, files: list[FileRecord], needs: Needs | None = None
) -> dict[str, Tensor]:
    """Read tensors whole, without those that are not needed."""
    found = read_tensors(_folder(storage), files, needs)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _round_trip(storage: Storage, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    files = write_images(storage, "step", HostStaging(0).copy({"part": tensors}))
    return _read(storage, files)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7)])
def test_every_dtype_and_shape_loads_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensor = _random(dtype, shape)
    assert _same_bits(_round_trip(Storage(tmp_path), {"x": tensor})["x"], tensor)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text("abc._é", min_size=1, max_size=6),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=8,
    )
)
def test_any_mixture_of_tensors_loads_and_the_library_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    tensors = {name: _random(dtype, tuple(shape)) for name, (dtype, shape) in contents.items()}
    loaded = _round_trip(Storage(folder), tensors)
    assert loaded.keys() == tensors.keys()
    assert all(_same_bits(loaded[name], tensors[name]) for name in tensors)
    files = list(folder.glob("step/*.safetensors"))
    assert len(files) == (1 if tensors else 0)
    for file in files:
        by_library = safetensors.torch.load_file(file)
        assert all(_same_bits(by_library[name], tensors[name]) for name in tensors)


def test_strided_transposed_and_shared_tensors_load_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "s": base[:, ::2], "a": base, "b": base}
    loaded = _round_trip(Storage(tmp_path), tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_parameter_that_needs_gradients_is_stored_detached(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not _round_trip(Storage(tmp_path), {"p": parameter})["p"].requires_grad


def test_changes_after_the_copy_do_not_reach_the_files(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    images = HostStaging(0).copy({"part": {"x": tensor}})
    tensor.zero_()
    files = write_images(Storage(tmp_path), "step", images)
    assert _read(Storage(tmp_path), files)["x"].tolist() == [1, 1, 1, 1]


def test_staging_is_reused_until_a_layout_changes() -> None:
    staging = HostStaging(0)
    first = staging.copy({"part": {"x": torch.ones(4)}})
    second = staging.copy({"part": {"x": torch.zeros(4)}})
    third = staging.copy({"part": {"x": torch.zeros(4, dtype=torch.int32)}})
    assert first[0] is second[0]
    assert third[0] is not second[0]


def test_large_parts_are_split_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "_MAX_FILE_BYTES", 64)
    tensors = {f"t{index}": torch.full((index,), float(index)) for index in range(1, 25)}
    storage = Storage(tmp_path)
    files = write_images(storage, "step", HostStaging(3).copy({"part": tensors}))
    assert len(files) > 10
    assert files[0].file == "part.rank-00003.00000.safetensors"
    loaded = _read(storage, files)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_only_files_that_hold_wanted_tensors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "_MAX_FILE_BYTES", 16)
    storage = Storage(tmp_path)
    tensors = {name: torch.full((4,), float(index)) for index, name in enumerate("abc")}
    files = write_images(storage, "step", HostStaging(0).copy({"part": tensors}))
    storage.delete(f"step/{files[0].file}")
    assert _read(storage, files, {"b": None}).keys() == {"b"}
    with pytest.raises(CheckpointError, match="missing"):
        _read(storage, files, {"a": None})


def test_every_damage_is_reported_by_file(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    parts = {name: {"x": torch.ones(8)} for name in ("flipped", "short", "long", "gone", "good")}
    files = write_images(storage, "step", HostStaging(0).copy(parts))
    paths = {file.part: tmp_path / "step" / file.file for file in files}
    data = bytearray(paths["flipped"].read_bytes())
    data[-1] ^= 0x80
    paths["flipped"].write_bytes(data)
    paths["short"].write_bytes(paths["short"].read_bytes()[:-1])
    paths["long"].write_bytes(paths["long"].read_bytes() + b"\0")
    paths["gone"].unlink()
    problems = find_damage(_folder(storage), files)
    assert len(problems) == 4
    for problem, part, words in zip(
        problems,
        ("flipped", "short", "long", "gone"),
        ("sha256", "bytes where", "bytes where", "missing"),
        strict=True,
    ):
        assert str(paths[part]) in problem
        assert words in problem


def test_a_part_that_leads_elsewhere_or_never_ends_is_damage(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "run")
    parts = {name: {"x": torch.ones(8)} for name in ("device", "pipe", "outside", "endless")}
    files = write_images(storage, "step", HostStaging(0).copy(parts))
    paths = {file.part: tmp_path / "run" / "step" / file.file for file in files}
    paths["outside"].rename(tmp_path / "x")
    paths["outside"].symlink_to(tmp_path / "x")
    for part in ("device", "pipe"):
        paths[part].unlink()
    paths["device"].symlink_to("/dev/zero")
    os.mkfifo(paths["pipe"])
    os.truncate(paths["endless"], 2**42)
    problems = find_damage(_folder(storage), files)
    for problem, file, words in zip(
        problems,
        files,
        ("leads out", "a device, pipe", "leads out", f"{2**42} bytes where"),
        strict=True,
    ):
        assert str(paths[file.part]) in problem
        assert words in problem
        with pytest.raises(CheckpointError, match=r"leads out|a device, pipe|bytes where"):
            _read(storage, [file])


def test_a_dtype_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor 'x': dtype torch.complex64 cannot be stored"):
        HostStaging(0).copy({"part": {"x": torch.zeros(2, dtype=torch.complex64)}})


@pytest.mark.parametrize(("numel", "start"), [(5, 0), (3, 2), (1, -1)])
def test_a_fragment_outside_its_tensor_is_refused(numel: int, start: int) -> None:
    with pytest.raises(ValueError, match="inside the 4 elements"):
        Fragment(torch.zeros(numel), start=start, shape=(2, 2))


def test_a_fragment_that_is_not_flat_is_refused() -> None:
    with pytest.raises(ValueError, match="flat"):
        Fragment(torch.zeros(2, 2), start=0, shape=(2, 2))


def test_a_tensor_of_another_shape_than_its_record_is_refused(tmp_path: Path) -> None:
    images = HostStaging(0).copy({"weights": {"a": Fragment(torch.ones(6), 0, (2, 3))}})
    (record,) = write_images(Storage(tmp_path), "step", images)
    data = safetensors.torch.save({"a": torch.ones(2, 3)})
    (tmp_path / "step" / record.file).write_bytes(data)
    # As of format 1, where the file itself says what is in it.
    changed = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "blocks": None}
    with pytest.raises(CheckpointError, match="other tensors than its manifest says"):
        _read(Storage(tmp_path), [record.model_copy(update=changed)])

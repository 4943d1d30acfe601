from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counted_reads import CountedReads, count_reads
from support.file_images import write_images
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.training import (
    checkpoint_files,
    checkpoint_format,
    checkpoint_reading,
    checkpoint_transfer,
)
from fqgan_dist.training.checkpoint_files import Fragment, HostStaging
from fqgan_dist.training.checkpoint_format import FileRecord, Needs, Span
from fqgan_dist.training.checkpoint_reading import (
    CheckpointFolder,
    DamagedCheckpointError,
    ReadCounter,
    find_damage,
    read_tensors,
)

WIDTHS = {torch.float32: 4, torch.bfloat16: 2, torch.float64: 8, torch.bool: 1}


class Written:
    """A part that some ranks wrote: each tensor whole by one, or cut at random between them."""

    def __init__(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        ranks: list[dict[str, Any]],
        block_bytes: int,
    ) -> None:
        monkeypatch.setattr(checkpoint_transfer, "_BLOCK_BYTES", block_bytes)
        self.storage, self.counted = count_reads(root)
        self.root = root
        self.files: list[FileRecord] = []
        for rank, tensors in enumerate(ranks):
            images = HostStaging(rank).copy({"part": tensors})
            self.files += write_images(self.storage, "step", images)

    @property
    def folder(self) -> CheckpointFolder:
        return CheckpointFolder(self.storage, "step", ReadCounter())

    def read(self, needs: Needs | None) -> dict[str, Tensor | Fragment]:
        self.counted.reads.clear()
        return read_tensors(self.folder, self.files, needs)

    def flip(self, file: FileRecord, position: int) -> Path:
        path = self.root / "step" / file.file
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)
        return path

    def without_blocks(self) -> None:
        """Describe the files as format 1 does."""
        self.files = [
            file.model_copy(
                update={
                    "blocks": None,
                    "sha256": hashlib.sha256(
                        (self.root / "step" / file.file).read_bytes()
                    ).hexdigest(),
                    "tensors": {
                        name: record.model_copy(update={"offset": None})
                        for name, record in file.tensors.items()
                    },
                }
            )
            for file in self.files
        ]


def touched_bytes(written: Written, needs: Needs) -> int:
    """Count the bytes of the blocks that needs touch, by the headers that the library wrote."""
    total = 0
    for file in written.files:
        assert file.blocks is not None
        data = (written.root / "step" / file.file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        blocks: set[int] = set()
        for name, entry in header.items():
            record = file.tensors[name]
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            width = (end - begin) // max(1, record.count)
            here = record.start or 0
            span = needs.get(name, Span(0, 0)) or Span(here, record.count)
            elements = range(
                max(here, span.start), min(here + record.count, span.start + span.count)
            )
            for element in elements:
                first = begin + (element - here) * width
                blocks |= {byte // file.blocks.bytes for byte in range(first, first + width)}
        total += sum(
            min(file.bytes, (block + 1) * file.blocks.bytes) - block * file.blocks.bytes
            for block in blocks
        )
    return total


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Tensor], Needs]:
    """Draw what up to three ranks own of some tensors, the whole tensors, and what is needed."""
    num_ranks = draw(st.integers(1, 3))
    ranks: list[dict[str, Any]] = [{} for _ in range(num_ranks)]
    whole: dict[str, Tensor] = {}
    needs: dict[str, Span | None] = {}
    for name in draw(st.lists(st.sampled_from("abcdef"), unique=True)):
        shape = draw(st.lists(st.integers(0, 7), max_size=2))
        dtype = draw(st.sampled_from(list(WIDTHS)))
        size = torch.Size(shape).numel()
        tensor = (torch.rand(shape) * 100).to(dtype)
        whole[name] = tensor
        cuts = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))
        if draw(st.booleans()) and size:
            for rank, (start, end) in enumerate(
                zip([0, *cuts[: num_ranks - 1]], [*cuts[: num_ranks - 1], size], strict=True)
            ):
                ranks[rank][name] = Fragment(tensor.reshape(-1)[start:end], start, tuple(shape))
        else:
            ranks[draw(st.integers(0, num_ranks - 1))][name] = tensor
        match draw(st.sampled_from(["nothing", "all", "some"])):
            case "all":
                needs[name] = None
            case "some":
                begin, end = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
                needs[name] = Span(begin, end - begin)
    return ranks, whole, needs


@settings(max_examples=25, deadline=None)
@given(parts(), st.integers(1, 90), st.sampled_from([1, 50, 10**9]))
def test_what_is_needed_is_read_once_by_blocks_and_no_more(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[list[dict[str, Any]], dict[str, Tensor], Needs],
    block_bytes: int,
    range_bytes: int,
) -> None:
    ranks, whole, needs = drawn
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(checkpoint_reading, "_MAX_LOCAL_RANGE_BYTES", range_bytes)
        written = Written(tmp_path_factory.mktemp("x"), monkeypatch, ranks, block_bytes)
        found = written.read(needs)
    assert found.keys() == whole.keys()
    for name, value in found.items():
        span = needs.get(name, Span(0, 0))
        if span is None:
            assert isinstance(value, Tensor)
            assert value.dtype == whole[name].dtype
            assert torch.equal(value, whole[name])
        else:
            assert isinstance(value, Fragment)
            assert (value.start, value.shape) == (span.start, tuple(whole[name].shape))
            expected = whole[name].reshape(-1)[span.start : span.start + span.count]
            assert value.tensor.dtype == expected.dtype
            assert torch.equal(value.tensor, expected)
    assert written.counted.num_bytes() == touched_bytes(written, needs)
    assert is_disjoint(written.counted)


def is_disjoint(counted: CountedReads) -> bool:
    seen: set[tuple[str, int]] = set()
    for uri, start, length in counted.reads:
        read = {(uri, position) for position in range(start, start + length)}
        if seen & read:
            return False
        seen |= read
    return True


def test_damage_matters_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Written(tmp_path, monkeypatch, [{"a": torch.arange(1000.0)}], 256)
    (file,) = written.files
    offset = file.tensors["a"].offset
    assert offset is not None
    path = written.flip(file, offset + 4 * 500)
    block = (offset + 4 * 500) // 256
    part = written.read({"a": Span(0, 400)})["a"]
    assert isinstance(part, Fragment)
    assert torch.equal(part.tensor, torch.arange(400.0))
    with pytest.raises(DamagedCheckpointError, match=f"{path}: damaged, bytes {256 * block} to "):
        written.read({"a": Span(490, 20)})
    (problem,) = find_damage(written.folder, written.files)
    assert f"bytes {256 * block} to {256 * block + 255}: their sha256" in problem


@pytest.mark.parametrize("position", [0, 7, 40, 100, -1])
def test_a_whole_check_finds_a_flipped_bit_anywhere(
    position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(tmp_path, monkeypatch, [{"a": torch.arange(100.0)}], 64)
    assert find_damage(written.folder, written.files) == []
    path = written.flip(written.files[0], position)
    (problem,) = find_damage(written.folder, written.files)
    assert str(path) in problem


def test_files_without_hashes_of_blocks_are_read_and_verified_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_files, "_MAX_FILE_BYTES", 400)
    tensors = {name: torch.rand(100) for name in "abc"}
    written = Written(tmp_path, monkeypatch, [tensors], 64)
    written.without_blocks()
    found = written.read({"b": Span(10, 5)})
    part = found["b"]
    assert isinstance(part, Fragment)
    assert torch.equal(part.tensor, tensors["b"][10:15])
    assert written.counted.num_bytes() == written.files[1].bytes
    assert find_damage(written.folder, written.files) == []
    path = written.flip(written.files[1], -1)
    with pytest.raises(DamagedCheckpointError, match=f"{path}: damaged, its sha256 is not"):
        written.read({"b": Span(10, 5)})
    assert len(find_damage(written.folder, written.files)) == 1


def test_a_save_hashes_each_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the bytes of the files, 32 for each block: their hashes are hashed for the file's."""
    hashed: list[int] = []

    class Counting:
        def sha256(self, data: bytes) -> Any:
            hashed.append(len(data))
            return hashlib.sha256(data)

    monkeypatch.setattr(checkpoint_format, "hashlib", Counting())
    written = Written(tmp_path, monkeypatch, [{"a": torch.rand(1000), "b": torch.rand(70)}], 512)
    sizes = [file.bytes for file in written.files]
    num_blocks = sum(-(-size // 512) for size in sizes)
    # The record is checked where it is made: the hashes of the blocks once more.
    assert sum(hashed) == sum(sizes) + 2 * 32 * num_blocks


def test_a_span_outside_its_tensor_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(tmp_path, monkeypatch, [{"a": torch.rand(10)}], 64)
    with pytest.raises(ValueError, match="of tensor 'a', which has 10 elements"):
        written.read({"a": Span(8, 3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F8_E8M0"}, "dtype 'F8_E8M0'; expected one of"),
        ({"offset": 10**9}, "does not lie within its file"),
        ({"count": 10**12, "shape": [10**12]}, "does not lie within its file"),
    ],
)
def test_a_manifest_that_its_files_cannot_bear_out_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written(tmp_path, monkeypatch, [{"a": torch.rand(10)}], 64)
    (file,) = written.files
    record = file.tensors["a"].model_copy(update=change)
    written.files = [file.model_copy(update={"tensors": {"a": record}})]
    with pytest.raises(CheckpointError, match=message):
        written.read(None)

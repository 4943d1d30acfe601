from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fqgan_dist.errors import CheckpointError
from fqgan_dist.training.checkpoint_format import (
    FileRecord,
    RankReport,
    TensorRecord,
    check_parts,
    hash_blocks,
    merge_reports,
    parse_manifest,
)

ATTEMPT = "a" * 32


def _file(name: str = "w.safetensors", **tensors: TensorRecord) -> FileRecord:
    return FileRecord(file=name, part="weights", bytes=1, sha256="0" * 64, tensors=tensors)


def _whole(shape: list[int], dtype: str = "F32", count: int | None = None) -> TensorRecord:
    size = 1
    for length in shape:
        size *= length
    return TensorRecord(dtype=dtype, shape=shape, count=size if count is None else count)


def _piece(start: int, count: int, shape: list[int]) -> TensorRecord:
    return TensorRecord(dtype="F32", shape=shape, start=start, count=count)


def _report(rank: int, /, **changes: Any) -> RankReport:
    values = {
        "step": 5,
        "attempt": ATTEMPT,
        "rank": rank,
        "world_size": 2,
        "parts": ["weights"],
        "files": [_file(f"w.{rank}", **{f"t{rank}": _whole([2])})],
    }
    return RankReport.model_validate(values | changes)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.randoms())
def test_any_cut_into_fragments_is_whole_in_any_order(counts: list[int], random: Any) -> None:
    shape = [sum(counts)]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    files = [_file(t=_piece(s, c, shape)) for s, c in zip(starts, counts, strict=True)]
    random.shuffle(files)
    check_parts(files, "here")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([_file(t=_whole([2])), _file(t=_whole([2]))], "written by 2 ranks"),
        ([_file(t=_whole([2])), _file(t=_piece(0, 2, [2]))], "written by 2 ranks"),
        ([_file(t=_whole([2])), _file(t=_whole([3]))], "disagree"),
        ([_file(t=_whole([2])), _file(t=_whole([2], "F16"))], "disagree"),
        ([_file(t=_whole([2], count=1))], "has 1 of 2 elements"),
        ([_file(t=_piece(0, 2, [5])), _file(t=_piece(3, 2, [5]))], "gap or overlap"),
        ([_file(t=_piece(0, 3, [5])), _file(t=_piece(2, 3, [5]))], "gap or overlap"),
        ([_file(t=_piece(0, 2, [5])), _file(t=_piece(2, 2, [5]))], "cover 4 of 5"),
        ([_file(t=_piece(1, 4, [5]))], "gap or overlap"),
    ],
)
def test_a_tensor_that_is_not_there_exactly_once_is_named(
    files: list[FileRecord], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"here: part 'weights', tensor 't': .*{message}"):
        check_parts(files, "here")


def _hashed(block_bytes: int = 4, **changes: Any) -> FileRecord:
    """A file of ten bytes whose tensor lies at its end."""
    blocks = hash_blocks(b"0123456789", block_bytes)
    record = _whole([1]).model_copy(update={"offset": 6})
    values = {
        "file": "w.safetensors",
        "part": "weights",
        "bytes": 10,
        "sha256": blocks.root(),
        "blocks": blocks,
        "tensors": {"t": record},
    }
    return FileRecord.model_validate(values | changes)


def test_blocks_are_hashed_one_by_one_and_their_hashes_together() -> None:
    blocks = hash_blocks(b"0123456789", 4)
    hashes = [hashlib.sha256(data).digest() for data in (b"0123", b"4567", b"89")]
    assert [blocks.of(number) for number in range(blocks.count)] == [h.hex() for h in hashes]
    assert _hashed().sha256 == hashlib.sha256(b"".join(hashes)).hexdigest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes": 13}, "has 3 hashes of blocks, expected 4"),
        ({"bytes": 8}, "has 3 hashes of blocks, expected 2"),
        ({"sha256": "0" * 64}, "not that of its blocks' hashes"),
        ({"tensors": {"t": _whole([1])}}, "does not say where its tensors lie"),
        ({"blocks": {"bytes": 4, "sha256": "0" * 63}}, "should match pattern"),
        ({"blocks": {"bytes": 2**24 + 1, "sha256": "0" * 64}}, "less than or equal to 16777216"),
    ],
)
def test_hashes_of_blocks_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        _hashed(**changes)


@pytest.mark.parametrize(("version", "file"), [(1, _hashed()), (2, _file(t=_whole([2])))])
def test_files_of_another_format_than_their_manifest_s_are_refused(
    version: int, file: FileRecord
) -> None:
    values: dict[str, Any] = {
        "format": version,
        "step": 1,
        "attempt": ATTEMPT,
        "world_size": 1,
        "dataset_id": "d",
        "config": {},
        "state": {},
        "metrics": {},
        "parts": ["weights"],
        "files": [file.model_dump()],
    }
    with pytest.raises(CheckpointError, match=f"format {version}: w.safetensors is of another one"):
        parse_manifest(json.dumps(values).encode(), "here")
    parse_manifest(json.dumps(values | {"format": 3 - version}).encode(), "here")


def test_a_hostile_list_has_one_error() -> None:
    with pytest.raises(ValidationError) as caught:
        _report(0, files=[0] * 1000)
    assert caught.value.error_count() == 1


def test_reports_of_all_ranks_become_one_list_of_files() -> None:
    parts, files = merge_reports([_report(0), _report(1, parts=["weights", "ema"])], "here")
    assert parts == ["ema", "weights"]
    assert [file.file for file in files] == ["w.0", "w.1"]


@pytest.mark.parametrize(
    "change", [{"step": 6}, {"attempt": "b" * 32}, {"rank": 0}, {"world_size": 3}]
)
def test_a_report_of_another_checkpoint_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="report of rank 1"):
        merge_reports([_report(0), _report(1, **change)], "here")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "", "a\0b", "x" * 201]
)
def test_a_file_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="file"):
        _file(name)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format": 2}', b'{"format": 3}', b"\xff"])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="here: not a checkpoint manifest"):
        parse_manifest(data, "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 2**63},
        {"shape": [10**400, 10**400]},
        {"shape": [1] * 100_000},
        {"start": -1},
    ],
)
def test_numbers_that_no_tensor_has_are_refused(changes: dict[str, Any]) -> None:
    values = {"dtype": "F32", "shape": [2], "start": None, "count": 2}
    with pytest.raises(ValidationError):
        TensorRecord.model_validate(values | changes)

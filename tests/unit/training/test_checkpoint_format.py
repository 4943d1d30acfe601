from __future__ import annotations

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


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format": 2}', b"\xff"])
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

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.commit_log import (
    CommitLog,
    CommitRecord,
    LogWriter,
    PruneRecord,
    StartRecord,
    seal,
    unseal,
    utc_now,
)

OLD, NEW, THIRD = "a" * 32, "b" * 32, "c" * 32


@pytest.fixture
def log(tmp_path: Path) -> CommitLog:
    return CommitLog(Storage(tmp_path))


def _commit(attempt: str, step: int = 1):
    def build(number: int) -> CommitRecord:
        return CommitRecord(
            number=number,
            attempt=attempt,
            parent=None,
            step=step,
            manifest_sha256="0" * 64,
            written_at=utc_now(),
        )

    return build


def _maintenance(number: int) -> PruneRecord:
    return PruneRecord(number=number, attempt=None, removed=[], written_at=utc_now())


def test_an_attempt_starts_with_a_record_and_numbers_rise_by_one(log: CommitLog) -> None:
    writer = LogWriter(log, OLD)
    assert [writer.append(_commit(OLD, step)).number for step in (5, 6)] == [2, 3]
    kinds = [(number, log.read(number).kind) for number in log.numbers()]
    assert kinds == [(1, "start"), (2, "commit"), (3, "commit")]


def test_records_read_back_equal_in_another_process_view(log: CommitLog, tmp_path: Path) -> None:
    record = LogWriter(log, OLD).append(_commit(OLD))
    assert CommitLog(Storage(tmp_path)).read(2) == record


def test_an_older_attempt_stops_for_good_and_names_the_newer(log: CommitLog) -> None:
    old = LogWriter(log, OLD)
    old.append(_commit(OLD))
    LogWriter(log, NEW)
    for _ in range(3):
        with pytest.raises(CheckpointError, match=f"{OLD} was superseded by the newer.*{NEW}"):
            old.append(_commit(OLD))
        with pytest.raises(CheckpointError, match="must stop"):
            old.raise_if_superseded()
    assert len(log.numbers()) == 3


def test_the_newest_of_three_attempts_is_the_one_that_commits(log: CommitLog) -> None:
    writers = {attempt: LogWriter(log, attempt) for attempt in (OLD, NEW, THIRD)}
    for attempt in (OLD, NEW):
        with pytest.raises(CheckpointError, match="superseded"):
            writers[attempt].append(_commit(attempt))
    assert writers[THIRD].append(_commit(THIRD)).number == 4


def test_a_prune_by_hand_does_not_stop_the_running_attempt(log: CommitLog) -> None:
    writer = LogWriter(log, OLD)
    log.create(_maintenance(2))
    log.create(_maintenance(3))
    writer.raise_if_superseded()
    assert writer.append(_commit(OLD)).number == 4


def test_a_start_that_loses_its_number_becomes_newer_than_the_winner(
    log: CommitLog, tmp_path: Path
) -> None:
    class Late(CommitLog):
        """Sees an empty log, as one that listed just before another attempt wrote."""

        def numbers(self) -> list[int]:
            return []

    old = LogWriter(log, OLD)
    old.append(_commit(OLD))
    writer = LogWriter(Late(Storage(tmp_path)), NEW)
    assert writer.start_number == 3
    with pytest.raises(CheckpointError, match=NEW):
        old.append(_commit(OLD))


def test_attempts_that_start_at_once_are_ordered_and_one_survives(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    committed: list[str] = []
    starts: list[int] = []

    def run(attempt: str) -> None:
        barrier.wait()
        writer = LogWriter(CommitLog(Storage(tmp_path)), attempt)
        starts.append(writer.start_number)
        barrier.wait()
        try:
            writer.append(_commit(attempt))
        except CheckpointError:
            return
        committed.append(attempt)

    threads = [threading.Thread(target=run, args=(f"{index:032x}",)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(starts) == list(range(1, 9))
    newest = CommitLog(Storage(tmp_path)).read(8)
    assert isinstance(newest, StartRecord)
    assert committed == [newest.attempt]


def test_losing_to_a_damaged_record_stops_the_attempt(log: CommitLog, tmp_path: Path) -> None:
    writer = LogWriter(log, OLD)
    (tmp_path / "commits/0000000002.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"cannot tell.*0000000002\.json"):
        writer.append(_commit(OLD))


@pytest.mark.parametrize("position", range(0, 200, 7))
def test_a_flipped_bit_in_a_record_is_found(position: int, log: CommitLog, tmp_path: Path) -> None:
    LogWriter(log, OLD).append(_commit(OLD))
    path = tmp_path / "commits/0000000002.json"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"0000000002\.json"):
        CommitLog(Storage(tmp_path)).read(2)


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[1]", b"{}", b'{"content":{},"sha256":1}', b"\xff"]
)
def test_what_is_no_sealed_document_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="the/file: damaged"):
        unseal(data, "the/file")


def test_a_record_copied_to_another_number_is_refused(log: CommitLog, tmp_path: Path) -> None:
    LogWriter(log, OLD)
    folder = tmp_path / "commits"
    (folder / "0000000009.json").write_bytes((folder / "0000000001.json").read_bytes())
    with pytest.raises(CheckpointError, match="holds record 1"):
        log.read(9)


def test_a_well_sealed_document_of_another_kind_is_refused(log: CommitLog, tmp_path: Path) -> None:
    record = json.loads(seal(_maintenance(1)))["content"] | {"kind": "other"}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())
    (tmp_path / "commits").mkdir()
    sealed = json.dumps({"content": record, "sha256": digest.hexdigest()})
    (tmp_path / "commits/0000000001.json").write_text(sealed)
    with pytest.raises(CheckpointError, match="not a log record"):
        log.read(1)


def test_foreign_files_in_the_folder_are_no_records(log: CommitLog, tmp_path: Path) -> None:
    LogWriter(log, OLD)
    (tmp_path / "commits/notes.txt").write_text("mine")
    (tmp_path / "commits/0000000007.json.bak").write_text("mine")
    assert log.numbers() == [1]


@pytest.mark.parametrize(
    "name",
    ["\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0667.json", "0000000007.json\n"],
)
def test_names_that_only_look_like_records_are_passed_over(
    log: CommitLog, tmp_path: Path, name: str
) -> None:
    LogWriter(log, OLD).append(_commit(OLD))
    (tmp_path / "commits" / name).write_bytes(b"x")
    assert CommitLog(Storage(tmp_path)).numbers() == [1, 2]

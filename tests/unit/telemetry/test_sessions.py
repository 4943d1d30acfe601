from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import parse_records
from fqgan_dist.telemetry.sessions import Session, SessionRecords

PATH = "toy/ledger.jsonl"


class Bucket(Storage):
    """A storage whose files cannot be written in place, kept in a folder."""

    def local_path(self, path: str) -> Path | None:
        return None


KINDS = [Storage, Bucket]


def session(number: int, step: int = 0) -> Session:
    return Session(number=number, attempt=f"a{number}", resumed_step=step)


_OPENED: list[SessionRecords] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close what a test leaves open, as a process that was killed does."""
    yield
    close_all()


def close_all() -> None:
    while _OPENED:
        _OPENED.pop().close()


def begin(storage: Storage, number: int, step: int = 0) -> SessionRecords:
    records = SessionRecords(storage, PATH)
    records.open(session(number, step))
    _OPENED.append(records)
    return records


def write(records: SessionRecords, steps: range, who: str) -> None:
    for step in steps:
        records.write({"step": step, "by": who})


def published(storage: Storage) -> list[tuple[int, str]]:
    found = parse_records(storage.read_bytes(PATH), name=PATH, kind="ledger")
    return [(record["step"], record["by"]) for record in found]


def snapshot(root: Path) -> dict[str, bytes]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


@contextmanager
def unchanged(root: Path, *, but_below: str) -> Iterator[None]:
    """Check that a block changes nothing, and makes nothing outside a folder."""
    before = snapshot(root)
    yield
    after = snapshot(root)
    own = f"toy/sessions/{but_below}/"
    assert {name: after.get(name) for name in before if not name.startswith(own)} == {
        name: data for name, data in before.items() if not name.startswith(own)
    }
    assert all(name.startswith(own) for name in after.keys() - before.keys())


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_file_equals_an_unbroken_one(kind: type[Storage], tmp_path: Path) -> None:
    storage = kind(tmp_path)
    killed = begin(storage, 1)
    write(killed, range(1, 5), "first")
    killed.flush()
    resumed = begin(storage, 4, step=2)
    assert resumed.num_records == 2
    write(resumed, range(3, 5), "second")
    resumed.flush()
    resumed.close()
    resumed.close()
    assert published(storage) == [(1, "first"), (2, "first"), (3, "second"), (4, "second")]
    killed.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sleeps_after", ["open", "write", "flush"])
def test_one_that_was_believed_dead_changes_nothing(
    kind: type[Storage], sleeps_after: str, tmp_path: Path
) -> None:
    storage = kind(tmp_path)
    old = session(1)
    sleeper = begin(storage, 1)
    if sleeps_after != "open":
        write(sleeper, range(1, 4), "sleeper")
    if sleeps_after == "flush":
        sleeper.flush()
    successor = begin(storage, 2)
    write(successor, range(1, 9), "successor")
    successor.flush()
    with unchanged(tmp_path, but_below=old.name):
        write(sleeper, range(4, 7), "sleeper")
        sleeper.flush()
        sleeper.close()
    write(successor, range(9, 10), "successor")
    successor.flush()
    assert published(storage) == [(step, "successor") for step in range(1, 10)]
    third = begin(storage, 3, step=9)
    assert third.num_records == 9
    third.flush()
    assert published(storage) == [(step, "successor") for step in range(1, 10)]


@pytest.mark.parametrize("method", ["create_bytes", "replace_bytes"])
def test_a_sleeper_that_wakes_between_two_calls_changes_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Bucket(tmp_path)
    sleeper = begin(storage, 2)
    if method == "replace_bytes":
        write(sleeper, range(1, 2), "sleeper")
        sleeper.flush()
    write(sleeper, range(2, 4), "sleeper")
    writes = dict.fromkeys((method, "write_bytes"))  # the second: what is not to be used

    def sleep_before(name: str) -> None:
        real: Callable[..., None] = getattr(storage, name)

        def write_after_sleep(path: str, data: bytes, **former: bytes) -> None:
            if path == PATH:
                for each, former_method in writes.items():
                    monkeypatch.setattr(storage, each, former_method)
                successor = begin(Bucket(tmp_path), 3)
                write(successor, range(1, 5), "successor")
                successor.flush()
            real(path, data, **former)

        writes[name] = real
        monkeypatch.setattr(storage, name, write_after_sleep)

    for name in list(writes):
        sleep_before(name)
    sleeper.flush()
    assert published(storage) == [(step, "successor") for step in (1, 2, 3, 4)]


def test_the_file_of_versions_before_is_continued(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    lines = "".join(f'{{"step": {step}, "by": "former"}}\n' for step in range(1, 6))
    storage.write_bytes(PATH, lines.encode())
    resumed = begin(storage, 7, step=3)
    write(resumed, range(4, 5), "now")
    resumed.flush()
    again = begin(storage, 9, step=3)
    again.flush()
    assert published(storage) == [(step, "former") for step in (1, 2, 3)]


def test_without_a_record_there_is_no_file_for_readers(tmp_path: Path) -> None:
    records = begin(Storage(tmp_path), 1)
    records.flush()
    records.close()
    assert not (tmp_path / PATH).exists()


def test_of_a_bucket_nothing_stays_on_the_local_disk(tmp_path: Path) -> None:
    records = SessionRecords(Bucket(tmp_path), PATH)
    local = records.open(session(1))
    write(records, range(1, 2), "first")
    assert not (tmp_path / "toy").exists()  # a kill now loses what was not published
    records.flush()
    records.close()
    assert not local.parent.exists()


@pytest.mark.parametrize(
    "damage", [b"\x00\xff", b'{"step": "x"}\n{"step": 2, "by": "first"}\n', b""]
)
def test_damage_is_named_left_out_and_stops_nothing(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(tmp_path)
    records = begin(storage, 1)
    write(records, range(1, 4), "first")
    records.flush()
    file = tmp_path / "toy/sessions" / session(1).name / "ledger.jsonl"
    file.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        resumed = begin(storage, 2, step=3)
    write(resumed, range(4, 5), "second")
    resumed.flush()
    expected = [(2, "first"), (4, "second")] if b"first" in damage else [(4, "second")]
    assert published(storage) == expected
    assert (str(file) in caplog.text) == (b"\n" in damage)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.booleans()), min_size=1, max_size=6)
)
def test_what_counts_is_what_one_writer_would_have_written(
    sessions: list[tuple[int, int, bool]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage, expected, sleepers = Storage(folder), [], []
        for number, (step, count, is_flushed) in enumerate(sessions, 1):
            records = begin(storage, number, step)
            expected = [each for each in expected if each[0] <= step]
            steps = range(step + 1, step + 1 + count)
            write(records, steps, f"a{number}")
            expected += [(each, f"a{number}") for each in steps]
            if is_flushed:
                records.flush()
            for sleeper in sleepers:
                sleeper.flush()
            sleepers.append(records)
        records.flush()
        assert (published(storage) if storage.exists(PATH) else []) == expected
        close_all()

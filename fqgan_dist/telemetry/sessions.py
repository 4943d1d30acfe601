"""Files of records that several attempts at one training write, one after another or at once.

    <stage>/sessions/<number>-from-<step>-<attempt>/metrics.jsonl   what one attempt recorded
    <stage>/metrics.jsonl                                           of all of them what counts

Every attempt has a file of its own, so a process that was believed dead and wakes up writes nothing
that its successor wrote or reads. What counts follows from the names alone: of every attempt what
it recorded up to the step from which the next one went on. The file for readers is made from these
before every checkpoint, and only an attempt that knows of no newer one writes it (design.md section
3, "Checkpoint").
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fqgan_dist.errors import DataError
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import JsonLinesWriter, read_lines
from fqgan_dist.telemetry.published import PublishedFolder

logger = logging.getLogger(__name__)

_FOLDER = "sessions"
_NAME = re.compile(r"([0-9]{10})-from-([0-9]{8,})-([0-9a-z]+)")
_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Session:
    """One attempt at a training, for what it writes beside checkpoints."""

    number: int
    """Position of its start in the commit log; newer attempts have larger ones."""
    attempt: str
    """Its id."""
    resumed_step: int
    """Steps done by former sessions; what they recorded later is void. 0 starts anew."""

    @property
    def name(self) -> str:
        return f"{self.number:010d}-from-{self.resumed_step:08d}-{self.attempt}"


class SessionRecords:
    """A file of JSON lines in the run's storage, which a resumed run continues."""

    def __init__(self, storage: Storage, path: str) -> None:
        """Name the file for readers, such as `tokenizer/metrics.jsonl`."""
        self._storage = storage
        self._path = path
        self._name = PurePosixPath(path).name
        self._folder = str(PurePosixPath(path).parent / _FOLDER)
        self._opened: _Opened | None = None

    def open(self, session: Session) -> Path:
        """Begin a session's own file, and return where it lies on the local disk."""
        self._adopt_former_file()
        former, published = self._read_former(session), self._read_published()
        folder = PublishedFolder(self._storage, f"{self._folder}/{session.name}")
        try:
            writer = JsonLinesWriter(folder.local / self._name)
        except BaseException:
            folder.close()
            raise
        self._opened = _Opened(
            session=session, folder=folder, writer=writer, former=former, published=published
        )
        return writer.path

    @property
    def num_records(self) -> int:
        """Records that count, of this session and those before it."""
        return len(self._at_hand.former) + self._at_hand.writer.num_records

    def write(self, record: Mapping[str, Any]) -> None:
        self._at_hand.writer.write(record)

    def flush(self) -> None:
        """Bring everything written so far to the disk, and from there to the storage."""
        self._at_hand.writer.flush()
        self._at_hand.folder.publish()
        self._publish()

    def close(self) -> None:
        """End the session; closing twice is harmless."""
        if self._opened is None:
            return
        opened, is_first = self._opened, not self._opened.is_closed
        opened.is_closed = True
        try:
            opened.writer.close()
            # In a bucket it may be the storage that ended training: who closes then does not wait.
            if is_first and self._storage.local_path(self._path) is not None:
                self._publish()
        finally:
            opened.folder.close()

    @property
    def _at_hand(self) -> _Opened:
        assert self._opened is not None, "not opened"
        return self._opened

    def _adopt_former_file(self) -> None:
        """Make a session of the one file that versions before had."""
        has_own_file = any(
            self._storage.exists(self._session_path(each)) for each in self._list_sessions()
        )
        if has_own_file or not self._storage.exists(self._path):
            return
        first = Session(number=0, attempt="former", resumed_step=0)
        with suppress(FileExistsError):
            data = read_document(self._storage, self._path)
            self._storage.create_bytes(f"{self._folder}/{first.name}/{self._name}", data)

    def _list_sessions(self) -> list[Session]:
        """List all sessions of the stage, oldest first."""
        matches = (_NAME.fullmatch(name) for name in self._storage.list(self._folder))
        sessions = [
            Session(number=int(match[1]), resumed_step=int(match[2]), attempt=match[3])
            for match in matches
            if match
        ]
        return sorted(sessions, key=lambda each: each.number)

    def _has_newer_session(self) -> bool:
        own = self._at_hand.session.number
        return any(each.number > own for each in self._list_sessions())

    def _session_path(self, session: Session) -> str:
        return f"{self._folder}/{session.name}/{self._name}"

    def _read_former(self, session: Session) -> list[bytes]:
        """Read the lines that count of all sessions before one."""
        former: list[tuple[int, bytes]] = []
        for each in self._list_sessions():
            if each.number >= session.number:
                break
            former = _cut(former, each.resumed_step) + self._read_session(each)
        return [line for _, line in _cut(former, session.resumed_step)]

    def _read_session(self, session: Session) -> list[tuple[int, bytes]]:
        # A record beside checkpoints never stops a run: what is damaged is named and left out.
        path = self._session_path(session)
        try:
            lines, problems = read_lines(
                read_document(self._storage, path), name=self._storage.uri(path)
            )
        except FileNotFoundError:
            return []  # it ended before it had published anything
        except DataError as error:
            lines, problems = [], [str(error)]
        for problem in problems:
            logger.warning("%s; left out of %s", problem, self._storage.uri(self._path))
        return lines

    def _read_published(self) -> bytes | None:
        try:
            return read_document(self._storage, self._path)
        except FileNotFoundError:
            return None

    def _publish(self) -> None:
        """Write the file for readers, unless a newer attempt is at work.

        What the file holds is read before newer sessions are looked for, and replaced only if it
        still holds that: one who sleeps in between never writes over a newer session's.
        """
        opened = self._at_hand
        data = b"".join([*opened.former, *opened.writer.read_lines()])
        if not data:
            opened.published = self._read_published()
        for _ in range(_TRIES):
            if data == (opened.published or b""):
                return
            if self._has_newer_session():
                return
            try:
                if opened.published is None:
                    self._storage.create_bytes(self._path, data)
                else:
                    self._storage.replace_bytes(self._path, data, former=opened.published)
            except FileExistsError:
                opened.published = self._read_published()
                continue
            opened.published = data
            return
        logger.warning(
            "%s is written by others at the same time; the records of this session are in %s",
            self._storage.uri(self._path),
            self._storage.uri(self._session_path(opened.session)),
        )


@dataclass
class _Opened:
    session: Session
    folder: PublishedFolder
    writer: JsonLinesWriter
    former: list[bytes]
    """Lines of sessions before."""
    published: bytes | None
    """What the file for readers held when it was looked at; None: there was none."""
    is_closed: bool = False


def _cut(lines: Sequence[tuple[int, bytes]], last_step: int) -> list[tuple[int, bytes]]:
    return [(step, line) for step, line in lines if step <= last_step]

"""The commit log: which checkpoints exist, decided by create-only objects `commits/%010d.json`.

S3 has no rename, so a checkpoint comes into being with one create-only put of the next number.
Each attempt (one start of a training job) first appends a `start` record. A writer that finds its
number taken reads the winner: if that is a newer attempt, it stops for good, so a process that was
believed dead can never commit over its successor (design.md section 3, "Checkpoint").
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from fqgan_dist.config import MAX_COUNT, Config
from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.documents import parse_json, read_document
from fqgan_dist.storage.links import RefusedObjectError
from fqgan_dist.storage.storage import Storage

logger = logging.getLogger(__name__)

ATTEMPT_PATTERN = r"^[0-9a-f]{32}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"

_MAX_NUMBER = 10**10 - 1

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
AttemptId = Annotated[str, Field(pattern=ATTEMPT_PATTERN)]
"""uuid4 of one start of a training job, as hex."""
Sha256 = Annotated[str, Field(pattern=SHA256_PATTERN)]


class _Numbered(Config):
    number: int = Field(ge=1, le=_MAX_NUMBER)
    """Position in the log."""
    written_at: str
    """UTC, ISO 8601; for people only."""


class StartRecord(_Numbered):
    """An attempt began; every older attempt is fenced off from here on."""

    kind: Literal["start"] = "start"
    attempt: AttemptId
    """The new attempt."""


class StandInRecord(Config):
    """A damaged sample in whose place another one was trained on."""

    position: Count
    """Of the damaged one in the endless stream of samples."""
    shard: Count
    """Index of the stand-in's shard."""
    row: Count
    """Row of the stand-in there."""


class SkippedStep(Config):
    """A step whose images moved no weight."""

    step: Count
    start: Count
    """First of its positions."""
    end: Count
    """One past the last."""
    reason: str
    """Such as `autoregressive/loss/total is nan`."""


class Consumption(Config):
    """What was trained on since the parent commit; `ledger` proves from these that all was."""

    start: Count
    """First position in the endless stream of samples."""
    end: Count
    """One past the last."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Sum over positions of a hash of each and its sample (data/consumption.py)."""
    stand_ins: list[StandInRecord] = Field(default_factory=list)
    skipped: list[SkippedStep] = Field(default_factory=list)
    dataset_id: str
    """sha256 of the dataset's index; with the next three it decides the order."""
    num_samples: Count
    """Samples of an epoch."""
    seed: int
    window_shards: Count


class CommitRecord(_Numbered):
    """A checkpoint became valid."""

    kind: Literal["commit"] = "commit"
    attempt: AttemptId
    """Who wrote the checkpoint."""
    parent: Annotated[int, Field(ge=1, le=_MAX_NUMBER)] | None
    """Number of the commit that training went on from; None at the first."""
    step: int = Field(ge=0, le=MAX_COUNT)
    """Optimizer steps done."""
    manifest_sha256: Sha256
    """Of the manifest's bytes; it names all parts."""
    consumed: Consumption | None = None
    """What was trained on since the parent; None in commits of versions that did not record it."""


class PruneRecord(_Numbered):
    """Commits were given up; their files are deleted after this record, never before."""

    kind: Literal["prune"] = "prune"
    attempt: AttemptId | None
    """Who rotates; None for a person's `fqgan checkpoints prune`, which fences nobody off."""
    removed: list[Annotated[int, Field(ge=1, le=_MAX_NUMBER)]]
    """Numbers of the commits."""


LogRecord = StartRecord | CommitRecord | PruneRecord
_RECORD: TypeAdapter[LogRecord] = TypeAdapter(Annotated[LogRecord, Field(discriminator="kind")])
RecordT = TypeVar("RecordT", StartRecord, CommitRecord, PruneRecord)

_FOLDER = "commits"
_NAME = re.compile(r"([0-9]{10})\.json")


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def canonical_json(value: Any) -> bytes:
    """Encode plain values as the one JSON text that equal values have.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seal(value: Config) -> bytes:
    """Encode a small document together with its own checksum."""
    content = value.model_dump(mode="json")
    digest = sha256_hex(canonical_json(content))
    return canonical_json({"content": content, "sha256": digest})


def unseal(data: bytes, where: str) -> Any:
    """Decode what `seal` wrote.

    Raises:
        CheckpointError: it is not JSON, or the checksum is another.
    """
    try:
        sealed = parse_json(data)
        content, digest = sealed["content"], sealed["sha256"]
        is_whole = sha256_hex(canonical_json(content)) == digest
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: damaged, not a sealed JSON document ({error})") from error
    if not is_whole:
        raise CheckpointError(f"{where}: damaged, its content has another sha256 than it states")
    return content


class CommitLog:
    """Read access to the log, and the create-only append."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        # Records never change once they are there; damaged ones are read again each time.
        self._cache: dict[int, LogRecord] = {}

    def uri(self, number: int) -> str:
        return self._storage.uri(_path(number))

    def numbers(self) -> list[int]:
        matches = (_NAME.fullmatch(name) for name in self._storage.list(_FOLDER))
        return sorted(int(match[1]) for match in matches if match)

    def find_gap(self) -> str | None:
        """Say which records are missing; None if they are numbered from 1 on without a gap.

        Records are appended one by one and never removed, so a gap means that some were lost, or
        that a file is none of this log's.
        """
        numbers = self.numbers()
        for expected, number in enumerate(numbers, 1):
            if number != expected:
                missing = f"{expected}" if number == expected + 1 else f"{expected} to {number - 1}"
                return (
                    f"{self.uri(number)}: there is no log record {missing} before it: remove the "
                    "file if it is none of this run's, or restore what is missing"
                )
        return None

    def find_strangers(self) -> list[str]:
        """Name the files and folders among the records that are none."""
        names = self._storage.list(_FOLDER)
        return [
            f"{self._storage.uri(f'{_FOLDER}/{name}')}: not a log record; remove it"
            for name in names
            if not _NAME.fullmatch(name)
        ]

    def read(self, number: int) -> LogRecord:
        """Read one record.

        Raises:
            CheckpointError: it is damaged.
            FileNotFoundError: there is none.
        """
        if number not in self._cache:
            try:
                data = read_document(self._storage, _path(number))
            except RefusedObjectError as error:
                raise CheckpointError(str(error)) from error
            content = unseal(data, self.uri(number))
            try:
                record = _RECORD.validate_python(content)
            except ValidationError as error:
                raise CheckpointError(f"{self.uri(number)}: not a log record: {error}") from error
            if record.number != number:
                raise CheckpointError(
                    f"{self.uri(number)}: holds record {record.number}; the file was copied"
                )
            self._cache[number] = record
        return self._cache[number]

    def newest_first(self) -> Iterator[tuple[int, LogRecord | CheckpointError]]:
        """Walk the log backwards; a damaged record appears as the error that reading it raised."""
        for number in reversed(self.numbers()):
            try:
                yield number, self.read(number)
            except CheckpointError as error:
                yield number, error

    def newest_commit(self) -> int:
        """Give the number of the newest commit; 0: there is none, or all are damaged."""
        records = self.newest_first()
        return next((number for number, each in records if isinstance(each, CommitRecord)), 0)

    def is_taken(self, number: int) -> bool:
        return self._storage.exists(_path(number))

    def create(self, record: LogRecord) -> None:
        """Append a record under its number.

        A put whose answer was lost and that the storage layer retried counts as success, because
        the record holds the attempt's uuid: equal bytes are this writer's.

        Raises:
            FileExistsError: the number is taken by another record.
        """
        self._storage.create_bytes(_path(record.number), seal(record))
        self._cache[record.number] = record


class LogWriter:
    """The log as one attempt writes it: starts with a `start` record, stops at a newer one."""

    def __init__(self, log: CommitLog, attempt: str) -> None:
        """Append the start record of an attempt."""
        self._log = log
        self.attempt = attempt
        number = max(log.numbers(), default=0) + 1
        while not self._try_start(number):
            # Somebody else, older or starting at this moment, took it: become newer than that.
            number += 1
        self.start_number = number
        """Position of the start record; attempts that started below it are fenced off."""
        self._next = number + 1

    def append(self, build: Callable[[int], RecordT]) -> RecordT:
        """Append the record that `build` makes for the next free number.

        Raises:
            CheckpointError: a newer attempt has started; this one must stop for good.
        """
        while True:
            record = build(self._next)
            try:
                self._log.create(record)
            except FileExistsError:
                self._step_over_winner()
                continue
            self._next += 1
            return record

    def raise_if_superseded(self) -> None:
        """Stop before hours of writing that could not be committed.

        Raises:
            CheckpointError: a newer attempt has started.
        """
        while self._log.is_taken(self._next):
            self._step_over_winner()

    def _try_start(self, number: int) -> bool:
        record = StartRecord(number=number, attempt=self.attempt, written_at=utc_now())
        try:
            self._log.create(record)
        except FileExistsError:
            return False
        return True

    def _step_over_winner(self) -> None:
        """Go on after a record that fences nobody off, or stop."""
        uri = self._log.uri(self._next)
        try:
            winner = self._log.read(self._next)
        except CheckpointError as error:
            raise CheckpointError(
                f"attempt {self.attempt}: cannot tell whether a newer attempt has started, because "
                f"{error}; start the job again"
            ) from error
        if winner.attempt not in (None, self.attempt):
            raise CheckpointError(
                f"attempt {self.attempt} was superseded by the newer attempt {winner.attempt} "
                f"({uri}, {winner.kind}); nothing was committed; this process must stop"
            )
        self._next += 1


def _path(number: int) -> str:
    return f"{_FOLDER}/{number:010d}.json"

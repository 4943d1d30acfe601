"""One attempt at training: what a rank saves, and how rank 0 commits it."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.errors import CheckpointError, FqganError
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_files import FileImage, HostStaging, PartTensors
from fqgan_dist.training.checkpoint_format import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    PartName,
    RankReport,
    checkpoint_folder,
    merge_reports,
    report_name,
)
from fqgan_dist.training.checkpoint_writer import BackgroundWriter
from fqgan_dist.training.commit_log import (
    CommitLog,
    CommitRecord,
    Consumption,
    LogWriter,
    canonical_json,
    seal,
    sha256_hex,
    unseal,
    utc_now,
)
from fqgan_dist.training.writer_process import FileWriter

logger = logging.getLogger(__name__)

_PART_NAMES = TypeAdapter(list[PartName])
_FIRST_POLL_S = 0.02
_LAST_POLL_S = 1.0
# How long a training that failed waits for the other ranks' part of its last save.
_ABANDONED_WAIT_S = 60.0


class Attempt:
    """Saves checkpoints for one rank; made by `CheckpointStore.begin_attempt` or `join_attempt`.

    Use it as a context manager, or call `close`: a save that is still being written when the
    interpreter exits is lost (the checkpoint before it stays good).
    """

    def __init__(
        self,
        storage: Storage,
        *,
        attempt_id: str,
        rank: int,
        world_size: int,
        log: CommitLog | None,
        rotate: Callable[[LogWriter], None],
        rank_timeout_s: float,
        writer: FileWriter,
    ) -> None:
        """Hold what saving needs; a `log` makes this the committing rank and starts the attempt."""
        self.id = attempt_id
        self.rank = rank
        self.world_size = world_size
        self.last_step: int | None = None
        """Step of the newest `save`, committed or not."""
        self._storage = storage
        self._rotate = rotate
        self._rank_timeout_s = rank_timeout_s
        self._parent: int | None = None
        self._is_abandoned = threading.Event()
        self._staging = HostStaging(rank)
        self._log_writer = LogWriter(log, attempt_id) if log is not None else None
        self.number = self._log_writer.start_number if self._log_writer else 0
        """Position of the attempt's start in the log; 0 on ranks that do not write the log."""
        self._writer = writer
        self._background = BackgroundWriter()

    @staticmethod
    def new_id() -> str:
        return uuid.uuid4().hex

    def continue_from(self, number: int) -> None:
        """Name the commit that training goes on from, as the parent of the next one."""
        self._parent = number

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, PartTensors],
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        config: Mapping[str, Any],
        dataset_id: str,
        consumed: Consumption | None = None,
    ) -> None:
        """Copy the state to host memory and write it in the background.

        Every rank of the attempt calls this at the same steps, with all part names and the tensors
        that it owns: each is owned by exactly one rank, or fragments of all ranks cover it. Of all
        else rank 0's values count. It returns when the copies are done, after waiting for the save
        before it.

        Raises:
            CheckpointError: a newer attempt has started, or a save before this one failed.
            DataError: the storage failed in the save before.
            ValueError: an argument cannot be stored, or the step does not rise.
        """
        self._background.wait()
        if self.last_step is not None and step <= self.last_step:
            raise ValueError(
                f"step {step} was saved already or is before step {self.last_step}; "
                f"save each step of an attempt once, in order"
            )
        _check_part_names(tensors)
        manifest = Manifest(
            step=step,
            attempt=self.id,
            world_size=self.world_size,
            dataset_id=dataset_id,
            config=_plain_copy(config, "config"),
            state=_plain_copy(state, "state"),
            metrics=_plain_copy(metrics, "metrics"),
            parts=sorted(tensors),
            files=[],
        )
        images = self._staging.copy(tensors)
        self.last_step = step
        self._background.submit(lambda: self._write(manifest, images, consumed))

    def rotate(self) -> None:
        """Give up and delete what the policy does not keep, as every commit does, on the main rank.

        For an attempt that has nothing to commit: the one before may have been killed at this.
        """
        if self._log_writer is not None:
            self._rotate(self._log_writer)

    def raise_pending(self) -> None:
        """Raise the error of a background save; to be called at every step, never waits."""
        self._background.raise_pending()

    def wait(self) -> None:
        """Wait until the last save is committed (on other ranks: written), and raise its error."""
        self._background.wait()

    def close(self) -> None:
        """Wait as `wait` does and end what writes in the background."""
        try:
            self._background.close()
        finally:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        # The error that ends training comes first. A last save is committed if all ranks write
        # their part of it; one that died never will.
        self._is_abandoned.set()
        try:
            self.close()
        except FqganError as late:
            logger.warning("the save of step %s was not committed: %s", self.last_step, late)

    def _write(
        self, manifest: Manifest, images: list[FileImage], consumed: Consumption | None
    ) -> None:
        if self._log_writer is not None:
            self._log_writer.raise_if_superseded()
        folder = checkpoint_folder(manifest.step, self.id)
        report = RankReport(
            step=manifest.step,
            attempt=self.id,
            rank=self.rank,
            world_size=self.world_size,
            parts=manifest.parts,
            files=self._upload(folder, images),
        )
        if self._log_writer is None:
            self._storage.write_bytes(f"{folder}/{report_name(self.rank)}", seal(report))
            return
        record = self._commit(self._log_writer, manifest, folder, report, consumed)
        self._parent = record.number
        logger.info("committed step %d as checkpoint %d", record.step, record.number)
        self._rotate(self._log_writer)

    def _upload(self, folder: str, images: list[FileImage]) -> list[FileRecord]:
        try:
            hashes = self._writer.write(self._storage, folder, images)
        except FileNotFoundError:
            # Half a file is gone before it had its name: by a newer attempt, which sweeps those of
            # older ones while this one sleeps.
            if self._log_writer is not None:
                self._log_writer.raise_if_superseded()
            raise
        return [image.describe(hashes[image.name]) for image in images]

    def _commit(
        self,
        log_writer: LogWriter,
        manifest: Manifest,
        folder: str,
        report: RankReport,
        consumed: Consumption | None,
    ) -> CommitRecord:
        reports = [report, *self._wait_for_reports(folder)]
        parts, files = merge_reports(reports, self._storage.uri(folder))
        whole = manifest.model_copy(update={"parts": parts, "files": files})
        data = canonical_json(whole.model_dump(mode="json"))
        self._storage.write_bytes(f"{folder}/{MANIFEST_NAME}", data)
        return log_writer.append(
            lambda number: CommitRecord(
                number=number,
                attempt=self.id,
                parent=self._parent,
                step=manifest.step,
                manifest_sha256=sha256_hex(data),
                consumed=consumed,
                written_at=utc_now(),
            )
        )

    def _wait_for_reports(self, folder: str) -> list[RankReport]:
        # Through the storage: a background thread must not use collectives, which would interleave
        # with training's.
        missing = {report_name(rank) for rank in range(1, self.world_size)}
        started, limit_s = time.monotonic(), self._rank_timeout_s
        poll_s = _FIRST_POLL_S
        while missing:
            with ACTIVITY.aside():  # it asks for what others may never write
                missing.difference_update(self._storage.list(folder))
            if not missing:
                break
            waited_s = time.monotonic() - started
            if self._is_abandoned.is_set():
                limit_s = min(limit_s, waited_s + _ABANDONED_WAIT_S)
            if waited_s > limit_s:
                raise CheckpointError(
                    f"{self._storage.uri(folder)}: {len(missing)} of {self.world_size} ranks have "
                    f"not written their part after {limit_s:.4g} s "
                    f"({', '.join(sorted(missing)[:5])}); look for the error of those ranks"
                )
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, _LAST_POLL_S)
        return [self._read_report(folder, rank) for rank in range(1, self.world_size)]

    def _read_report(self, folder: str, rank: int) -> RankReport:
        return read_report(self._storage, folder, rank)


def read_report(storage: Storage, folder: str, rank: int) -> RankReport:
    """Read what a rank has told of its files of a checkpoint.

    Raises:
        FileNotFoundError: it has told nothing.
        CheckpointError: the report is damaged.
    """
    path = f"{folder}/{report_name(rank)}"
    where = storage.uri(path)
    content = unseal(read_document(storage, path), where)
    try:
        return RankReport.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{where}: not a rank's report: {error}") from error


def _check_part_names(tensors: Mapping[str, PartTensors]) -> None:
    try:
        _PART_NAMES.validate_python(list(tensors))
    except ValidationError:
        raise ValueError(
            f"parts {sorted(tensors)}: expected names of letters, digits, '-' and '_'"
        ) from None


def _plain_copy(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    # Through JSON, so that later changes do not reach the writer.
    try:
        copy = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: cannot be stored as JSON: {error}") from error
    if copy != dict(value):
        raise ValueError(
            f"{what}: would not load back equal from JSON; "
            f"use str keys, and lists, str, int, float, bool and None as values"
        )
    return copy

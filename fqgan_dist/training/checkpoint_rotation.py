"""Which checkpoints are kept, and the deletion of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from fqgan_dist.errors import CheckpointError, DataError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_format import (
    ATTEMPT_FOLDER,
    MANIFEST_NAME,
    STEP_FOLDER,
    Manifest,
    checkpoint_folder,
)
from fqgan_dist.training.commit_log import (
    CommitLog,
    CommitRecord,
    LogWriter,
    PruneRecord,
    StartRecord,
    utc_now,
)
from fqgan_dist.training.config import RetentionPolicy

logger = logging.getLogger(__name__)

ReadManifest = Callable[[CommitRecord], Manifest]


@dataclass(frozen=True)
class LogState:
    """What the whole log says."""

    live: tuple[CommitRecord, ...]
    """Commits that were not given up, oldest first."""
    pruned: tuple[CommitRecord, ...]
    """Commits that were given up."""
    pruned_at: dict[int, str]
    """Number of such a commit -> when, as in the record that says so."""
    starts: dict[str, int]
    """Attempt -> number of its start record."""
    problems: tuple[CheckpointError, ...]
    """Damaged records."""


def read_log(log: CommitLog) -> LogState:
    """Read and sort all records."""
    commits: list[CommitRecord] = []
    removed: dict[int, str] = {}
    starts: dict[str, int] = {}
    problems: list[CheckpointError] = []
    for _, record in log.newest_first():
        match record:
            case CommitRecord():
                commits.append(record)
            case PruneRecord():
                removed |= dict.fromkeys(record.removed, record.written_at)
            case StartRecord():
                starts[record.attempt] = record.number
            case CheckpointError():
                problems.append(record)
    commits.reverse()
    return LogState(
        live=tuple(commit for commit in commits if commit.number not in removed),
        pruned=tuple(commit for commit in commits if commit.number in removed),
        pruned_at=removed,
        starts=starts,
        problems=tuple(problems),
    )


def select_kept(checkpoints: Sequence[tuple[int, Manifest]], policy: RetentionPolicy) -> set[int]:
    """Choose the numbers that stay of (number, manifest) of undamaged checkpoints, oldest first."""
    kept = {number for number, _ in checkpoints[-policy.keep_last :]}
    if policy.keep_every is not None:
        kept |= {number for number, item in checkpoints if item.step % policy.keep_every == 0}
    if policy.best_metric is not None:
        sign = 1 if policy.best_mode == "min" else -1
        scores = [
            (sign * item.metrics[policy.best_metric], number)
            for number, item in checkpoints
            if policy.best_metric in item.metrics
        ]
        kept |= {number for _, number in sorted(scores)[:1]}
    return kept


def rotate(
    storage: Storage,
    log: CommitLog,
    policy: RetentionPolicy,
    read_manifest: ReadManifest,
    writer: LogWriter | None,
) -> list[CommitRecord]:
    """Give up checkpoints by the policy, then delete what no live commit needs; return these now.

    First a prune record, then the files: whoever reads the log never chooses a checkpoint that is
    being deleted, and a crash in between leaves files that the next rotation deletes. Who reads
    one at that moment finds files gone, asks the log, and is told so (`read_newest`); with
    `grace_s` the files stay for so long. Damaged checkpoints (`read_manifest` raises
    CheckpointError) count for no rule and are left for a person to look at. Without a `writer` the
    record fences nobody off.
    """
    state = read_log(log)
    readable: list[tuple[int, Manifest]] = []
    for commit in state.live:
        try:
            readable.append((commit.number, read_manifest(commit)))
        except CheckpointError as error:
            logger.warning("rotation leaves a damaged checkpoint alone: %s", error)
    kept = select_kept(readable, policy)
    removed = [number for number, _ in readable if number not in kept]
    attempt = writer.attempt if writer else None

    def build(number: int) -> PruneRecord:
        return PruneRecord(number=number, attempt=attempt, removed=removed, written_at=utc_now())

    if removed:
        if writer is None:
            _append_unfenced(log, build)
        else:
            writer.append(build)
        state = read_log(log)
    fence = writer.start_number if writer else max(state.starts.values(), default=0)
    _sweep(storage, state, fence, policy.grace_s)
    return [commit for commit in state.pruned if commit.number in removed]


def _append_unfenced(log: CommitLog, build: Callable[[int], PruneRecord]) -> None:
    number = max(log.numbers(), default=0) + 1
    while True:
        try:
            log.create(build(number))
        except FileExistsError:
            number += 1
            continue
        return


def _is_over(written_at: str, grace_s: float) -> bool:
    """Tell whether a time of another machine's clock is so long ago; unreadable ones never are."""
    if grace_s == 0:
        return True
    try:
        age = datetime.now(UTC) - datetime.fromisoformat(written_at)
    except (ValueError, TypeError):  # of a hostile record, or one without a time zone
        return False
    return age.total_seconds() >= grace_s


def _sweep(storage: Storage, state: LogState, fence: int, grace_s: float) -> None:
    """Delete folders of pruned commits, and what attempts older than `fence` left uncommitted.

    An attempt that started later may be writing at this moment; a damaged record may be the commit
    of a folder that looks uncommitted.
    """
    live = {checkpoint_folder(commit.step, commit.attempt) for commit in state.live}
    pruned = {checkpoint_folder(commit.step, commit.attempt): commit for commit in state.pruned}
    for step_name in storage.list():
        if not STEP_FOLDER.fullmatch(step_name):
            continue
        for name in storage.list(step_name):
            match = ATTEMPT_FOLDER.fullmatch(name)
            folder = f"{step_name}/{name}"
            if match is None or folder in live:
                continue
            is_abandoned = not state.problems and state.starts.get(match[1], fence) < fence
            if folder in pruned:
                is_due = _is_over(state.pruned_at[pruned[folder].number], grace_s)
            else:
                is_due = is_abandoned
            if is_due:
                _delete_folder(storage, folder)


def _delete_folder(storage: Storage, folder: str) -> None:
    # The manifest goes first: what is half deleted can be mistaken for nothing.
    names = storage.list(folder)
    for name in sorted(names, key=lambda name: name != MANIFEST_NAME):
        storage.delete(f"{folder}/{name}")
    # Nobody will read what a writer that was overtaken still writes there; it may be gone by now.
    with suppress(DataError, OSError):
        storage.sweep(folder, is_superseded=True)
    # Buckets have no folders.
    path = storage.local_path(folder)
    if path is not None:
        with suppress(OSError):
            path.rmdir()
            path.parent.rmdir()
    logger.info("deleted checkpoint files %s", storage.uri(folder))

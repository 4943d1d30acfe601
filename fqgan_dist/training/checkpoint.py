"""Checkpoints that survive any crash: parts, one manifest, one create-only commit.

Source: design.md section 3, "Checkpoint". The layout is described in checkpoint_format.py, the
commit in commit_log.py.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.links import RefusedObjectError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_attempt import Attempt
from fqgan_dist.training.checkpoint_files import Fragment, find_damage, read_tensors
from fqgan_dist.training.checkpoint_format import (
    MANIFEST_NAME,
    Manifest,
    checkpoint_folder,
    parse_manifest,
)
from fqgan_dist.training.checkpoint_rotation import read_log, rotate
from fqgan_dist.training.commit_log import (
    CommitLog,
    CommitRecord,
    LogWriter,
    PruneRecord,
    sha256_hex,
)
from fqgan_dist.training.config import RetentionPolicy

__all__ = [
    "Attempt",
    "CheckpointStore",
    "CommitRecord",
    "Fragment",
    "LoadedCheckpoint",
    "RetentionPolicy",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A committed checkpoint; tensors are read on demand, each file's sha256 checked again."""

    commit: CommitRecord
    manifest: Manifest
    storage: Storage

    @property
    def number(self) -> int:
        """Position in the commit log; names this checkpoint to other ranks."""
        return self.commit.number

    @property
    def step(self) -> int:
        return self.manifest.step

    def tensor_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Give the shapes of a part's tensors without reading them.

        Raises:
            CheckpointError: there is no such part.
        """
        self._require(part)
        return {
            name: tuple(record.shape)
            for file in self.manifest.files
            if file.part == part
            for name, record in file.tensors.items()
        }

    def read(self, part: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Read a part, merged from whatever ranks wrote it, as CPU tensors.

        With `names` only these tensors, so that a rank fetches only its own.

        Raises:
            CheckpointError: no such part or tensor, or a file is missing or damaged.
        """
        known = self.tensor_shapes(part)
        unknown = sorted(set(names or ()) - known.keys())
        if unknown:
            raise CheckpointError(
                f"{self._uri}: part {part!r} has no tensors {unknown[:5]}; "
                f"it holds {len(known)} others"
            )
        files = [file for file in self.manifest.files if file.part == part]
        return read_tensors(self.storage, self._folder, files, names)

    def find_damage(self) -> list[str]:
        """Read every file and compare size and sha256; one line per damaged file."""
        return find_damage(self.storage, self._folder, self.manifest.files)

    @property
    def _folder(self) -> str:
        return checkpoint_folder(self.step, self.manifest.attempt)

    @property
    def _uri(self) -> str:
        return self.storage.uri(self._folder)

    def _require(self, part: str) -> None:
        if part not in self.manifest.parts:
            raise CheckpointError(
                f"{self._uri}: no part {part!r}; it has {', '.join(self.manifest.parts)}"
            )


class CheckpointStore:
    """All checkpoints of one training stage, below a folder of the storage root."""

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        *,
        retention: RetentionPolicy | None = None,
        rank_timeout_s: float = 1800.0,
    ) -> None:
        """Name a store below a folder such as `tokenizer/checkpoints`, without touching it.

        Without `retention` every checkpoint is kept; the commit waits `rank_timeout_s` for the
        slowest rank.
        """
        self._storage = storage.child(prefix)
        self._log = CommitLog(self._storage)
        self._retention = retention
        self._rank_timeout_s = rank_timeout_s

    def __str__(self) -> str:
        return self._storage.root

    def begin_attempt(self, *, world_size: int = 1) -> Attempt:
        """Fence off all older attempts and start to save, as rank 0.

        Begin before loading: no older attempt can commit between the load and the first save then.
        """
        return self._attempt(Attempt.new_id(), rank=0, world_size=world_size, log=self._log)

    def join_attempt(self, attempt_id: str, *, rank: int, world_size: int) -> Attempt:
        """Save as another rank of the attempt whose id rank 0 has broadcast.

        Raises:
            ValueError: the rank is 0 or outside the world.
        """
        if not 0 < rank < world_size:
            raise ValueError(f"rank {rank}: expected 1 to {world_size - 1}; rank 0 begins attempts")
        return self._attempt(attempt_id, rank=rank, world_size=world_size, log=None)

    def load_latest(self, step: int | None = None) -> LoadedCheckpoint | None:
        """Find the newest commit all of whose files are good, of one step if that is given.

        A damaged checkpoint is named in the log and stepped over. None: nothing was ever committed.

        Raises:
            CheckpointError: all checkpoints are damaged, or there is none of that step: training
                must not start over silently.
        """
        removed: set[int] = set()
        problems: list[str] = []
        for _, record in self._log.newest_first():
            match record:
                case PruneRecord():
                    removed.update(record.removed)
                case CheckpointError():
                    problems.append(str(record))
                    logger.warning("stepping over a damaged log record: %s", record)
                case CommitRecord() if record.number not in removed and step in (None, record.step):
                    found = self._try_load(record, problems)
                    if found is not None:
                        return found
        if problems or step is not None:
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            steps = ", ".join(str(commit.step) for commit in self.list_commits()) or "none"
            raise CheckpointError(
                f"{self}: no good {wanted}; steps committed: {steps}; damaged: "
                f"{'; '.join(problems) or 'none'}. Restore the files, or use another storage.root"
            )
        return None

    def load(self, number: int) -> LoadedCheckpoint:
        """Open the checkpoint of a commit, as found by `load_latest` on rank 0.

        Its manifest is checked here, its files when they are read.

        Raises:
            CheckpointError: there is no such commit, or its manifest is missing or damaged.
        """
        try:
            record = self._log.read(number)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self}: no commit {number}") from error
        if not isinstance(record, CommitRecord):
            raise CheckpointError(f"{self}: log record {number} is a {record.kind}, not a commit")
        return LoadedCheckpoint(record, self._read_manifest(record), self._storage)

    def list_commits(self) -> list[CommitRecord]:
        """List the commits that were not given up, oldest first; damaged records are skipped."""
        return list(read_log(self._log).live)

    def verify(self, step: int | None = None) -> list[str]:
        """Check all log records, and every byte of all checkpoints, or of those of one step.

        Returns one line per problem; none when all is well.
        """
        state = read_log(self._log)
        problems = [str(problem) for problem in state.problems]
        commits = [commit for commit in state.live if step in (None, commit.step)]
        if step is not None and not commits:
            problems.append(f"{self}: no checkpoint of step {step}")
        for commit in commits:
            try:
                problems += self.load(commit.number).find_damage()
            except CheckpointError as error:
                problems.append(str(error))
        return problems

    def prune(self, policy: RetentionPolicy) -> list[CommitRecord]:
        """Delete what a policy does not keep, also while an attempt trains; return the commits."""
        return rotate(self._storage, self._log, policy, self._read_manifest, None)

    def _attempt(
        self, attempt_id: str, *, rank: int, world_size: int, log: CommitLog | None
    ) -> Attempt:
        return Attempt(
            self._storage,
            attempt_id=attempt_id,
            rank=rank,
            world_size=world_size,
            log=log,
            rotate=self._rotate,
            rank_timeout_s=self._rank_timeout_s,
        )

    def _rotate(self, writer: LogWriter) -> None:
        if self._retention is not None:
            rotate(self._storage, self._log, self._retention, self._read_manifest, writer)

    def _try_load(self, record: CommitRecord, problems: list[str]) -> LoadedCheckpoint | None:
        try:
            loaded = self.load(record.number)
            damage = loaded.find_damage()
        except CheckpointError as error:
            damage = [str(error)]
        else:
            if not damage:
                return loaded
        problems += damage
        logger.warning(
            "stepping over the damaged checkpoint of step %d: %s", record.step, "; ".join(damage)
        )
        return None

    def _read_manifest(self, record: CommitRecord) -> Manifest:
        folder = checkpoint_folder(record.step, record.attempt)
        where = self._storage.uri(f"{folder}/{MANIFEST_NAME}")
        try:
            data = read_document(self._storage, f"{folder}/{MANIFEST_NAME}")
        except FileNotFoundError as error:
            raise CheckpointError(f"{where}: missing") from error
        except RefusedObjectError as error:
            raise CheckpointError(str(error)) from error
        if sha256_hex(data) != record.manifest_sha256:
            raise CheckpointError(f"{where}: damaged, its sha256 is not the commit's")
        manifest = parse_manifest(data, where)
        if (manifest.step, manifest.attempt) != (record.step, record.attempt):
            raise CheckpointError(f"{where}: is of another checkpoint than its commit")
        return manifest

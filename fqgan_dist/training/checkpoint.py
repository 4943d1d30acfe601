"""Checkpoints that survive any crash: parts, one manifest, one create-only commit.

Source: design.md section 3, "Checkpoint". The layout is described in checkpoint_format.py, the
commit in commit_log.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.links import RefusedObjectError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_attempt import Attempt, read_report
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import (
    MANIFEST_NAME,
    STEP_FOLDER,
    FileRecord,
    Manifest,
    Needs,
    checkpoint_folder,
    parse_manifest,
    report_name,
)
from fqgan_dist.training.checkpoint_reading import (
    CheckpointFolder,
    DamagedCheckpointError,
    ReadCounter,
    find_damage,
    read_tensors,
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
from fqgan_dist.training.ledger import FindOrder, LedgerReport, check_ledger
from fqgan_dist.training.writer_process import FileWriter, WriterHere
from fqgan_dist.world import World

__all__ = [
    "Attempt",
    "CheckpointStore",
    "CommitRecord",
    "DamagedCheckpointError",
    "Fragment",
    "LoadedCheckpoint",
    "RetentionPolicy",
]

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A committed checkpoint; tensors are read on demand, and every byte of them is verified."""

    commit: CommitRecord
    manifest: Manifest
    storage: Storage
    _counter: ReadCounter = field(default_factory=ReadCounter, compare=False)

    @property
    def number(self) -> int:
        """Position in the commit log; names this checkpoint to other ranks."""
        return self.commit.number

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def bytes_read(self) -> int:
        """Bytes of its files that were read through this object so far."""
        return self._counter.num_bytes

    def tensor_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Give the shapes of a part's tensors without reading them.

        Raises:
            CheckpointError: there is no such part.
        """
        return {
            name: tuple(record.shape)
            for file in self._files(part)
            for name, record in file.tensors.items()
        }

    def read(self, part: str, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Read a part, merged from whatever ranks wrote it, as CPU tensors.

        With `names` only these tensors are read.

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
        wanted = known.keys() if names is None else names
        found = read_tensors(self._folder, self._files(part), dict.fromkeys(wanted))
        whole = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        return {name: whole[name] for name in found if name in wanted}

    def read_parts(self, needs: Mapping[str, Needs]) -> dict[str, dict[str, Tensor | Fragment]]:
        """Read what a rank needs of all parts, each needed byte once.

        Parts that are not named are read whole. Of a part all names are returned: whole tensors,
        fragments where a span was asked for, and empty fragments of what was not.

        Raises:
            DamagedCheckpointError: a file is missing or damaged where it is needed.
            CheckpointError: no such part.
        """
        for part in needs:
            self._files(part)
        return {
            part: read_tensors(self._folder, self._files(part), needs.get(part))
            for part in self.manifest.parts
        }

    def find_damage(self) -> list[str]:
        """Read every file and compare sizes and hashes; one line per damaged file."""
        return find_damage(self._folder, self.manifest.files)

    @property
    def _folder(self) -> CheckpointFolder:
        path = checkpoint_folder(self.step, self.manifest.attempt)
        return CheckpointFolder(self.storage, path, self._counter)

    @property
    def _uri(self) -> str:
        return self.storage.uri(self._folder.path)

    def _files(self, part: str) -> list[FileRecord]:
        if part not in self.manifest.parts:
            raise CheckpointError(
                f"{self._uri}: no part {part!r}; it has {', '.join(self.manifest.parts)}"
            )
        return [file for file in self.manifest.files if file.part == part]


class CheckpointStore:
    """All checkpoints of one training stage, below a folder of the storage root."""

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        *,
        retention: RetentionPolicy | None = None,
        rank_timeout_s: float = 1800.0,
        make_writer: Callable[[], FileWriter] = WriterHere,
    ) -> None:
        """Name a store below a folder such as `tokenizer/checkpoints`, without touching it.

        Without `retention` every checkpoint is kept; the commit waits `rank_timeout_s` for the
        slowest rank. Every attempt has a writer of its own.
        """
        self._storage = storage.child(prefix)
        self._log = CommitLog(self._storage)
        self._retention = retention
        self._rank_timeout_s = rank_timeout_s
        self._make_writer = make_writer

    def __str__(self) -> str:
        return self._storage.root

    def begin_attempt(self, *, world_size: int = 1) -> Attempt:
        """Fence off all older attempts and start to save, as rank 0.

        Begin before loading: no older attempt can commit between the load and the first save then.

        Raises:
            CheckpointError: the commit log is lost, or has gaps; which checkpoints are whole cannot
                be told.
        """
        if (fault := self.find_fault_of_log()) is not None:
            raise CheckpointError(fault)
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

        It reads all of them: who wants but a part of a checkpoint takes `read_newest`, which this
        is with a check for reading. Returns and raises alike.
        """

        def check(loaded: LoadedCheckpoint) -> LoadedCheckpoint:
            if damage := loaded.find_damage():
                raise DamagedCheckpointError("; ".join(damage))
            return loaded

        return self.read_newest(check, step=step)

    def read_newest(
        self,
        read: Callable[[LoadedCheckpoint], ResultT],
        *,
        step: int | None = None,
        world: World | None = None,
    ) -> ResultT | None:
        """Return what `read` takes from the newest checkpoint that bears it, of one step if given.

        A checkpoint is damaged if `read` raises DamagedCheckpointError, on any rank: it is named in
        the log, and all step to the one before. One whose files are gone because it was given up
        meanwhile (rotation, `fqgan checkpoints prune`) is no damage: the log is asked again. None:
        nothing was ever committed.

        Args:
            read: what this rank needs; other errors than that one end it.
            step: only checkpoints of this step.
            world: where there are several ranks, each calls this; None: this process alone reads.

        Raises:
            CheckpointError: all checkpoints are damaged, or there is none of that step: training
                must not start over silently.
        """
        world = world or World()
        tried: set[int] = set()
        problems: list[str] = []
        while True:
            record = next(self._candidates(step, tried, problems), None) if world.is_main else None
            number = _from_main(record.number if record else None, world)
            if number is None:
                break
            tried.add(number)
            result, damage = self._try(number, read)
            damage = [line for lines in _of_all_ranks(damage, world) for line in lines]
            if not damage:
                return result
            del result  # what this rank found good: its memory is for the next
            if record is not None:
                problems += self._explain(record, damage)
        problems = _from_main(problems, world)
        if problems or step is not None:
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            steps = ", ".join(str(commit.step) for commit in self.list_commits()) or "none"
            raise CheckpointError(
                f"{self}: no good {wanted}; steps committed: {steps}; damaged: "
                f"{'; '.join(problems) or 'none'}. Restore the files, or use another storage.root"
            )
        return None

    def load(self, number: int) -> LoadedCheckpoint:
        """Open the checkpoint of a commit.

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
        fault = self.find_fault_of_log()
        problems = [*self._log.find_strangers(), *([fault] if fault else [])]
        state = read_log(self._log)
        problems += [str(problem) for problem in state.problems]
        commits = [commit for commit in state.live if step in (None, commit.step)]
        if step is not None and not commits:
            problems.append(f"{self}: no checkpoint of step {step}")
        for commit in commits:
            try:
                loaded = self.load(commit.number)
                damage = [*loaded.find_damage(), *self._find_damaged_reports(loaded)]
            except CheckpointError as error:
                damage = [str(error)]
            if damage and not self._is_given_up(commit.number):
                problems += damage
        return problems

    def check_ledger(self, find_order: FindOrder, step: int | None = None) -> LedgerReport:
        """Prove from the log that every image was trained on once, up to the newest commit.

        Args:
            find_order: gives the order of samples of a dataset that is at hand.
            step: up to the commit of this step instead.

        Raises:
            CheckpointError: there is no such commit.
        """
        state = read_log(self._log)
        live = [commit for commit in state.live if step in (None, commit.step)]
        if not live:
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise CheckpointError(f"{self}: no {wanted}; nothing is to be proven")
        commits = {commit.number: commit for commit in (*state.live, *state.pruned)}
        return check_ledger(commits, live[-1], find_order)

    def _find_damaged_reports(self, loaded: LoadedCheckpoint) -> Iterator[str]:
        """Look at what ranks told of their files; once it is in the manifest, nothing reads it."""
        folder = checkpoint_folder(loaded.step, loaded.manifest.attempt)
        for rank in range(1, loaded.manifest.world_size):
            try:
                read_report(self._storage, folder, rank)
            except FileNotFoundError:
                yield f"{self._storage.uri(folder)}/{report_name(rank)}: missing"
            except (CheckpointError, RefusedObjectError) as error:
                yield str(error)

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
            writer=self._make_writer(),
        )

    def find_fault_of_log(self) -> str | None:
        """Say why the log does not tell which checkpoints there are; None if it does."""
        if self._log.numbers():
            return self._log.find_gap()
        folders = [name for name in self._storage.list() if STEP_FOLDER.fullmatch(name)]
        if not folders:
            return None
        # An attempt writes its first record before anything else.
        return (
            f"{self}: holds {len(folders)} checkpoints ({', '.join(sorted(folders)[-3:])}), but no "
            "log of them (commits/), without which nobody can tell which are whole; restore "
            "commits/, or remove this folder to train from the start"
        )

    def _rotate(self, writer: LogWriter) -> None:
        if self._retention is not None:
            rotate(self._storage, self._log, self._retention, self._read_manifest, writer)

    def _candidates(
        self, step: int | None, tried: Collection[int], problems: list[str]
    ) -> Iterator[CommitRecord]:
        """Give the commits that the log names at this moment, newest first, less those tried."""
        removed: set[int] = set()
        for _, record in self._log.newest_first():
            match record:
                case PruneRecord():
                    removed.update(record.removed)
                case CheckpointError():
                    if str(record) not in problems:
                        problems.append(str(record))
                        logger.warning("stepping over a damaged log record: %s", record)
                case CommitRecord():
                    is_wanted = step in (None, record.step) and record.number not in removed
                    if is_wanted and record.number not in tried:
                        yield record

    def _try(
        self, number: int, read: Callable[[LoadedCheckpoint], ResultT]
    ) -> tuple[ResultT | None, list[str]]:
        """Return what was read, or what is damaged."""
        try:
            loaded = self.load(number)
        except CheckpointError as error:
            return None, [str(error)]
        try:
            return read(loaded), []
        except DamagedCheckpointError as error:
            return None, [str(error)]

    def _explain(self, record: CommitRecord, damage: list[str]) -> list[str]:
        """Say why a checkpoint was not taken, and return it for the error if none is."""
        damage = list(dict.fromkeys(damage))  # several ranks find the same
        if self._is_given_up(record.number):
            reason = f"the checkpoint of step {record.step} was given up while it was read"
            logger.info("%s; asking the log again", reason)
            return [reason]
        logger.warning(
            "stepping over the damaged checkpoint of step %d: %s", record.step, "; ".join(damage)
        )
        return damage

    def _is_given_up(self, number: int) -> bool:
        # Files are deleted after the record that says so, never before.
        for each, record in self._log.newest_first():
            if each <= number:
                return False
            if isinstance(record, PruneRecord) and number in record.removed:
                return True
        return False

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


ValueT = TypeVar("ValueT")


def _from_main(value: ValueT, world: World) -> ValueT:
    """Give the main rank's value to all."""
    if world.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _of_all_ranks(value: ValueT, world: World) -> list[ValueT]:
    """Give every rank's value to all, in the order of ranks."""
    values = [value] * world.world_size
    if world.world_size > 1:
        dist.all_gather_object(values, value)
    return values

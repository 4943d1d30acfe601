"""The work on a dataset's shards: making each of them, and checking those of an earlier job.

A shard is built in memory and published create-only, the tar before its table, which vouches for
it. So a kill leaves whole files, and two processes that make one shard write the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from fqgan_dist.data.index import (
    MAX_TABLE_BYTES,
    ShardEntry,
    SourceProblem,
    encode_samples,
    table_name,
)
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.images import ImagePolicy
from fqgan_dist.sharding.listing import ImageReader
from fqgan_dist.sharding.plan import PlannedShard
from fqgan_dist.sharding.plan_files import PlannedRows
from fqgan_dist.sharding.shard_building import BuiltShard, build_shard
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.storage.hashing import hash_object
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.world import World

# Metadata of a table of samples: what a job needs to recognise its own shards.
_PLAN, _TAR_SHA256, _TAR_BYTES, _PROBLEMS = "plan_sha256", "tar_sha256", "tar_bytes", "problems"
_ADVICE = "choose another destination, or delete it first"
_LOCAL_SOURCE = (
    "the source is on this machine, or was unpacked here; with a source in a bucket, or made by "
    "`fqgan-data shard` with is_shared=true, all nodes would make the shards"
)


@dataclass(frozen=True)
class PublishedShard:
    """A shard that is there."""

    entry: ShardEntry | None
    """What the index tells of it; None where no image could be decoded, so that there is no tar."""
    problems: list[SourceProblem]
    """The images that are left out."""


@dataclass(frozen=True)
class ShardFolder:
    """Where the shards of a plan are published."""

    storage: Storage
    """The dataset's folder."""

    def load(self, shard: PlannedShard) -> PublishedShard | None:
        """Find a shard; None if it has to be made.

        Raises:
            DataError: another job's shard is there, or a damaged one.
        """
        table_path = table_name(shard.file)
        try:
            table = self.storage.read_limited(table_path, MAX_TABLE_BYTES)
        except FileNotFoundError:
            return None
        count, metadata = self._read_footer(table, table_path)
        if metadata.get(_PLAN) != shard.sha256:
            raise DataError(
                f"{self.storage.uri(table_path)}: a shard of another source or with other "
                f"settings is there; {_ADVICE}"
            )
        try:
            problems = [SourceProblem(**values) for values in parse_json(metadata[_PROBLEMS])]
            tar_bytes, tar_sha256 = int(metadata[_TAR_BYTES]), metadata[_TAR_SHA256]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(_describe_damage(self.storage.uri(table_path), error)) from error
        if count == 0:
            return PublishedShard(None, problems)
        try:
            size = self.storage.size(shard.file)
        except FileNotFoundError:
            return None
        if size != tar_bytes:
            raise DataError(
                f"{self.storage.uri(shard.file)}: damaged: it has {size} bytes, expected "
                f"{tar_bytes}; delete it, and run again to make it anew"
            )
        try:
            entry = ShardEntry(
                file=shard.file,
                count=count,
                bytes=size,
                sha256=tar_sha256,
                samples_sha256=hashlib.sha256(table).hexdigest(),
            )
        except ValidationError as error:
            raise DataError(_describe_damage(self.storage.uri(table_path), error)) from error
        return PublishedShard(entry, problems)

    def publish(self, shard: PlannedShard, built: BuiltShard) -> None:
        """Write a shard; one without images is a table alone, which holds the problems.

        Raises:
            DataError: another file is there.
        """
        problems = [problem.model_dump() for problem in built.problems]
        metadata = {
            _PLAN: shard.sha256,
            _TAR_SHA256: hashlib.sha256(built.tar).hexdigest(),
            _TAR_BYTES: str(len(built.tar)),
            _PROBLEMS: json.dumps(problems),
        }
        if len(built.table):
            # The tar before the table, which vouches for it: a kill in between leaves a tar that
            # the next job makes again, with the same bytes.
            self._create(shard.file, built.tar)
        self._create(table_name(shard.file), encode_samples(built.table, metadata))

    def check(self, shard: PlannedShard) -> None:
        """Read a published shard whole.

        Raises:
            DataError: it is damaged, or gone.
        """
        published = self.load(shard)
        if published is None or published.entry is None:
            return
        sha256, _ = hash_object(self.storage, shard.file, max_bytes=published.entry.bytes)
        if sha256 != published.entry.sha256:
            raise DataError(
                f"{self.storage.uri(shard.file)}: damaged: its sha256 is {sha256}, expected "
                f"{published.entry.sha256}; delete it, and run again to make it anew"
            )

    def _read_footer(self, table: bytes, path: str) -> tuple[int, dict[str, str]]:
        try:
            footer = pq.read_metadata(io.BytesIO(table))
            values = {key.decode(): value.decode() for key, value in footer.metadata.items()}
        except (pa.ArrowException, OSError, AttributeError, UnicodeDecodeError) as error:
            raise DataError(_describe_damage(self.storage.uri(path), error)) from error
        return footer.num_rows, values

    def _create(self, path: str, data: bytes) -> None:
        try:
            self.storage.create_bytes(path, data)
        except FileExistsError as error:
            raise DataError(
                f"{self.storage.uri(path)}: another file is there: it is damaged, or of another "
                f"source or with other settings; {_ADVICE}"
            ) from error


def _describe_damage(uri: str, error: Exception) -> str:
    return (
        f"{uri}: damaged: not a table of samples ({error}); delete it, and run again to make it "
        "anew"
    )


class _WorkOnShards:
    """Base of work whose chunks are shards of a plan."""

    local_reason: str | None = None

    def __init__(
        self,
        description: str,
        folder: ShardFolder,
        shards: Sequence[PlannedShard],
        log_storage: Storage | None,
    ) -> None:
        self.description = description
        self.unit = "images"
        self.folder = folder
        self.shards = list(shards)
        self._log_storage = log_storage

    def size(self, chunk: int) -> int:
        """Images of the shard, before any is read."""
        return self.shards[chunk].count

    def set_up_process(self, role: str, number: int) -> None:
        """Set up the logging of a fresh process."""
        label = f"{role} {number} on {socket.gethostname()}"
        log_file = None
        if self._log_storage is not None:
            name = f"{role.replace(' ', '-')}-{number:05d}"
            log_file = open_log_file(self._log_storage, name)
        configure_logging(World(), log_file, label=label)


class ShardWork(_WorkOnShards):
    """Making the shards of a plan."""

    def __init__(
        self,
        folder: ShardFolder,
        shards: Sequence[PlannedShard],
        rows: PlannedRows,
        reader: ImageReader,
        policy: ImagePolicy,
        *,
        split: str,
        is_source_shared: bool,
        is_joining: bool,
        log_storage: Storage | None,
    ) -> None:
        """Take what a process needs to make any shard.

        Args:
            folder: where they are published.
            shards: all of the plan.
            rows: reads which images are in a shard.
            reader: reads the images.
            policy: what is made of them.
            split: part of the dataset, for progress.
            is_source_shared: whether processes on other machines can read the images.
            is_joining: whether another job may be at work on the same plan.
            log_storage: where processes write log files; None: they write none.
        """
        super().__init__(f"writing {split} shards", folder, shards, log_storage)
        self.local_reason = None if is_source_shared else _LOCAL_SOURCE
        self._rows = rows
        self._reader = reader
        self._policy = policy
        # Jobs that start at different shards share the work until they meet.
        self._first = random.SystemRandom().randrange(len(shards)) if is_joining else 0

    def chunks(self) -> Sequence[int]:
        """All shards."""
        numbers = list(range(len(self.shards)))
        return numbers[self._first :] + numbers[: self._first]

    def is_done(self, chunk: int) -> bool:
        """Whether the table is there, which is published last."""
        return self.folder.load(self.shards[chunk]) is not None

    def process(self, chunk: int) -> None:
        """Make a shard, unless another job was faster."""
        if self.is_done(chunk):
            return
        shard = self.shards[chunk]
        samples = self._rows.read(chunk, shard)
        self.folder.publish(shard, build_shard(samples, self._reader, self._policy))


class CheckWork(_WorkOnShards):
    """Reading the shards that an earlier job has published."""

    def __init__(
        self,
        folder: ShardFolder,
        shards: Sequence[PlannedShard],
        *,
        split: str,
        log_storage: Storage | None,
    ) -> None:
        """Take the shards to be checked, see `ShardWork`."""
        super().__init__(f"checking {split} shards", folder, shards, log_storage)

    def chunks(self) -> Sequence[int]:
        """All shards."""
        return range(len(self.shards))

    def is_done(self, chunk: int) -> bool:  # noqa: ARG002
        """Leaves nothing behind, so it is never done."""
        return False

    def process(self, chunk: int) -> None:
        """Check a shard."""
        self.folder.check(self.shards[chunk])

"""Find every damaged file of a dataset, and every damaged image.

The tables of samples are checked first, then the tars, shard by shard and in parallel: their
hashes, or, where it is to be deep, all their samples too, in one pass over each tar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from fqgan_dist.chunks import ProcessLocalCaches, run_in_processes
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import (
    INDEX_NAME,
    SampleTable,
    ShardEntry,
    load_samples,
    table_name,
)
from fqgan_dist.data.prefetch import load_in_threads
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.listing import show_name
from fqgan_dist.sharding.plan_files import load_plan
from fqgan_dist.sharding.problems import load_problems
from fqgan_dist.sharding.repeats import RepeatFinder
from fqgan_dist.sharding.sample_checks import (
    Damage,
    ShardFindings,
    check_shard,
    describe_wrong_file,
)
from fqgan_dist.sharding.sample_rules import INDEXED
from fqgan_dist.sharding.sources.spool import open_spool_folder
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.storage.hashing import hash_object
from fqgan_dist.storage.links import RefusedObjectError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import SILENT, Observer
from fqgan_dist.telemetry.progress import ProgressBar
from fqgan_dist.world import World

_PLAN = re.compile(r"(plan|extension-[0-9]+)\.json")
_FORMER_INDEX = re.compile(r"index-([0-9a-f]{16})\.json")
_THREADS = 16
"""Requests at once; each is mostly waiting where the dataset is in a bucket."""
_LOOKS = 2
"""Times that something damaged is read: its bytes may have been changed on the way."""
_MIB = 2**20
"""Unit of progress."""
_MAX_SHOWN_DUPLICATES = 1000


@dataclass
class VerifyReport:
    """What was checked and found."""

    dataset_id: str | None = None
    """The sha256 of the index; None where the index is damaged."""
    num_shards: int = 0
    """Shards that were checked."""
    num_samples: int = 0
    """Images that the index promises."""
    num_decoded: int = 0
    """Images that were decoded."""
    damages: list[Damage] = field(default_factory=list)
    """Everything that is wrong, sorted by where it is."""
    unlisted_files: list[str] = field(default_factory=list)
    """Files that the index does not name: not damage, but nobody reads them."""
    num_duplicates: int = 0
    """Images with the very bytes of another one: not damage. Counted where it was deep."""
    duplicates: list[list[str]] = field(default_factory=list)
    """The first of these images, with the others of the same bytes."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


def verify_dataset(
    folder: Storage,
    *,
    is_deep: bool,
    workers: int = 1,
    observer: Observer = SILENT,
) -> VerifyReport:
    """Check a dataset against its index.

    Args:
        folder: of the dataset.
        is_deep: whether to decode every image and to compare it with its table, too.
        workers: processes that read shards.
        observer: is told how far it is.

    Raises:
        DataError: there is no dataset, or the storage cannot be read.
    """
    report = VerifyReport()
    if not folder.exists(INDEX_NAME):
        raise DataError(f"{folder.uri(INDEX_NAME)}: no such file; name the folder of a dataset")
    try:
        dataset = Dataset.open(folder)
    except DataError as error:
        report.damages.append(Damage(INDEX_NAME, str(error)))
        return report
    report.dataset_id, report.num_samples = dataset.id, dataset.index.num_samples
    report.num_shards = len(dataset.index.shards)
    planned = _check_companions(dataset, report)
    _find_repeats(dataset, report, is_deep=is_deep, observer=observer)
    if is_deep:
        with open_spool_folder() as scratch:
            work = _ShardChecks(dataset, planned, Storage(scratch))
            run_in_processes(work, workers=workers, observer=observer)
            for findings in work.results():
                report.damages += findings.damages
                report.num_decoded += findings.num_decoded
    else:
        _check_hashes(dataset, report, workers=workers, observer=observer)
    report.damages.sort(key=lambda damage: (damage.where, damage.reason))
    return report


@dataclass(frozen=True)
class _ShardChecks(ProcessLocalCaches):
    """Checks of all samples of all shards; their results go to a scratch folder."""

    dataset: Dataset
    planned: frozenset[str]
    scratch: Storage

    description = "verifying"
    unit = "MiB"
    local_reason = None

    def chunks(self) -> Sequence[int]:
        return range(len(self.dataset.index.shards))

    def size(self, chunk: int) -> int:
        return _count_mib(self.dataset.index.shards[chunk])

    def is_done(self, chunk: int) -> bool:
        return self.scratch.exists(_result_name(chunk))

    def process(self, chunk: int) -> None:
        entry = self.dataset.index.shards[chunk]
        is_indexed = self.dataset.index.image_policy.get("kind") == INDEXED
        findings = ShardFindings()
        for _ in range(_LOOKS):
            findings = check_shard(
                self.dataset,
                entry,
                is_foreign=is_indexed and entry.file not in self.planned,
                left_out=self._left_out,
            )
            if not findings.damages:
                break
        self.scratch.write_bytes(_result_name(chunk), json.dumps(asdict(findings)).encode())

    def set_up_process(self, role: str, number: int) -> None:
        configure_logging(World(), None, label=f"{role} {number}")

    def results(self) -> Iterator[ShardFindings]:
        """Yield what was found in every shard, in order."""
        for chunk in self.chunks():
            values = parse_json(self.scratch.read_bytes(_result_name(chunk)))
            damages = [Damage(**damage) for damage in values["damages"]]
            yield ShardFindings(damages, values["num_decoded"])

    @cached_property
    def _left_out(self) -> frozenset[str]:
        if self.dataset.index.image_policy.get("kind") != INDEXED:
            return frozenset()
        try:
            problems = load_problems(self.dataset)
        except DataError:  # reported where these tables are checked
            problems = self.dataset.index.problems
        return frozenset(problem.name for problem in problems)


def _result_name(chunk: int) -> str:
    return f"{chunk:06d}.json"


def _count_mib(entry: ShardEntry) -> int:
    return -(-entry.bytes // _MIB)


def _check_hashes(
    dataset: Dataset,
    report: VerifyReport,
    *,
    workers: int,
    observer: Observer,
) -> None:
    shards = dataset.index.shards

    def find_fault(entry: ShardEntry) -> str | None:
        reason = None
        for _ in range(_LOOKS):
            try:
                reason = describe_wrong_file(
                    entry, *hash_object(dataset.folder, entry.file, max_bytes=entry.bytes)
                )
            except FileNotFoundError:
                return "missing"
            except RefusedObjectError as error:
                return str(error)
            if reason is None:
                break
        return reason

    # Threads: hashing lets go of the interpreter lock.
    reasons = load_in_threads(find_fault, shards, threads=workers, ahead=workers)
    with observer.track(sum(map(_count_mib, shards)), "verifying", "MiB") as bar:
        for entry, reason in zip(shards, reasons, strict=True):
            if reason is not None:
                report.damages.append(Damage(entry.file, reason))
            bar.advance(_count_mib(entry))


def _check_tables(
    dataset: Dataset, report: VerifyReport, bar: ProgressBar
) -> Iterator[tuple[ShardEntry, SampleTable]]:
    """Yield every table that is whole, with its shard."""
    shards = dataset.index.shards
    load = partial(_try_to_load, dataset.folder)
    tables = load_in_threads(load, shards, threads=_THREADS, ahead=_THREADS)
    for entry, table in zip(shards, tables, strict=True):
        if isinstance(table, DataError):
            report.damages.append(Damage(entry.samples_file, str(table)))
        else:
            yield entry, table
        bar.advance()


def _try_to_load(folder: Storage, entry: ShardEntry) -> SampleTable | DataError:
    fault = DataError("never read")
    for _ in range(_LOOKS):
        try:
            return load_samples(folder, entry)
        except DataError as error:
            fault = error
    return fault


def _find_repeats(
    dataset: Dataset,
    report: VerifyReport,
    *,
    is_deep: bool,
    observer: Observer,
) -> None:
    """Check all tables; find keys and, where it is deep, images that occur twice."""
    index = dataset.index
    keys, images = RepeatFinder(), RepeatFinder()
    with observer.track(len(index.shards), "reading tables", "shards") as bar:
        for entry, table in _check_tables(dataset, report, bar):
            keys.add(table.keys)
            if is_deep:
                images.add(map(bytes, table.digests))
            report.damages += [
                Damage(
                    f"{entry.samples_file}: {table.keys[row]}",
                    f"label {table.labels[row]}; there are {index.num_classes} classes",
                )
                for row in np.flatnonzero(table.labels >= index.num_classes).tolist()
            ]
    if not keys.has_suspects and not images.has_suspects:
        return
    # Hashes met somewhere: only the tables themselves tell what really occurs twice.
    first_file: dict[str, str] = {}
    groups: dict[bytes, list[str]] = {}
    with observer.track(len(index.shards), "reading tables", "shards") as bar:
        for entry, table in _check_tables(dataset, VerifyReport(), bar):
            for key, digest in zip(table.keys, map(bytes, table.digests), strict=True):
                if keys.is_suspect(key):
                    other = first_file.setdefault(key, entry.file)
                    if other != entry.file:
                        where = f"{entry.samples_file}: {key}"
                        report.damages.append(Damage(where, f"the key occurs in {other} too"))
                if is_deep and images.is_suspect(digest):
                    groups.setdefault(digest, []).append(f"{entry.file}: {key}")
    repeated = [names for names in groups.values() if len(names) > 1]
    report.num_duplicates = sum(len(names) - 1 for names in repeated)
    report.duplicates = repeated[:_MAX_SHOWN_DUPLICATES]


def _check_companions(dataset: Dataset, report: VerifyReport) -> frozenset[str]:
    """Check problem tables and plans, and list the files that nothing names.

    Returns:
        The shards that plans name: those that were made by us.
    """
    folder, index = dataset.folder, dataset.index
    known = {INDEX_NAME} | {
        name for entry in index.shards for name in (entry.file, entry.samples_file)
    }
    for table in index.problem_tables:
        known.add(table.file)
        _check_file(folder, table.file, table.sha256, report)
    names = folder.list()
    planned: set[str] = set()
    for name in names:
        if (former := _FORMER_INDEX.fullmatch(name)) is not None:
            known.add(name)
            _check_file(folder, name, former[1], report)
        if (plan_name := _PLAN.fullmatch(name)) is not None:
            known |= {name, f"{plan_name[1]}.parquet"}
            planned |= _check_plan(folder, plan_name[1], report)
    # A shard without any usable image is a table alone, and not in the index.
    known.update(map(table_name, planned))
    report.unlisted_files = sorted(map(show_name, set(names) - known))
    return frozenset(planned)


def _check_plan(folder: Storage, stem: str, report: VerifyReport) -> set[str]:
    """Check a plan; give the shards that it names."""
    try:
        plan = load_plan(folder, stem)
    except DataError as error:
        report.damages.append(Damage(f"{stem}.json", str(error)))
        return set()
    assert plan is not None, "it was in the list of files"
    _check_file(folder, f"{stem}.parquet", plan.rows_sha256, report)
    return {shard.file for shard in plan.shards}


def _check_file(folder: Storage, name: str, sha256: str, report: VerifyReport) -> None:
    """Check the hash of a file, of which the beginning may be all that is known."""
    try:
        found, _ = hash_object(folder, name)
    except FileNotFoundError:
        report.damages.append(Damage(name, "missing"))
        return
    except RefusedObjectError as error:
        report.damages.append(Damage(name, str(error)))
        return
    if not found.startswith(sha256):
        report.damages.append(Damage(name, f"its sha256 is {found}; expected {sha256}"))

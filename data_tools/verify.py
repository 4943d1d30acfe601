"""`fqgan-data verify`: find every damaged file, and with `deep=true` every damaged image."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import Field

from data_tools.tar_scan import StoredSample, scan_tar
from fqgan_dist.config import Config
from fqgan_dist.data.decoding import decode_image
from fqgan_dist.data.index import (
    INDEX_NAME,
    DatasetIndex,
    SampleTable,
    ShardEntry,
    hash_object,
    load_index,
    load_samples,
)
from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.sources.opening import Progress

Row = tuple[str, int, int, int, int]
"""Label, offset and size of the image, width, height."""


class VerifyOptions(Config):
    """Options of `fqgan-data verify`."""

    deep: bool = False
    """Also decode every image and compare every label, place and size; else only hashes."""
    workers: int = Field(default=4, ge=1)
    """Threads that decode images."""


@dataclass(frozen=True)
class Damage:
    """One damaged thing."""

    where: str
    """File, or `file: sample key`."""
    reason: str
    """What is wrong with it."""


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
    """Everything that is wrong."""
    unlisted_files: list[str] = field(default_factory=list)
    """Files that the index does not name: not damage, but nobody reads them."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


def verify(uri: str, options: VerifyOptions, *, progress: Progress) -> VerifyReport:
    """Check a dataset against its index.

    Raises:
        DataError: there is no dataset.
    """
    storage = Storage(uri)
    report = VerifyReport()
    if not storage.exists(INDEX_NAME):
        raise DataError(f"{storage.uri(INDEX_NAME)}: no such file; name the folder of a dataset")
    try:
        index = load_index(storage, "")
    except DataError as error:
        report.damages.append(Damage(INDEX_NAME, str(error)))
        return report
    report.dataset_id, report.num_samples = index.dataset_id, index.num_samples
    known = {name for shard in index.shards for name in (shard.file, shard.samples_file)}
    report.unlisted_files = sorted(set(storage.list()) - known - {INDEX_NAME})
    keys: dict[str, str] = {}
    with ThreadPoolExecutor(options.workers) as executor:
        for shard in index.shards:
            table = _check_table(storage, index, shard, keys, report)
            is_readable = _check_hash(storage, shard, report)
            if options.deep and is_readable:
                _check_samples(storage, shard, table, executor, report)
            report.num_shards += 1
            progress("verifying", report.num_shards, len(index.shards))
    return report


def _check_hash(storage: Storage, shard: ShardEntry, report: VerifyReport) -> bool:
    """Compare a tar's size and hash; whether it is there to be looked at more closely."""
    try:
        sha256, size = hash_object(storage, shard.file)
    except FileNotFoundError:
        report.damages.append(Damage(shard.file, "missing"))
        return False
    if size != shard.bytes:
        report.damages.append(Damage(shard.file, f"{size} bytes; the index has {shard.bytes}"))
    elif sha256 != shard.sha256:
        report.damages.append(
            Damage(shard.file, f"its sha256 is {sha256}; the index has {shard.sha256}")
        )
    return True


def _check_table(
    storage: Storage,
    index: DatasetIndex,
    shard: ShardEntry,
    keys: dict[str, str],
    report: VerifyReport,
) -> SampleTable | None:
    try:
        table = load_samples(storage, "", shard)
    except DataError as error:
        report.damages.append(Damage(shard.samples_file, str(error)))
        return None
    for key, label in zip(table.keys, table.labels.tolist(), strict=True):
        where = f"{shard.samples_file}: {key}"
        if label >= index.num_classes:
            reason = f"label {label}; there are {index.num_classes} classes"
            report.damages.append(Damage(where, reason))
        if (other := keys.setdefault(key, shard.file)) != shard.file:
            report.damages.append(Damage(where, f"the key occurs in {other} too"))
    return table


def _check_samples(
    storage: Storage,
    shard: ShardEntry,
    table: SampleTable | None,
    executor: Executor,
    report: VerifyReport,
) -> None:
    """Decode every image of a tar and compare it with the table, if that is whole."""
    tar = storage.read_bytes(shard.file)
    found, fault = scan_tar(tar)
    if fault:
        report.damages.append(Damage(shard.file, fault))
    rows = _rows(table) if table is not None else None
    faults = executor.map(lambda key: _find_fault(tar, key, found[key], rows), found)
    reasons = dict(zip(found, faults, strict=True))
    reasons |= {key: "not in the tar" for key in rows or () if key not in found}
    report.num_decoded += len(found)
    report.damages += [
        Damage(f"{shard.file}: {key}", reason) for key, reason in reasons.items() if reason
    ]


def _find_fault(
    tar: bytes, key: str, stored: StoredSample, rows: dict[str, Row] | None
) -> str | None:
    """Say what is wrong with a sample; None if nothing is."""
    try:
        image = decode_image(tar[stored.offset : stored.offset + stored.size], name=key)
    except DataError as error:
        return str(error).removeprefix(f"{key}: ")
    if rows is None:
        return None
    if key not in rows:
        return "not in the table of samples"
    found = (stored.label, stored.offset, stored.size, image.width, image.height)
    if found != rows[key]:
        return f"(label, offset, size, width, height) is {found}; the table has {rows[key]}"
    return None


def _rows(table: SampleTable) -> dict[str, Row]:
    labels = map(str, table.labels.tolist())
    numbers = (table.offsets, table.sizes, table.widths, table.heights)
    columns = (column.tolist() for column in numbers)
    return dict(zip(table.keys, zip(labels, *columns, strict=True), strict=True))

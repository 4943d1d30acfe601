"""Check a tar against its table of samples: every hash, place, label and image, in one pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.decoding import decode_image
from fqgan_dist.data.index import (
    SampleTable,
    ShardEntry,
    image_digest,
    load_samples,
)
from fqgan_dist.data.views import find_fault_of_shape
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.droppings import find_dropping
from fqgan_dist.sharding.images import ImagePolicy
from fqgan_dist.sharding.sample_rules import Labelling, SampleRules
from fqgan_dist.sharding.tar_scanning import TarMember, TarSample, TarScan, group_samples
from fqgan_dist.storage.storage import Storage


@dataclass(frozen=True)
class Damage:
    """One damaged thing."""

    where: str
    """File, or `file: sample key`."""
    reason: str
    """What is wrong with it."""


@dataclass
class ShardFindings:
    """What was found in a tar."""

    damages: list[Damage] = field(default_factory=list)
    """Everything that is wrong."""
    num_decoded: int = 0
    """Images that were decoded."""


def describe_wrong_file(entry: ShardEntry, sha256: str, size: int) -> str | None:
    """Say how a tar's size or hash is wrong; None if they are right."""
    if size != entry.bytes:
        return f"{size} bytes; the index has {entry.bytes}"
    if sha256 != entry.sha256:
        return f"its sha256 is {sha256}; the index has {entry.sha256}"
    return None


def check_shard(
    dataset: Dataset,
    entry: ShardEntry,
    *,
    is_foreign: bool,
    left_out: Collection[str],
) -> ShardFindings:
    """Read a tar once, and compare it with its table.

    Args:
        dataset: the dataset.
        entry: its shard.
        is_foreign: whether somebody else made it, so that it was only indexed.
        left_out: `file/key` or `file/member` of what is in others' tars, but not in the dataset.
    """
    check = _ShardCheck(dataset, entry, left_out, is_foreign=is_foreign)
    try:
        with dataset.folder.open_read(entry.file) as stream:
            scan = TarScan(stream, source=dataset.folder.uri(entry.file))
            check.check_samples(scan)
            reason = describe_wrong_file(entry, *scan.finish())
    except FileNotFoundError:
        reason = "missing"
    except DataError as error:
        reason = str(error)
    if reason is not None:
        check.findings.damages.append(Damage(entry.file, reason))
    return check.findings


class _ShardCheck:
    def __init__(
        self,
        dataset: Dataset,
        entry: ShardEntry,
        left_out: Collection[str],
        *,
        is_foreign: bool,
    ) -> None:
        self.findings = ShardFindings()
        self._file = entry.file
        self._left_out = left_out
        self._rules = (
            SampleRules.of_dataset(dataset.index.image_policy) if is_foreign else SampleRules()
        )
        policy = ImagePolicy.parse_description(dataset.index.image_policy)
        self._view_short_side = policy.view_short_side
        self._labelling = Labelling.of_dataset(dataset.index, is_foreign=is_foreign)
        self._table = _load_table(dataset.folder, entry)
        keys = [] if self._table is None else self._table.keys
        self._rows = {key: row for row, key in enumerate(keys)}

    def check_samples(self, scan: TarScan) -> None:
        missing = dict(self._rows)
        seen: set[str] = set()
        try:
            members = self._note_dangers(scan.members(self._rules.is_wanted))
            for sample in group_samples(members):
                reason = self._find_fault(sample)
                if sample.key in seen and not self._is_left_out(sample):
                    reason = "the key occurs twice in the tar"
                if reason is not None:
                    self._note(f"{self._file}: {sample.key}", reason)
                seen.add(sample.key)
                missing.pop(sample.key, None)
        except DataError as error:
            self._note(self._file, str(error))
        for key in missing:
            self._note(f"{self._file}: {key}", "not in the tar")

    def _note(self, where: str, reason: str) -> None:
        self.findings.damages.append(Damage(where, reason))

    def _note_dangers(self, members: Iterable[TarMember]) -> Iterator[TarMember]:
        for member in members:
            is_known = f"{self._file}/{member.name}" in self._left_out
            if member.danger is not None and not is_known:
                self._note(f"{self._file}: {member.name}", member.danger)
            yield member

    def _is_left_out(self, sample: TarSample) -> bool:
        is_noted = f"{self._file}/{sample.key}" in self._left_out
        is_known = is_noted or find_dropping(sample.key) is not None
        return is_known and sample.key not in self._rows

    def _find_fault(self, sample: TarSample) -> str | None:
        if self._is_left_out(sample):
            return None
        row = self._rows.get(sample.key)
        try:
            member = self._rules.find_image(sample)
            assert member.data is not None, "an image's bytes were asked for"
            self.findings.num_decoded += 1
            image = decode_image(member.data, name=sample.key)
            if fault := find_fault_of_shape(*image.size, self._view_short_side):
                return fault
            label = self._labelling.number_of(self._rules.find_label(sample))
        except DataError as error:
            return str(error).removeprefix(f"{sample.key}: ")
        table = self._table
        if table is None:
            return None
        if row is None:
            return "not in the table of samples"
        found = (label, member.offset, member.size, image.width, image.height)
        expected = tuple(
            int(column[row])
            for column in (table.labels, table.offsets, table.sizes, table.widths, table.heights)
        )
        if found != expected:
            return f"(label, offset, size, width, height) is {found}; the table has {expected}"
        if image_digest(member.data) != table.digests[row].tobytes():
            return "other bytes than those of the table, though they decode"
        return None


def _load_table(folder: Storage, entry: ShardEntry) -> SampleTable | None:
    try:
        return load_samples(folder, entry)
    except DataError:
        return None  # reported where the tables are checked

"""An index for WebDataset shards that somebody else made: not one byte of a tar is rewritten.

Each tar is read once, as a stream, in parallel processes: hashed, its samples found and their sizes
read from the images' headers. When all are known, a table of samples is put beside every tar, and
`index.json` comes last. Nothing is published before every tar was read, so a job that is
interrupted leaves the folder as it was, or with tables that the next one finds to be its own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fqgan_dist.chunks import run_in_processes
from fqgan_dist.credentials import holds_credentials
from fqgan_dist.data.config import USUAL_VIEW_SHORT_SIDE
from fqgan_dist.data.index import (
    INDEX_NAME,
    ClassName,
    DatasetIndex,
    ShardEntry,
    ShardName,
    SourceProblem,
    encode_samples,
    load_index,
    table_name,
    write_index,
)
from fqgan_dist.data.prefetch import load_in_threads
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.config import NO_CLASSES, THE_ONLY_CLASS
from fqgan_dist.sharding.file_names import COMPRESSED_SUFFIXES, TAR_SUFFIX
from fqgan_dist.sharding.foreign_scan import ShardScan, describe_repeat, scan_shard
from fqgan_dist.sharding.images import describe_view_short_side
from fqgan_dist.sharding.labels import describe_classes
from fqgan_dist.sharding.listing import HOLDS_CREDENTIALS, sort_problems
from fqgan_dist.sharding.problems import (
    NUM_INDEXED_PROBLEMS,
    describe_kinds,
    find_kinds,
    write_problems,
)
from fqgan_dist.sharding.repeats import RepeatFinder
from fqgan_dist.sharding.sample_rules import INDEXED, Labelling, SampleRules, parse_number
from fqgan_dist.sharding.sources.shard_pattern import match_pattern
from fqgan_dist.sharding.sources.spool import open_spool_folder
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import SILENT, Observer
from fqgan_dist.world import World

_MAX_CLASSES = 1_000_000
_MAX_NAMED_CLASSES = 100_000
_SHOWN_NAMES = 5

logger = logging.getLogger(__name__)
_THREADS = 16
"""Requests at once; each is mostly waiting where the shards are in a bucket."""
_MIB = 2**20
"""Unit of progress; a gibibyte of shards takes seconds."""


class IndexConfig(SampleRules):
    """What index to make."""

    name: str = Field(min_length=1)
    """Name of the dataset, for people."""
    split: str = Field(min_length=1)
    """Part of the dataset: `train`, `val` ..."""
    files: str = "*.tar"
    """Pattern of the shards' names, where a folder holds others too."""
    label_kind: Literal["auto", "numbers", "names"] = "auto"
    """Whether labels are numbers from 0 or names of classes; auto: numbers if all of them are."""
    view_short_side: int = Field(default=USUAL_VIEW_SHORT_SIDE, ge=1)
    """As of `fqgan-data shard`: images of which no view of this short side can be made are left
    out."""
    deep: bool = False
    """Decode every image, and leave out those that cannot be; else only their headers are read."""


@dataclass(frozen=True)
class IndexReport:
    """What a call of `index_shards` did."""

    was_complete: bool
    """Whether this very index was there."""
    index: DatasetIndex
    """The index."""


@dataclass(frozen=True)
class _ScanWork:
    """The scans of all shards; their results go to a scratch folder."""

    folder: Storage
    files: Sequence[str]
    sizes: Sequence[int]
    config: IndexConfig
    scratch: Storage

    description = "indexing"
    unit = "MiB"
    local_reason = None

    def chunks(self) -> Sequence[int]:
        return range(len(self.files))

    def size(self, chunk: int) -> int:
        return -(-self.sizes[chunk] // _MIB)

    def is_done(self, chunk: int) -> bool:
        return self.scratch.exists(_result_name(chunk))

    def process(self, chunk: int) -> None:
        config = self.config
        scan = scan_shard(
            self.folder,
            self.files[chunk],
            config,
            is_deep=config.deep,
            view_short_side=config.view_short_side,
        )
        self.scratch.write_bytes(_result_name(chunk), scan.to_bytes())

    def set_up_process(self, role: str, number: int) -> None:
        configure_logging(World(), None, label=f"{role} {number}")

    def results(self) -> Iterator[tuple[str, ShardScan]]:
        """Yield name and scan of every shard, in order."""
        for chunk, file in enumerate(self.files):
            yield file, ShardScan.from_bytes(self.scratch.read_bytes(_result_name(chunk)))


def index_shards(
    folder: Storage,
    config: IndexConfig,
    *,
    classes: Sequence[str] | None = None,
    class_descriptions: Mapping[str, str] | None = None,
    workers: int = 1,
    observer: Observer = SILENT,
) -> IndexReport:
    """Write tables of samples and an index beside the shards of a folder.

    Args:
        folder: where the shards are.
        config: what is in them.
        classes: class names in the order of their labels; None: the numbers or names that occur.
        class_descriptions: readable names of classes; None: there are none.
        workers: processes that read shards; they do not change the result.
        observer: is told how far it is.

    Raises:
        DataError: no shards, or compressed, damaged or badly named ones; another index is there;
            two samples share a key; labels are missing, mixed or not in `classes`.
    """
    files = _find_shards(folder, config.files)
    if (finished := _load_finished(folder, config, files, classes)) is not None:
        return IndexReport(True, finished)
    with open_spool_folder() as scratch:
        work = _ScanWork(folder, list(files), list(files.values()), config, Storage(scratch))
        run_in_processes(work, workers=workers, observer=observer)
        labelling = _choose_labels(folder, config, _survey(folder, work), classes)
        logger.info("%s", describe_classes(labelling.classes))
        # Nothing is written before this line: every tar is read, every key and label known to fit.
        entries, problems = _publish_tables(folder, work, labelling)
    table = write_problems(folder, "index", problems)
    num_empty = len(files) - len(entries)
    policy = _describe_policy(config) | {"label_kind": labelling.kind}
    index = DatasetIndex(
        name=config.name,
        split=config.split,
        classes=labelling.classes,
        class_descriptions=dict(class_descriptions or {}),
        image_policy=policy | ({"empty_shards": num_empty} if num_empty else {}),
        shards=entries,
        problems=problems[:NUM_INDEXED_PROBLEMS],
        problem_tables=[] if table is None else [table],
    )
    write_index(folder, index)
    return IndexReport(False, index)


def _find_shards(folder: Storage, pattern: str) -> dict[str, int]:
    """Give names and sizes of the shards, sorted.

    Raises:
        DataError: there are none, or their names or kinds are not usable.
    """
    found = folder.list()
    names = [name for name in match_pattern(pattern, found)[0] if name.endswith(TAR_SUFFIX)]
    if not names:
        compressed = [name for name in found if name.endswith(COMPRESSED_SUFFIXES)]
        what = f"only compressed ones ({compressed[0]} ...)" if compressed else "none"
        raise DataError(
            f"{folder.root}: expected shards {pattern!r} directly in this folder, found {what}; "
            "name the folder that holds the .tar files, and unpack what is compressed: images are "
            "read from the middle of a shard"
        )
    try:
        TypeAdapter(list[ShardName]).validate_python(names)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"{folder.root}: {reason}; rename the shard") from None
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(folder.size, names), strict=True))


def _result_name(chunk: int) -> str:
    return f"{chunk:06d}.parquet"


def _load_finished(
    folder: Storage,
    config: IndexConfig,
    files: Mapping[str, int],
    classes: Sequence[str] | None,
) -> DatasetIndex | None:
    """Load the index if it is of these shards and settings.

    Raises:
        DataError: another index is there.
    """
    if not folder.exists(INDEX_NAME):
        return None
    index = load_index(folder)
    policy = dict(index.image_policy)
    kind, num_empty = policy.pop("label_kind", None), policy.pop("empty_shards", 0)
    is_same = (
        (index.name, index.split) == (config.name, config.split)
        and policy == _describe_policy(config)
        and config.label_kind in ("auto", kind)
        and (classes is None or index.classes == list(classes))
        and {shard.file: shard.bytes for shard in index.shards}.items() <= files.items()
        and len(files) - len(index.shards) == num_empty
    )
    if not is_same:
        raise DataError(
            f"{folder.uri(INDEX_NAME)}: an index of other shards or with other settings is there; "
            "look at it with `fqgan-data stats`, and delete it first if it shall be replaced"
        )
    return index


def _describe_policy(config: IndexConfig) -> dict[str, Any]:
    rules = SampleRules(**config.model_dump(include=set(SampleRules.model_fields)))
    return {
        "kind": INDEXED,
        "files": config.files,
        "decoded": config.deep,
        **describe_view_short_side(config.view_short_side),
        **rules.describe(),
    }


def _survey(folder: Storage, work: _ScanWork) -> set[str]:
    """Give the texts of all labels, once it is known that no two samples share a key.

    Raises:
        DataError: two do, or there is no usable sample.
    """
    texts: set[str] = set()
    problems: list[SourceProblem] = []
    finder = RepeatFinder()
    for _, scan in work.results():
        finder.add(sample.key for sample in scan.samples)
        texts.update(scan.labels)
        if not texts:
            problems = find_kinds([*problems, *scan.problems])
    if finder.has_suspects:
        _refuse_repeats(folder, work, finder)
    if not texts:
        found = describe_kinds(problems) if problems else "they are empty"
        raise DataError(f"{folder.root}: no shard holds a sample that can be used: {found}")
    return texts


def _refuse_repeats(folder: Storage, work: _ScanWork, finder: RepeatFinder) -> None:
    first_file: dict[str, str] = {}
    for file, scan in work.results():
        for key in filter(finder.is_suspect, (sample.key for sample in scan.samples)):
            if (other := first_file.setdefault(key, file)) != file:
                raise DataError(f"{folder.root}: {describe_repeat(key, other, file)}")


def _choose_labels(
    folder: Storage, config: IndexConfig, texts: set[str], classes: Sequence[str] | None
) -> Labelling:
    """Decide what the texts of labels mean.

    Raises:
        DataError: texts are mixed, or no names or numbers of classes.
    """
    if config.labels == NO_CLASSES:
        return Labelling(list(classes or [THE_ONLY_CLASS]), "none")
    numbers = {text for text in texts if parse_number(text) is not None}
    kind = config.label_kind
    if kind == "auto":
        if numbers and numbers != texts:
            raise DataError(
                f"{folder.root}: labels are numbers ({_show(numbers)}) and other texts "
                f"({_show(texts - numbers)}); say which count with label_kind=numbers or names"
            )
        kind = "numbers" if numbers else "names"
    if kind == "numbers":
        return Labelling(_name_numbers(folder, numbers, classes), "numbers")
    return Labelling(_check_class_names(folder, texts, classes), "names")


def _name_numbers(folder: Storage, numbers: set[str], classes: Sequence[str] | None) -> list[str]:
    greatest = max(map(int, numbers), default=0)
    if not numbers or greatest >= (_MAX_CLASSES if classes is None else len(classes)):
        expected = f"numbers from 0 to {(_MAX_CLASSES if classes is None else len(classes)) - 1}"
        raise DataError(
            f"{folder.root}: labels go up to {greatest}; expected {expected}; correct the class "
            "list, or say where classes are with class_key="
            if numbers
            else f"{folder.root}: no label is a number; use label_kind=names"
        )
    return [str(number) for number in range(greatest + 1)] if classes is None else list(classes)


def _check_class_names(
    folder: Storage, texts: set[str], classes: Sequence[str] | None
) -> list[str]:
    if classes is not None:
        if unknown := texts - set(classes):
            raise DataError(
                f"{folder.root}: {len(unknown)} labels are not in the given list of "
                f"{len(classes)} classes: {_show(unknown)}; correct the list"
            )
        return list(classes)
    if len(texts) > _MAX_NAMED_CLASSES:
        raise DataError(
            f"{folder.root}: {len(texts)} different labels ({_show(texts)}); these look like "
            "captions, not classes; use class_key=none, or another member"
        )
    if any(map(holds_credentials, texts)):
        raise DataError(
            f"{folder.root}: a label is {HOLDS_CREDENTIALS}; use class_key=none, or another member"
        )
    try:
        return TypeAdapter(list[ClassName]).validate_python(sorted(texts))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"{folder.root}: {reason}; use class_key=none, or another member") from None


def _publish_tables(
    folder: Storage, work: _ScanWork, labelling: Labelling
) -> tuple[list[ShardEntry], list[SourceProblem]]:
    """Write the tables; give the shards that hold samples, and all problems, sorted."""
    entries: list[ShardEntry] = []
    problems: list[SourceProblem] = []
    publish = partial(_publish_table, folder, labelling)
    results = load_in_threads(publish, work.results(), threads=_THREADS, ahead=_THREADS)
    for entry, found in results:
        problems += found
        if entry is not None:
            entries.append(entry)
    if not entries:
        raise DataError(
            f"{folder.root}: no sample has a label that is a number; use label_kind=names"
        )
    return entries, sort_problems(problems)


def _publish_table(
    folder: Storage, labelling: Labelling, result: tuple[str, ShardScan]
) -> tuple[ShardEntry | None, list[SourceProblem]]:
    file, scan = result
    labelled = [(sample, labelling.number_of(sample.label)) for sample in scan.samples]
    problems = scan.problems + [
        SourceProblem(
            name=f"{file}/{sample.key}",
            reason=f"label {sample.label!r} is no number",
            action="skipped",
        )
        for sample, number in labelled
        if number is None
    ]
    kept = [(sample, number) for sample, number in labelled if number is not None]
    if not kept:
        reason = "the shard holds no usable sample"
        return None, [*problems, SourceProblem(name=file, reason=reason, action="skipped")]
    used = replace(scan, samples=[sample for sample, _ in kept])
    table = encode_samples(used.tabulate([number for _, number in kept]), {})
    try:
        folder.create_bytes(table_name(file), table)
    except FileExistsError as error:
        raise DataError(
            f"{folder.uri(table_name(file))}: another table is there, of an index job with other "
            "settings that did not finish; delete the files *.samples.parquet first"
        ) from error
    entry = ShardEntry(
        file=file,
        count=len(kept),
        bytes=scan.num_bytes,
        sha256=scan.sha256,
        samples_sha256=hashlib.sha256(table).hexdigest(),
    )
    return entry, problems


def _show(texts: set[str]) -> str:
    return ", ".join(repr(text) for text in sorted(texts)[:_SHOWN_NAMES])

"""WebDataset shards as a source: by their index where they have one, else by a pass over them.

Shards are hostile input: nothing in them is unpickled, unpacked or run (see `tar_scanning`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fqgan_dist.config import parse_config
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import (
    INDEX_NAME,
    SampleTable,
    ShardEntry,
    load_samples,
    parse_index,
)
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.config import NO_CLASSES, THE_ONLY_CLASS, SourceOptions
from fqgan_dist.sharding.droppings import is_dropping
from fqgan_dist.sharding.file_names import TAR_SUFFIX
from fqgan_dist.sharding.listing import ListingBuilder, Place, SourceListing
from fqgan_dist.sharding.sample_rules import SampleRules, parse_number
from fqgan_dist.sharding.sample_scanning import OddMember, SampleScan
from fqgan_dist.sharding.sources.concurrency import map_in_order
from fqgan_dist.sharding.sources.locations import locate_files
from fqgan_dist.sharding.sources.readers import RangeReader
from fqgan_dist.sharding.sources.splits import choose_files
from fqgan_dist.sharding.tar_scanning import TarScan
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer

_EXPECTED = "samples with an image and a class"
_DEFAULT_CLASS_KEY = "cls"
_FORMAT_MARK = b'"fqgan-dataset-'
_SHOWN_NAMES = 3
# What stands beside shards and is no data: our own files, and what other tools write there.
_COMPANIONS = re.compile(r".*\.(json|jsonl|parquet|csv|txt|md|idx|yaml)|README|LICENSE|\..*")


def list_shards(
    uri: str, options: SourceOptions, observer: Observer, *, split: str
) -> SourceListing:
    """List the samples of shards.

    Args:
        uri: a folder of shards, one shard, or a pattern such as `shard-{000000..000146}.tar`.
        options: how they are read.
        observer: is told how far it is.
        split: which shards are meant, where the folder has some of several splits and no index.

    Raises:
        ConfigError: the pattern is wrong, or the split cannot be told.
        DataError: a shard is missing or damaged, no class can be found, or keys are repeated.
    """
    storage, shards, odd = _find_shards(uri)
    rescan = options.class_key is not None or options.image_key is not None
    is_folder = not _names_tars(uri)
    dataset = None if rescan else _open_dataset_of(storage, shards, is_folder=is_folder)
    other_splits: Collection[str] = ()
    if dataset is not None:
        # What lies beside a dataset, as the shards of an interrupted extension, is not part of it.
        strays = sorted(set(shards) - {entry.file for entry in dataset.index.shards})
        builder = ListingBuilder(uri, check_bytes=16, expected=_EXPECTED)
        _list_by_tables(dataset, shards, builder, options, observer)
        classes = dataset.index.classes
    else:
        strays = []
        builder = ListingBuilder(uri, expected=_EXPECTED)
        shards, other_splits = choose_files(uri, shards, split)
        _list_by_scans(storage, shards, builder, options, observer)
        classes = None
    for name in odd:
        builder.skip(name, "not a shard: a plain .tar")
    for name in strays:
        builder.skip(name, f"{INDEX_NAME} beside it does not name this shard")
    listing = builder.build(
        "webdataset",
        RangeReader(storage),
        is_shared_by_nodes=options.is_shared or not storage.is_local,
        classes=classes,
        class_descriptions=None if dataset is None else dataset.index.class_descriptions,
    )
    return replace(listing, other_splits=frozenset(other_splits))


def _find_shards(uri: str) -> tuple[Storage, list[str], list[str]]:
    """Give the storage, the names of the shards and those of odd files beside them."""
    if _names_tars(uri):
        return *locate_files(uri), []
    storage = Storage(uri)
    names = storage.list()
    shards = [name for name in names if name.endswith(TAR_SUFFIX) and not is_dropping(name)]
    if not shards and INDEX_NAME not in names:  # else that says which are missing
        raise DataError(f"{uri}: no shards; expected a folder of .tar files, or another format")
    odd = [name for name in names if name not in shards and not _COMPANIONS.fullmatch(name)]
    return storage, shards, odd


def _names_tars(uri: str) -> bool:
    """Whether a URI names a shard or several by a pattern; else it names their folder."""
    return uri.endswith(TAR_SUFFIX)


def _open_dataset_of(storage: Storage, shards: Sequence[str], *, is_folder: bool) -> Dataset | None:
    """Open the dataset that shards belong to, by the index beside them.

    Args:
        storage: where they are.
        shards: the tars that are there, or those that were named.
        is_folder: whether the folder was named, so that the index says what belongs to it.

    Returns:
        The dataset; None if there is no index, or not of all shards that were named.

    Raises:
        DataError: shards of the index are missing.
    """
    try:
        data = read_document(storage, INDEX_NAME)
    except FileNotFoundError:
        return None
    if _FORMAT_MARK not in data:
        return None  # of another program: MosaicML and wids use this name too
    index = parse_index(data, source=storage.uri(INDEX_NAME))
    listed = {entry.file for entry in index.shards}
    if not is_folder:
        return Dataset(storage, index) if listed.issuperset(shards) else None
    if missing := sorted(listed.difference(shards)):
        raise DataError(
            f"{storage.uri(INDEX_NAME)}: {len(missing)} of its {len(listed)} shards are missing: "
            f"{missing[:_SHOWN_NAMES]!r}; copy them again, or name the shards that are to be read "
            "by a pattern such as shard-{000000..000146}.tar"
        )
    return Dataset(storage, index)


def _list_by_tables(
    dataset: Dataset,
    shards: Sequence[str],
    builder: ListingBuilder,
    options: SourceOptions,
    observer: Observer,
) -> None:
    wanted = set(shards)
    entries = [entry for entry in dataset.index.shards if entry.file in wanted]
    load = partial(load_samples, dataset.folder)
    with observer.track(len(entries), "reading tables", "shards") as bar:
        tables = map_in_order(dataset.folder, load, entries, bar)
        for entry, table in zip(entries, tables, strict=True):
            _add_table(entry, table, dataset.index.classes, builder, options)


def _add_table(
    entry: ShardEntry,
    table: SampleTable,
    classes: Sequence[str],
    builder: ListingBuilder,
    options: SourceOptions,
) -> None:
    labels: list[int] = table.labels.tolist()
    offsets: list[int] = table.offsets.tolist()
    sizes: list[int] = table.sizes.tolist()
    names = list(classes)
    for row, key in enumerate(table.keys):
        if labels[row] >= len(names):
            raise DataError(
                f"{builder.uri}: {entry.samples_file}: label {labels[row]} of {key!r}; the index "
                f"has {len(names)} classes: make the index again"
            )
        place = Place(entry.file, offsets[row], sizes[row], 0, table.digests[row].tobytes())
        _add_sample(builder, names[labels[row]], entry.file, key, place, options)


def _add_sample(
    builder: ListingBuilder,
    class_name: str,
    shard: str,
    key: str,
    place: Place,
    options: SourceOptions,
) -> None:
    # The name is the same with and without an index, whose tables do not say what kind of image
    # a sample is.
    given_key = key if options.keep_keys else None
    name = f"{key}.image" if options.keep_keys else f"{shard.removesuffix(TAR_SUFFIX)}/{key}.image"
    builder.add_labelled(class_name, name, place, key=given_key, shown_name=f"{shard}/{key}")


@dataclass
class _ShardContent:
    samples: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Class, key, offset and size."""
    odd: list[OddMember] = field(default_factory=list)
    """What is not used."""


def _list_by_scans(
    storage: Storage,
    shards: Sequence[str],
    builder: ListingBuilder,
    options: SourceOptions,
    observer: Observer,
) -> None:
    rules = _make_rules(options)
    with observer.track(len(shards), "reading shards", "shards") as bar:
        contents = map_in_order(storage, partial(_scan_shard, storage, rules), shards, bar)
        for shard, content in zip(shards, contents, strict=True):
            for class_name, key, offset, size in content.samples:
                _add_sample(builder, class_name, shard, key, Place(shard, offset, size), options)
            for odd in content.odd:
                note = builder.refuse if odd.action == "refused" else builder.skip
                note(f"{shard}/{odd.name}", odd.reason)


def _make_rules(options: SourceOptions) -> SampleRules:
    """Translate the options.

    Raises:
        ConfigError: the class cannot stand there.
    """
    values = {
        "class_key": options.class_key or _DEFAULT_CLASS_KEY,
        "image_key": options.image_key,
    }
    return parse_config(values, SampleRules, source="source options")


def _scan_shard(storage: Storage, rules: SampleRules, shard: str) -> _ShardContent:
    content = _ShardContent()
    with storage.open_read(shard) as file:
        scan = TarScan(file, source=storage.uri(shard))
        for found in SampleScan(scan, rules, shard=shard).read(with_images=False):
            if isinstance(found, OddMember):
                content.odd.append(found)
            else:
                place = found.image.offset, found.image.size
                content.samples.append((_name_class(found.label, rules), found.key, *place))
        scan.finish()
    return content


def _name_class(label: str, rules: SampleRules) -> str:
    if rules.labels == NO_CLASSES:
        return THE_ONLY_CLASS
    number = parse_number(label)
    return label if number is None else str(number)  # without leading zeros

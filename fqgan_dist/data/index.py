"""The index of a dataset: `index.json` and one table of samples (`.samples.parquet`) per shard.

The index is small and is read whole by every process; a shard's table is read when the shard is.
Its sha256 is the dataset id, named in every later record: the index holds the sha256 of every
shard and of every table, so the id fixes all bytes of the dataset (design.md section 3, "Dataset").
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field, ValidationError

from fqgan_dist.config import MAX_COUNT, Config, ConfigT, parse_config
from fqgan_dist.data.parquet_tables import read_table
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.config import THE_ONLY_CLASS
from fqgan_dist.storage.documents import read_document

if TYPE_CHECKING:
    from fqgan_dist.storage.storage import Storage

INDEX_NAME = "index.json"
TABLE_SUFFIX = ".samples.parquet"
MAX_SHARD_SAMPLES = 10**7
"""Samples of one shard; ImageNet in a single tar has 1.3 million."""
MAX_TABLE_BYTES = 2**30
"""Largest file of a table of samples."""
_READS = 2

# Names from an index are joined to a folder, so they must stay below it on every system.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.tar")
_PROBLEMS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,99}\.problems\.jsonl")
_MAX_KEY_LENGTH = 200
# Half of a sha256: nobody finds other bytes for 128 bits, and tables of 12 million rows stay small.
_DIGEST_BYTES = 16

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("class", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("digest", pa.binary(_DIGEST_BYTES), nullable=False),
    ]
)


def is_safe_key(key: str) -> bool:
    """Whether a text may be a sample's key, as webdataset cuts it out of a member's name.

    A key is a relative path of printable characters without `..`, backslash or a dot in its last
    part, where webdataset would end it; at most 200 characters.
    """
    parts = key.split("/")
    return (
        len(key) <= _MAX_KEY_LENGTH
        and key.isprintable()
        and "\\" not in key
        and all(part not in ("", ".", "..") for part in parts)
        and "." not in parts[-1]
        and re.match(r"[A-Za-z]:", key) is None  # a drive of Windows
    )


def image_digest(data: bytes) -> bytes:
    """Hash an image's bytes as a table of samples holds it: 16 bytes of their sha256."""
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


def stack_digests(digests: Sequence[bytes]) -> np.ndarray:
    """Put digests of n images into an array, (n, 16) uint8."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), _DIGEST_BYTES)


def _check_shard_name(name: str) -> str:
    if _SHARD_NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} is not a shard name; expected letters, digits, '.', '_', '-' and '.tar', "
            "without any folder"
        )
    return name


def _check_problems_name(name: str) -> str:
    if _PROBLEMS_NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} is no table of problems; expected letters and '.problems.jsonl'"
        )
    return name


def _check_class_name(name: str) -> str:
    if not name or name in {".", ".."} or not name.isprintable() or re.search(r"[/\\]", name):
        raise ValueError(f"{name!r} is not a class name; expected printable text without a slash")
    return name


ShardName = Annotated[str, AfterValidator(_check_shard_name)]
ClassName = Annotated[str, AfterValidator(_check_class_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardEntry(Config):
    """One shard: a tar file and its table of samples."""

    file: ShardName
    """Name of the tar file, in the dataset's folder."""
    count: int = Field(ge=1, le=MAX_SHARD_SAMPLES)
    """Number of samples."""
    bytes: int = Field(ge=1, le=MAX_COUNT)
    """Size of the tar file."""
    sha256: Sha256
    """Hash of the tar file."""
    samples_sha256: Sha256
    """Hash of the table of samples."""

    @property
    def samples_file(self) -> str:
        """Name of the table of samples, beside the tar file."""
        return table_name(self.file)


def table_name(shard_file: str) -> str:
    """Give the name of the table of samples of a shard."""
    return shard_file.removesuffix(".tar") + TABLE_SUFFIX


class SourceProblem(Config):
    """A member of the source that is not in the dataset as it was found."""

    name: str
    """Name in the source, as text."""
    reason: str
    """What is wrong with it."""
    action: Literal["skipped", "refused"]
    """What was done: `skipped` (not a usable image) or `refused` (a dangerous name or kind)."""


class ProblemTable(Config):
    """A table of what was left out: one `SourceProblem` as JSON per line, sorted by name."""

    file: Annotated[str, AfterValidator(_check_problems_name)]
    """Name of the file, in the dataset's folder."""
    count: int = Field(ge=1, le=MAX_COUNT)
    """Number of its lines."""
    sha256: Sha256
    """Hash of the file."""


class DatasetIndex(Config):
    """Everything about a dataset but its samples."""

    format: Literal["fqgan-dataset-2"] = "fqgan-dataset-2"
    """Version of this format."""
    name: str
    """Name of the dataset, for people."""
    split: str
    """Part of the dataset: `train`, `val` ..."""
    classes: list[ClassName] = Field(min_length=1)
    """Class names (ImageNet: wnids); a sample's label is the position in this list."""
    class_descriptions: dict[str, str] = Field(default_factory=dict)
    """Readable names of some or all classes."""
    image_policy: dict[str, Any]
    """How the images were made from the source's, and the seed of their order."""
    shards: list[ShardEntry] = Field(min_length=1)
    """The shards, in order."""
    plans: list[Sha256] = Field(default_factory=list)
    """Hashes of the plans (listing of a source and policy) that the shards were made by, first to
    last, by which a finished job knows itself; empty: the shards were only indexed."""
    problems: list[SourceProblem] = Field(default_factory=list)
    """The first of what was left out of the dataset, by name."""
    problem_tables: list[ProblemTable] = Field(default_factory=list)
    """All that was left out: a table of each plan that had problems."""

    def find_problems(self) -> Iterator[str]:
        """Find names that occur twice and descriptions of no class."""
        files = [shard.file for shard in self.shards]
        for what, names in (("shards", files), ("classes", self.classes)):
            repeated = sorted(name for name, count in Counter(names).items() if count > 1)
            if repeated:
                yield f"{what}: {repeated[:5]!r} occur more than once"
        unknown = sorted(set(self.class_descriptions) - set(self.classes))
        if unknown:
            yield f"class_descriptions: {unknown[:5]!r} are not in classes"

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def num_problems(self) -> int:
        """Number of members of the sources that were left out."""
        return max(len(self.problems), sum(table.count for table in self.problem_tables))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def has_classes(self) -> bool:
        """Whether the images have classes; else all are of the one that stands for none."""
        return self.classes != [THE_ONLY_CLASS]

    @cached_property
    def dataset_id(self) -> str:
        """The sha256 of the index file, in hex."""
        # Of the bytes that are written: anybody can check it with sha256sum.
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Write canonical JSON: sorted keys, fixed spacing, UTF-8, a final newline."""
        values = self.model_dump(mode="json")
        text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of one shard, in the order of the tar."""

    keys: list[str]
    """Key of each sample; unique in the dataset."""
    labels: np.ndarray
    """Class index, (n,) int32."""
    offsets: np.ndarray
    """Where the image's bytes begin in the tar, (n,) int64."""
    sizes: np.ndarray
    """Number of the image's bytes, (n,) int64."""
    widths: np.ndarray
    """Pixels per row, after the EXIF orientation, (n,) int32."""
    heights: np.ndarray
    """Rows, after the EXIF orientation, (n,) int32."""
    digests: np.ndarray
    """First 16 bytes of the sha256 of the image's bytes, (n, 16) uint8."""

    def __len__(self) -> int:
        return len(self.keys)


def load_index(folder: Storage) -> DatasetIndex:
    """Read a dataset's index.

    Raises:
        DataError: there is no index, it is not valid, or it was changed by hand.
    """
    source = folder.uri(INDEX_NAME)
    try:
        data = read_document(folder, INDEX_NAME)
    except FileNotFoundError as error:
        raise DataError(
            f"{source}: no such file; expected a finished dataset there: run "
            "`fqgan-data shard`, or correct the path"
        ) from error
    return parse_index(data, source=source)


def former_index_name(dataset_id: str) -> str:
    """Name the file that holds the index of a dataset as it was before it was extended."""
    return f"index-{dataset_id[:16]}.json"


def load_pinned_index(folder: Storage, dataset_id: str) -> DatasetIndex:
    """Read the index of the dataset that a run was started on.

    Raises:
        DataError: as `load_index`, or the dataset is another one by now.
    """
    index = load_index(folder)
    if index.dataset_id == dataset_id:
        return index
    path = folder.uri(INDEX_NAME)
    former = former_index_name(dataset_id)
    if not folder.exists(former):
        raise DataError(
            f"{path}: dataset {index.dataset_id[:16]}, expected {dataset_id[:16]}, which this run "
            "was started on; restore it, or start a new run"
        )
    raise DataError(
        f"{path}: the dataset was extended since this run was started on {dataset_id[:16]}; start "
        f"a new run, or to go on with the former images give the run a copy of the folder in which "
        f"index.json is the file {former} beside it"
    )


def parse_index(data: bytes, *, source: str) -> DatasetIndex:
    """Validate the bytes of an index file.

    Args:
        data: the file.
        source: its name, for the error.

    Raises:
        DataError: not JSON, not this format, unsafe names, or not the bytes that we would write.
    """
    try:
        index = DatasetIndex.model_validate_json(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}"
            for problem in error.errors(include_url=False)[:5]
        )
        raise DataError(f"{source}: not a valid dataset index: {problems}") from None
    try:
        is_ours = index.to_bytes() == data
    except ValueError:  # NaN, or half of a surrogate pair, in what has no fixed form
        is_ours = False
    if not is_ours:
        # Otherwise one dataset would have two ids: by its bytes and by its values.
        raise DataError(
            f"{source}: not the bytes that this program writes for these values; the file was "
            "changed by hand or by another version: make the dataset again with `fqgan-data shard`"
        )
    return index


def parse_policy(
    image_policy: Mapping[str, Any], names: Collection[str], config_type: type[ConfigT]
) -> ConfigT:
    """Read some of the settings in an index's image policy, which has no fixed form.

    Args:
        image_policy: of an index.
        names: the settings that are read, where they are there.
        config_type: what they are settings of.

    Raises:
        DataError: a value is wrong.
    """
    values = {name: image_policy[name] for name in sorted(names) if name in image_policy}
    try:
        return parse_config(values, config_type, source=f"{INDEX_NAME}: image_policy")
    except ConfigError as error:
        raise DataError(
            f"{error}\nmake the index again, or copy it from where it is whole"
        ) from None


def write_index(folder: Storage, index: DatasetIndex) -> None:
    """Publish a dataset by writing its index, once all its shards are there.

    Raises:
        DataError: another index is there already.
    """
    data = index.to_bytes()
    try:
        # Create-only: of two jobs that end at the same moment one wins, and the other one looks at
        # what won instead of replacing a dataset that is read already.
        folder.create_bytes(INDEX_NAME, data)
    except FileExistsError as error:
        if folder.read_bytes(INDEX_NAME) != data:
            raise DataError(
                f"{folder.uri(INDEX_NAME)}: another dataset is there already; choose another "
                "destination, or delete it first"
            ) from error


def encode_samples(table: SampleTable, metadata: dict[str, str]) -> bytes:
    """Write a table of samples as parquet, with text metadata in its footer.

    The bytes depend on the values and on pyarrow's version only.
    """
    numbers = [
        pa.array(values, field.type)
        for values, field in zip(_number_columns(table), list(_SCHEMA)[1:-1], strict=True)
    ]
    digests = pa.array([row.tobytes() for row in table.digests], pa.binary(_DIGEST_BYTES))
    columns = [pa.array(table.keys, pa.string()), *numbers, digests]
    schema = _SCHEMA.with_metadata({key: metadata[key] for key in sorted(metadata)})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd")
    return sink.getvalue()


def decode_samples(
    data: bytes, *, source: str, max_rows: int = MAX_SHARD_SAMPLES
) -> tuple[SampleTable, dict[str, str]]:
    """Read a table of samples and its metadata.

    Args:
        data: the file.
        source: its name, for the error.
        max_rows: samples that there may be; a table of more is not read.

    Raises:
        DataError: not parquet, other columns, unsafe or repeated keys, or impossible numbers.
    """
    try:
        table = read_table(data, _SCHEMA, max_rows=max_rows)
        columns = table.columns
        metadata = {
            key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()
        }
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{source}: not a table of samples: {error}") from error
    keys: list[str] = columns[0].to_pylist()
    numbers = [column.to_numpy() for column in columns[1:-1]]
    labels, offsets, sizes, widths, heights = numbers
    digests = stack_digests(columns[-1].to_pylist())
    samples = SampleTable(keys, labels, offsets, sizes, widths, heights, digests)
    _check_samples(samples, source)
    metadata.pop("ARROW:schema", None)
    return samples, metadata


def load_samples(folder: Storage, entry: ShardEntry) -> SampleTable:
    """Read the table of samples of a shard.

    Raises:
        DataError: the table is missing, damaged, or not of this shard.
    """
    source = folder.uri(entry.samples_file)
    data = _read_expected(folder, entry.samples_file, entry.samples_sha256)
    samples, _ = decode_samples(data, source=source, max_rows=entry.count)
    if len(samples) != entry.count:
        raise DataError(f"{source}: {len(samples)} samples, the index has {entry.count}")
    # Not their sum, which wraps around for the greatest numbers.
    if (samples.sizes > entry.bytes - samples.offsets).any():
        raise DataError(f"{source}: a sample lies beyond the shard's {entry.bytes} bytes")
    return samples


def _read_expected(folder: Storage, path: str, sha256: str) -> bytes:
    """Read an object of known hash; wrong bytes are read again, as the way may have changed them.

    Raises:
        DataError: it is missing or damaged.
    """
    found = ""
    for _ in range(_READS):
        try:
            data = folder.read_limited(path, MAX_TABLE_BYTES)
        except FileNotFoundError as error:
            raise DataError(
                f"{folder.uri(path)}: no such file; the dataset is not complete"
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return data
    raise DataError(
        f"{folder.uri(path)}: damaged: its sha256 is {found}, the index has {sha256}; "
        "copy the dataset again, or make it again with `fqgan-data shard`"
    )


def _number_columns(table: SampleTable) -> list[np.ndarray]:
    return [table.labels, table.offsets, table.sizes, table.widths, table.heights]


def _check_samples(samples: SampleTable, source: str) -> None:
    unsafe = next((key for key in samples.keys if not is_safe_key(key)), None)
    if unsafe is not None:
        raise DataError(
            f"{source}: {unsafe!r} is not a safe key: a relative path of printable characters "
            "without '..', and without a dot in its last part"
        )
    if len(set(samples.keys)) != len(samples.keys):
        raise DataError(f"{source}: a key occurs more than once")
    minima = (0, 0, 1, 1, 1)
    for values, minimum in zip(_number_columns(samples), minima, strict=True):
        if len(values) and int(values.min()) < minimum:
            raise DataError(f"{source}: {int(values.min())} is below the least possible, {minimum}")

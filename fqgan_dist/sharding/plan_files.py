"""The plan of a dataset as two files beside its shards: `plan.json` and `plan.parquet`.

The JSON says what is made of what, and fixes every shard by a hash. The parquet file holds every
image's key, label and place in the source, one row group per shard, so that a process on any node
reads the rows of its shard only. Both are written once, before the first shard: of two jobs with
one destination, those of the same plan work together, any other is refused.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from fqgan_dist.chunks import ProcessLocalCaches
from fqgan_dist.config import MAX_COUNT, Config
from fqgan_dist.data.index import ClassName, Sha256
from fqgan_dist.data.parquet_tables import read_table
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.listing import MAX_IMAGE_BYTES, Place, SourceListing
from fqgan_dist.sharding.plan import DatasetPlan, PlannedShard, ShardingConfig, hash_shard
from fqgan_dist.sharding.shard_building import PlannedSample
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.storage import Storage

BASE_PLAN = "plan"
"""Name, without its ending, of the plan that a dataset begins with."""

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("file", pa.string()),  # null: the name is the file
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("packed_size", pa.int64(), nullable=False),
        pa.field("check", pa.binary(), nullable=False),
    ]
)


class PlanFile(Config):
    """What `plan.json` holds."""

    format: Literal["fqgan-plan-1"] = "fqgan-plan-1"
    """Version of this format."""
    plan_sha256: Sha256
    """Hash of all that decides the result, but for the images' bytes: the identity of the plan."""
    header_sha256: Sha256
    """Hash of all that decides every shard; part of the shards' hashes."""
    extends: Sha256 | None = None
    """Id of the dataset that is extended; None: a new one is made."""
    source: str
    """Where the images are."""
    source_kind: str
    """What the source was taken for."""
    source_options: dict[str, Any]
    """How the source is read."""
    num_problems: int = Field(ge=0, le=MAX_COUNT)
    """Members of the source that are no usable images by their names and kinds."""
    options: dict[str, Any]
    """What is made."""
    classes: list[ClassName] = Field(min_length=1)
    """Class names in the order of their labels."""
    class_descriptions: dict[str, str]
    """Readable names of classes."""
    rows_sha256: Sha256
    """Hash of the parquet file."""
    shards: list[PlannedShard] = Field(min_length=1)
    """The shards, in order."""

    def to_bytes(self) -> bytes:
        """Write it as JSON."""
        values = self.model_dump(mode="json")
        return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def publish_plan(
    folder: Storage,
    stem: str,
    plan: DatasetPlan,
    source: SourceListing,
    config: ShardingConfig,
    *,
    source_options: Mapping[str, Any],
    extends: str | None = None,
) -> bool:
    """Write a plan, unless this very plan is there already.

    Args:
        folder: of the dataset.
        stem: name of the plan's files without their endings.
        plan: the plan.
        source: what it was made for.
        config: what it was made by.
        source_options: how the source was opened, for people.
        extends: id of the dataset that is extended.

    Returns:
        Whether the plan is new: no other job has worked or works on it.

    Raises:
        DataError: another plan is there.
    """
    found = load_plan(folder, stem)
    if found is not None and found.plan_sha256 != plan.plan_sha256:
        raise DataError(_describe_conflict(folder, stem, found, source, config))
    rows = encode_rows(plan, source)
    # The rows before the JSON: whoever finds the JSON may read them.
    is_new = _publish_rows(folder, stem, rows, found)
    if found is not None:
        return False
    file = PlanFile(
        plan_sha256=plan.plan_sha256,
        header_sha256=plan.header_sha256,
        extends=extends,
        source=source.uri,
        source_kind=source.kind,
        source_options=dict(source_options),
        num_problems=len(source.problems),
        options=config.model_dump(mode="json"),
        classes=plan.classes,
        class_descriptions=plan.class_descriptions,
        # Of what is there, not of what we would write: a job that was killed here may have written
        # the same rows with another version of pyarrow.
        rows_sha256=_hash_stored(folder, _rows_name(stem)),
        shards=plan.shards,
    )
    try:
        folder.create_bytes(_json_name(stem), file.to_bytes())
    except FileExistsError:
        winner = load_plan(folder, stem)
        if winner is None or winner.plan_sha256 != plan.plan_sha256:
            raise DataError(
                f"{folder.uri(_json_name(stem))}: another job has just begun another "
                f"dataset there; {_advise(stem)}"
            ) from None
        return False
    return is_new


def load_plan(folder: Storage, stem: str) -> PlanFile | None:
    """Read a plan; None where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = _json_name(stem)
    try:
        return PlanFile.model_validate_json(read_document(folder, path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise DataError(
            f"{folder.uri(path)}: not a valid plan ({'.'.join(map(str, problem['loc']))}: "
            f"{problem['msg']}); expected the file that a job wrote here: {_advise(stem)}"
        ) from None


def encode_rows(plan: DatasetPlan, source: SourceListing) -> bytes:
    """Write key, label and place of all images as parquet, one row group per shard."""
    sink = io.BytesIO()
    start = 0
    # A damaged page would send a process to another image: parquet can check that by itself.
    with pq.ParquetWriter(
        sink, _SCHEMA, compression="zstd", write_page_checksum=True, write_statistics=False
    ) as writer:
        for shard in plan.shards:
            rows = plan.rows[start : start + shard.count]
            writer.write_table(_tabulate(rows, plan, source), row_group_size=shard.count)
            start += shard.count
    return sink.getvalue()


def _tabulate(rows: np.ndarray, plan: DatasetPlan, source: SourceListing) -> pa.Table:
    chosen = rows.tolist()
    numbers = source.file_numbers[rows].tolist()
    columns = [
        [plan.keys[row] for row in chosen],
        plan.labels[rows],
        [source.names[row] for row in chosen],
        [source.files[number] if number >= 0 else None for number in numbers],
        source.offsets[rows],
        source.sizes[rows],
        source.packed_sizes[rows],
        [check.tobytes() for check in source.checks[rows]],
    ]
    return pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)],
        schema=_SCHEMA,
    )


class PlannedRows(ProcessLocalCaches):
    """Reads the images of single shards of a plan."""

    def __init__(self, folder: Storage, stem: str, header_sha256: str) -> None:
        """Name a plan without touching it.

        Args:
            folder: of the dataset.
            stem: name of the plan's files without their endings.
            header_sha256: of the plan.
        """
        self._folder = folder
        self._file = _rows_name(stem)
        self._header_sha256 = header_sha256

    def read(self, number: int, shard: PlannedShard) -> list[PlannedSample]:
        """Read the images of a shard, given by its position in the plan.

        Raises:
            DataError: the file is missing, damaged, or not of this plan.
        """
        uri = self._folder.uri(self._file)
        try:
            with self._folder.open_read(self._file) as stream:
                columns = read_table(
                    stream,
                    _SCHEMA,
                    max_rows=shard.count,
                    row_group=number,
                    metadata=self._metadata,
                ).to_pydict()
            samples = [
                PlannedSample(key, label, name, Place(file or name, *place))
                for key, label, name, file, *place in zip(*columns.values(), strict=True)
            ]
            _check_numbers(samples)
            found = hash_shard(
                self._header_sha256,
                [(sample.key, sample.label, sample.name, sample.place.size) for sample in samples],
            )
        except FileNotFoundError as error:
            raise DataError(f"{uri}: the plan was deleted; run the job anew") from error
        except (pa.ArrowException, OSError, TypeError, ValueError) as error:
            raise DataError(
                f"{uri}: not a plan's rows ({error}); delete it if no job runs"
            ) from error
        if found != shard.sha256:
            raise DataError(
                f"{uri}: damaged: the rows of {shard.file} have hash {found}, the plan has "
                f"{shard.sha256}; delete it if no job runs, and run again"
            )
        return samples

    @functools.cached_property
    def _metadata(self) -> pq.FileMetaData:
        # Of thousands of row groups it takes megabytes: read once per process.
        with self._folder.open_read(self._file) as stream:
            return pq.read_metadata(cast(BinaryIO, stream))


def _check_numbers(samples: Sequence[PlannedSample]) -> None:
    """Refuse places that no listing gives, and no reader expects.

    Raises:
        ValueError: one is.
    """
    for sample in samples:
        _, offset, size, packed_size, _ = sample.place
        if min(sample.label, offset, size, packed_size) < 0:
            raise ValueError(f"{sample.name!r}: a negative number")
        if size > MAX_IMAGE_BYTES:
            raise ValueError(f"{sample.name!r}: {size} bytes; an image may have {MAX_IMAGE_BYTES}")


def _publish_rows(folder: Storage, stem: str, data: bytes, found: PlanFile | None) -> bool:
    """Write the parquet file; whether it was not there before."""
    path = _rows_name(stem)
    has_same_bytes = found is not None and found.rows_sha256 == hashlib.sha256(data).hexdigest()
    if has_same_bytes and folder.exists(path):
        return False
    try:
        folder.create_bytes(path, data)
    except FileExistsError:
        # Other bytes may hold the same rows: another version of pyarrow wrote them.
        if not _have_equal_rows(folder.read_bytes(path), data):
            raise DataError(
                f"{folder.uri(path)}: the plan of another job: the same images in another "
                f"source, or other images or settings; go on with that source, or {_advise(stem)}"
            ) from None
        return False
    return True


def _have_equal_rows(left: bytes, right: bytes) -> bool:
    try:
        count = pq.read_metadata(io.BytesIO(right)).num_rows
        tables = [read_table(data, _SCHEMA, max_rows=count) for data in (left, right)]
        return tables[0].equals(tables[1])
    except (pa.ArrowException, OSError, ValueError):
        return False


def _advise(stem: str) -> str:
    """Say what to do about a plan that is in the way."""
    if stem == BASE_PLAN:
        return "choose another destination, or delete it first"
    return (
        "wait until that extension has finished, and run the same command again; if no job runs, "
        f"finish it by its own command, or delete the files {stem}* first"
    )


def _describe_conflict(
    folder: Storage,
    stem: str,
    found: PlanFile,
    source: SourceListing,
    config: ShardingConfig,
) -> str:
    return (
        f"{folder.uri(_json_name(stem))}: the plan of another source or with other settings is "
        f"there ({describe_difference(found, source, config)}); {_advise(stem)}"
    )


def check_settings(folder: Storage, config: ShardingConfig) -> None:
    """Compare settings with those of a dataset or plan that is there, before a source is opened.

    Raises:
        DataError: a setting differs.
    """
    found = load_plan(folder, BASE_PLAN)
    if found is not None and (changed := _describe_settings(found, config)):
        raise DataError(
            f"{folder.uri(_json_name(BASE_PLAN))}: the plan of a dataset with other settings is "
            f"there ({'; '.join(changed)}); {_advise(BASE_PLAN)}"
        )


def describe_difference(found: PlanFile, source: SourceListing, config: ShardingConfig) -> str:
    """Say what a plan was made of and by, and what differs here."""
    changed = _describe_settings(found, config)
    if found.source != source.uri:
        changed.append(f"source: {found.source!r} there, {source.uri!r} here")
    count = sum(shard.count for shard in found.shards)
    changed.append(f"images: {count} there, {len(source)} listed here")
    return "; ".join(changed)


def _describe_settings(found: PlanFile, config: ShardingConfig) -> list[str]:
    # What a plan of an older version does not tell had its default.
    defaults = {name: field.default for name, field in ShardingConfig.model_fields.items()}
    theirs, ours = defaults | found.options, config.model_dump(mode="json")
    return [
        f"{name}: {theirs[name]!r} there, {ours[name]!r} here"
        for name in sorted(ours)
        if theirs[name] != ours[name]
    ]


def _hash_stored(folder: Storage, path: str) -> str:
    return hashlib.sha256(folder.read_bytes(path)).hexdigest()


def _json_name(stem: str) -> str:
    return f"{stem}.json"


def _rows_name(stem: str) -> str:
    return f"{stem}.parquet"

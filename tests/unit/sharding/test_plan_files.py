from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.containers import write_zip
from support.source_files import png

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.plan import ShardingConfig, plan_dataset
from fqgan_dist.sharding.plan_files import BASE_PLAN, PlannedRows, load_plan, publish_plan
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """The plan of a zip of two images."""
    source = write_zip(tmp_path / "x", [("cat", png(1)), ("dog", png(2))])
    storage = Storage(tmp_path / "made")
    config = ShardingConfig(name="x", split="train")
    with open_source(str(source)) as listing:
        plan = plan_dataset(listing, config)
        publish_plan(storage, BASE_PLAN, plan, listing, config, source_options={})
    return storage


def read(folder: Storage) -> list[tuple[str, int]]:
    plan = load_plan(folder, BASE_PLAN)
    assert plan is not None
    rows = PlannedRows(folder, BASE_PLAN, plan.header_sha256).read(0, plan.shards[0])
    return [(sample.name, sample.place.size) for sample in rows]


def test_rows_come_back(folder: Storage) -> None:
    assert sorted(read(folder)) == [("cat/000.png", len(png(1))), ("dog/001.png", len(png(2)))]


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("offset", [-1, 0], "a negative number"),
        ("packed_size", [0, -(2**63)], "a negative number"),
        ("size", [2**63 - 1, 1], "9223372036854775807 bytes; an image may have"),
        ("offset", [None, 0], "column 'offset': a value is missing"),
        ("label", [None, 0], "column 'label': a value is missing"),
    ],
)
def test_places_that_no_listing_gives_are_refused(
    folder: Storage, column: str, values: list[Any], reason: str
) -> None:
    table = pq.read_table(io.BytesIO(folder.read_bytes("plan.parquet")))
    field = table.schema.field(column)
    position = table.column_names.index(column)
    table = table.set_column(position, column, pa.array(values, field.type))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    folder.write_bytes("plan.parquet", sink.getvalue())
    with pytest.raises(DataError, match=f"not a plan's rows .*{reason}"):
        read(folder)

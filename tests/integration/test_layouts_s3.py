"""Every layout is read from a bucket as from a disk, lists, archives and maps included."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch
from support.layouts import LAYOUTS
from support.radosgw import S3_BUCKET
from support.source_files import png
from support.tiny_tasks import load_tiny

from fqgan_dist.data.index import image_digest
from fqgan_dist.sharding.listing import class_of
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.shards import _open_splits
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

pytestmark = pytest.mark.usefixtures("s3_credentials")

CLASSES = ["n01440764", "n01443537", "n01484850"]
TRAIN = [(CLASSES[row % 3], png(row)) for row in range(12)]
VAL = [(CLASSES[label], png(100 + row)) for row, label in enumerate((2, 0, 1, 1, 0))]


def _read(config: RunConfig) -> dict[str, set[tuple[str, bytes]]]:
    context = RunContext(
        config=config,
        storage=Storage(config.storage.root),
        world=World(),
        device=torch.device("cpu"),
    )
    with _open_splits(context) as sources:
        return {
            split: {
                (class_of(name), image_digest(source.read(row)))
                for row, name in enumerate(source.names)
            }
            for split, source in sources.items()
        }


ALL_BUT_ONE = pytest.mark.full("one is read always; each, locally, in unit/stages")


@pytest.mark.parametrize(
    "name",
    [name if name == "kaggle" else pytest.param(name, marks=ALL_BUT_ONE) for name in LAYOUTS],
)
def test_a_layout_is_the_same_in_a_bucket(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name](tmp_path, TRAIN, VAL)
    bucket = Storage(f"s3://{S3_BUCKET}/layouts-{uuid.uuid4().hex}")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            bucket.write_bytes(str(path.relative_to(tmp_path)), path.read_bytes())
    run = f"storage.root={tmp_path}/run"
    found = [_read(load_tiny(run, *layout.settings(root))) for root in (tmp_path, bucket.root)]
    assert found[0] == found[1]
    assert [len(found[0][split]) for split in ("train", "val")] == [len(TRAIN), len(VAL)]

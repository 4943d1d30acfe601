"""The same images from any container, on a disk or in a bucket, make the same dataset."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from support.containers import CONTAINERS, Images
from support.radosgw import S3_BUCKET
from support.source_files import png

from data_tools.cli import main
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import load_samples
from fqgan_dist.storage.storage import Storage

pytestmark = [
    pytest.mark.usefixtures("s3_credentials"),
    pytest.mark.full("each container is read in a bucket, and labelled alike, in quicker tests"),
]

NUMBERS = [str(number) for number in range(12)]
NAMES = ["n10", "n9", "cat"]


def _content(dataset: Dataset) -> set[tuple[int, bytes]]:
    """Give the label and the digest of every image."""
    tables = [load_samples(dataset.folder, entry) for entry in dataset.index.shards]
    return {
        (int(label), digest.tobytes())
        for table in tables
        for label, digest in zip(table.labels, table.digests, strict=True)
    }


@pytest.mark.parametrize("write", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("classes", [NUMBERS, NAMES], ids=["12 numbers", "3 names"])
def test_the_same_images_are_the_same_dataset(
    tmp_path: Path, write: Callable[[Path, Images], Path], classes: list[str]
) -> None:
    images = [(name, png(10 * n + copy)) for n, name in enumerate(classes) for copy in range(2)]
    folder = tmp_path / "source"
    folder.mkdir()
    source = write(folder / "x", images).relative_to(folder)
    bucket = Storage(f"s3://{S3_BUCKET}/containers-{uuid.uuid4().hex}")
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.write_bytes(str(path.relative_to(folder)), path.read_bytes())
    results = []
    for place in (str(folder / source), bucket.uri(str(source))):
        for root in (str(tmp_path / f"made-{len(results)}"), bucket.uri(f"made-{len(results)}")):
            main(["shard", place, root, "name=x", "split=train", "workers=1"])
            dataset = Dataset.open(Storage(root))
            results.append((dataset.index.classes, _content(dataset)))
    expected = NUMBERS if classes is NUMBERS else sorted(NAMES)
    digests = {digest for _, digest in results[0][1]}
    assert len(digests) == len(images)
    assert results[0][0] == expected
    assert [result == results[0] for result in results] == [True] * 4

"""The loader on a real S3 server behind a proxy that throttles, breaks and spoils answers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from support.fault_proxy import FaultProxy, Faults, run_fault_proxy
from support.radosgw import S3_BUCKET, Gateway
from support.tiny_shards import SIDE, colour_of, damage_samples, key_of, write_tiny_dataset

from fqgan_dist.data.batches import ImageBatch
from fqgan_dist.data.config import ShardCacheConfig, ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex, load_samples
from fqgan_dist.data.loader import ImageLoader
from fqgan_dist.data.sample_reader import SampleReader
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

COUNTS = (31, 7, 40, 22)
SIZE = sum(COUNTS)
EPOCHS = 3
BATCH = (4, 2)  # images per micro-batch, micro-batches per step
NUM_STEPS = -(-EPOCHS * SIZE // (BATCH[0] * BATCH[1]))
BROKEN_LINE = Faults(slow_down_rate=0.05, reset_rate=0.05, truncate_rate=0.05, shorten_rate=0.02)
WRONG_BYTES = Faults(corrupt_rate=0.02, only=r"GET .*\.tar")


@pytest.fixture
def proxy(
    gateway: Gateway, s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    with run_fault_proxy(gateway.endpoint, seed=4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def root(request: pytest.FixtureRequest) -> str:
    """A folder of the bucket for one test; which fault meets which request depends on it."""
    return f"s3://{S3_BUCKET}/{request.node.originalname}"


def build_loader(storage: Storage, **options: object) -> ImageLoader:
    return ImageLoader(
        Dataset.open(storage),
        seed=3,
        view=ViewConfig(policy="random_crop_flip", image_size=SIDE),
        num_views=None,
        micro_batch_size=BATCH[0],
        micro_batches_per_step=BATCH[1],
        window_shards=2,
        **({"loader_workers": 0, "max_damaged_in_a_row": 1} | options),  # type: ignore[arg-type]
    )


def load(loader: ImageLoader, steps: range) -> list[ImageBatch]:
    with closing(loader.batches(steps.start, range(BATCH[1]))) as stream:
        return list(itertools.chain.from_iterable(itertools.islice(stream, len(steps))))


def check_is_exact(batches: Sequence[ImageBatch], expected: Sequence[ImageBatch]) -> None:
    """Check that a stream is the expected one, and that one is EPOCHS exact permutations."""
    for batch, other in zip(batches, expected, strict=True):
        assert (batch.keys, batch.views) == (other.keys, other.views)
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.images, other.images)
    keys = [key for batch in batches for key in batch.keys]
    everything = {key_of(number) for number in range(SIZE)}
    for epoch in range(EPOCHS):
        assert set(keys[epoch * SIZE : (epoch + 1) * SIZE]) == everything
    check_pixels(batches)


def check_pixels(batches: Sequence[ImageBatch]) -> None:
    for batch in batches:
        for key, image in zip(batch.keys, batch.images, strict=True):
            colour = torch.tensor(colour_of(key), dtype=torch.uint8)
            assert (image == colour[:, None, None]).all(), key


@pytest.fixture
def expected(tmp_path: Path) -> list[ImageBatch]:
    """The stream of the same dataset on a local disk."""
    local = Storage(tmp_path / "local")
    write_tiny_dataset(local, COUNTS)
    return load(build_loader(local), range(NUM_STEPS))


@pytest.mark.parametrize("faults", [BROKEN_LINE, WRONG_BYTES], ids=["broken", "wrong"])
@pytest.mark.parametrize(
    "cached",
    [True, pytest.param(False, marks=pytest.mark.full("as with the cache, which is tried always"))],
)
def test_three_epochs_over_a_bad_line_are_exact(
    proxy: FaultProxy,
    root: str,
    tmp_path: Path,
    expected: list[ImageBatch],
    faults: Faults,
    cached: bool,
) -> None:
    write_tiny_dataset(Storage(root), COUNTS)
    cache = ShardCacheConfig(folder=tmp_path / "cache", min_free_gib=0) if cached else None
    proxy.faults = faults
    batches = load(build_loader(Storage(root), cache=cache), range(NUM_STEPS))
    check_is_exact(batches, expected)
    if cached:  # which needs few requests
        assert sum(batch.report.cached_samples for batch in batches) > SIZE
    else:
        kinds = ["corrupt"] if faults is WRONG_BYTES else ["slow_down", "reset", "truncate"]
        assert all(proxy.counts[kind] > 0 for kind in kinds), proxy.counts


def test_stopped_stream_goes_on_with_loader_workers_over_a_bad_line(
    proxy: FaultProxy, root: str, tmp_path: Path, expected: list[ImageBatch]
) -> None:
    write_tiny_dataset(Storage(root), COUNTS)
    proxy.faults = BROKEN_LINE
    cache = ShardCacheConfig(folder=tmp_path / "cache", min_free_gib=0)
    middle = NUM_STEPS // 2 + 1
    batches = load(build_loader(Storage(root)), range(middle))
    workers = build_loader(Storage(root), loader_workers=2, cache=cache)
    batches += load(workers, range(middle, NUM_STEPS))
    check_is_exact(batches, expected)
    assert proxy.num_faults > 0


@pytest.mark.parametrize("cached", [False, True])
def test_flipped_byte_in_a_stored_shard_is_named_and_never_trained_on(
    proxy: FaultProxy, root: str, tmp_path: Path, cached: bool
) -> None:
    storage = Storage(root)
    index = write_tiny_dataset(storage, COUNTS)
    damaged = {key_of(5): "shard-000000.tar", key_of(60): "shard-000002.tar"}
    damage_samples(storage, index, damaged)
    proxy.faults = Faults(slow_down_rate=0.03, truncate_rate=0.01)
    cache = ShardCacheConfig(folder=tmp_path / "cache", min_free_gib=0) if cached else None
    loader = build_loader(Storage(root), cache=cache, max_damaged_in_a_row=5)
    batches = load(loader, range(NUM_STEPS))
    keys = [key for batch in batches for key in batch.keys]
    assert not set(keys) & set(damaged)
    check_pixels(batches)
    named = [each for batch in batches for each in batch.report.replacements]
    assert {each.key: each.shard for each in named} == damaged
    for each in named:
        assert keys[each.position] == each.replacement_key
        assert f"{root}/{each.shard}: sample {each.key!r}: damaged" in each.reason
    # But for their slots the stream is the one of the undamaged dataset.
    slots = {each.position for each in named}
    assert len(slots) == EPOCHS * len(damaged)
    others = [key for slot, key in enumerate(keys[: EPOCHS * SIZE]) if slot not in slots]
    assert len(others) == EPOCHS * (SIZE - len(damaged))
    strict = build_loader(Storage(root), max_damaged_in_a_row=1)
    with pytest.raises(DataError, match=r"shard-00000[02].tar: sample '.*': damaged"):
        load(strict, range(NUM_STEPS))


def test_reading_goes_on_while_a_shard_comes_slowly(
    proxy: FaultProxy, root: str, tmp_path: Path
) -> None:
    index = write_tiny_dataset(Storage(root), COUNTS)
    storage = Storage(root)
    reader = build_reader(storage, index, ShardCacheConfig(folder=tmp_path, min_free_gib=0))
    reader.read([(0, 0)])
    proxy.faults = Faults(bytes_per_s=20_000)  # a shard takes seconds
    reader.prefetch([2])
    for row in range(20):
        assert isinstance(reader.read([(2, row)])[0], bytes)
    assert not list(tmp_path.glob(f"{index.shards[2].sha256}.tar"))
    reader.close()  # which ends the fetch
    assert not list(tmp_path.glob("*.part"))
    stats = reader.stats()
    assert stats.cache is not None
    assert stats.cache.hits == 0


LEAVING_PROCESS = """
import sys
from pathlib import Path
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import load_samples
from fqgan_dist.data.sample_reader import SampleReader
from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.storage.storage import Storage
from support.waiting import wait_until

dataset = Dataset.open(Storage(sys.argv[1]))
table = load_samples(dataset.folder, dataset.index.shards[0])
cache = ShardCacheConfig(folder=sys.argv[2], min_free_gib=0)
reader = SampleReader(dataset, load_table=lambda shard: table, cache=cache)
reader.prefetch([2])
wait_until(lambda: list(Path(sys.argv[2]).glob("*.part")))
"""


def test_process_may_end_while_a_shard_comes(proxy: FaultProxy, root: str, tmp_path: Path) -> None:
    write_tiny_dataset(Storage(root), COUNTS)
    proxy.faults = Faults(bytes_per_s=20_000)
    result = subprocess.run(
        [sys.executable, "-c", LEAVING_PROCESS, root, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    # Its connection may be lost first, which is logged: one line at most, and no traceback.
    assert (result.returncode, result.stdout) == (0, "")
    assert len(result.stderr.splitlines()) <= 1, result.stderr


def build_reader(storage: Storage, index: DatasetIndex, cache: ShardCacheConfig) -> SampleReader:
    tables = [load_samples(storage, entry) for entry in index.shards]
    return SampleReader(Dataset(storage, index), load_table=tables.__getitem__, cache=cache)

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.datasets import build_photographs

from fqgan_dist.data.config import ShardCacheConfig, ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.decoding import decode_image
from fqgan_dist.data.index import DatasetIndex, load_index, load_samples
from fqgan_dist.data.loader import CodeLoader, ImageBatch, ImageLoader
from fqgan_dist.data.record_stores import CodeStore, FeatureStore
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.data.views import CropRecord, apply_view
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.loss_group import LossGroup
from fqgan_dist.storage.storage import Storage

VIEW = ViewConfig(policy="random_crop_flip", image_size=16)
FINGERPRINT = "a" * 64
NUM_VIEWS = 3


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("loader"))
    index = build_photographs(storage.child("data"))
    store_features(storage, index)
    store_codes(storage, index)
    return storage


def number_of(key: str) -> int:
    return sum(key.encode()) % 1000


def no_crops(count: int) -> list[CropRecord]:
    return [CropRecord(0, 0, 16, 16, flip=False)] * count


def store_features(storage: Storage, index: DatasetIndex) -> None:
    store = FeatureStore(storage, "features", FINGERPRINT)
    for entry, view in itertools.product(index.shards, range(NUM_VIEWS)):
        keys = load_samples(storage.child("data"), entry).keys
        values = np.array([[number_of(key), view] for key in keys])
        features = {"clip": values, "dinov2": -values[:, :1]}
        store.write(entry, view, keys=keys, crops=no_crops(len(keys)), features=features)


def store_codes(storage: Storage, index: DatasetIndex) -> None:
    store = CodeStore(storage, "codes", FINGERPRINT)
    for entry in index.shards:
        keys = load_samples(storage.child("data"), entry).keys
        codes = np.zeros((len(keys), 10, 2, 2, 2), np.int64)
        codes[:, :, 0] = np.array([number_of(key) for key in keys])[:, None, None, None]
        codes[:, :, 1] = np.arange(10)[None, :, None, None]
        crops = [no_crops(10) for _ in keys]
        store.write(entry, keys=keys, crops=crops, codes=codes, codebooks=["visual", "semantic"])


def make_loader(
    storage: Storage, *, expected_id: str | None = None, **changes: object
) -> ImageLoader:
    options = {
        "seed": 5,
        "view": VIEW,
        "num_views": None,
        "micro_batch_size": 3,
        "micro_batches_per_step": 4,
        "window_shards": 2,
        "loader_workers": 0,
        "max_damaged_in_a_row": 1,
    }
    dataset = Dataset.open(storage.child("data"), expected_id=expected_id)
    return ImageLoader(dataset, **(options | changes))  # pyright: ignore[reportArgumentType]


def take(stream: Iterator[list[ImageBatch]], steps: int) -> list[list[ImageBatch]]:
    found = list(itertools.islice(stream, steps))
    stream.close()  # type: ignore[attr-defined]
    return found


def keys_of(steps: list[list[ImageBatch]]) -> list[str]:
    return [key for step in steps for batch in step for key in batch.keys]


def assert_equal(first: ImageBatch, second: ImageBatch) -> None:
    assert (first.keys, first.views, first.micro_batch) == (
        second.keys,
        second.views,
        second.micro_batch,
    )
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert first.features.keys() == second.features.keys()
    for name, values in first.features.items():
        assert torch.equal(values, second.features[name])


@pytest.mark.parametrize("workers", [0, 1])
def test_members_of_a_group_load_their_run_of_each_micro_batch(
    storage: Storage, workers: int
) -> None:
    options = {"micro_batch_size": 6, "micro_batches_per_step": 2, "num_views": NUM_VIEWS}
    store = FeatureStore(storage, "features", FINGERPRINT)
    whole = take(make_loader(storage, **options, features=store).batches(2, [1, 0]), 2)
    for member in range(3):
        loader = make_loader(storage, **options, features=store, loader_workers=workers)
        group = LossGroup(member=member, size=3)
        own = take(loader.batches(2, [1, 0], loss_group=group), 2)
        rows = group.rows(2)
        for ours, theirs in zip(itertools.chain(*own), itertools.chain(*whole), strict=True):
            expected = ImageBatch(
                theirs.images[rows],
                theirs.labels[rows],
                theirs.keys[rows],
                theirs.views[rows],
                {name: values[rows] for name, values in theirs.features.items()},
                micro_batch=theirs.micro_batch,
            )
            assert_equal(ours, expected)


def test_a_member_reads_no_image_of_the_others(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    read_ranges = Storage.read_ranges

    def count(self: Storage, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        read.append(len(ranges))
        return read_ranges(self, ranges)

    monkeypatch.setattr(Storage, "read_ranges", count)
    loader = make_loader(storage, micro_batch_size=6)
    stream = loader.batches(0, [0], loss_group=LossGroup(member=1, size=3))
    take(stream, 1)
    assert set(read) == {2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cold_cache_reads_each_shard_once(storage: Storage, tmp_path: Path, workers: int) -> None:
    cache = ShardCacheConfig(folder=tmp_path / "cache", max_gib=1, min_free_gib=0)
    loader = make_loader(storage, cache=cache, loader_workers=workers)
    steps = loader.num_samples // 12
    batches = take(loader.batches(0, range(4)), steps)
    report = loader.take_report()
    # Not one image was read by its range: that would be twice.
    assert report.samples_read == report.cached_samples == 12 * steps
    plain = take(make_loader(storage).batches(0, range(4)), steps)
    for ours, expected in zip(itertools.chain(*batches), itertools.chain(*plain), strict=True):
        assert_equal(ours, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_of_batches_is_used_again_but_not_while_one_is_held(
    storage: Storage, workers: int
) -> None:
    expected = [
        batch
        for batches in take(make_loader(storage).batches(0, range(4)), 24)
        for batch in batches
    ]
    places: set[int] = set()
    with closing(make_loader(storage, loader_workers=workers).batches(0, range(4))) as stream:
        first = next(stream)
        row = first[1].images[2]  # holds its batch, and no other
        count = len(first)
        del first
        for batches in itertools.islice(stream, 23):
            for batch in batches:
                assert_equal(batch, expected[count])
                places.add(batch.images.data_ptr())
                count += 1
    assert count == len(expected) == 96
    assert len(places) <= 4 * 4 + 1
    assert row.data_ptr() - row.storage_offset() not in places
    assert torch.equal(row, expected[1].images[2])


def test_a_micro_batch_that_the_members_cannot_split_is_refused(storage: Storage) -> None:
    with pytest.raises(ValueError, match="micro_batch_size 3: 2 ranks cannot share it"):
        make_loader(storage).batches(0, [0], loss_group=LossGroup(member=1, size=2))


def test_images_are_the_views_of_the_samples(storage: Storage) -> None:
    index = load_index(storage.child("data"))
    files = {
        key: (label, data)
        for entry in index.shards
        for key, label, data in iterate_shard(storage.child("data"), entry)
    }
    [batches] = take(make_loader(storage).batches(0, range(4)), 1)
    assert [batch.micro_batch for batch in batches] == [0, 1, 2, 3]
    for batch in batches:
        assert batch.images.shape == (3, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        for image, label, key, view in zip(
            batch.images, batch.labels.tolist(), batch.keys, batch.views, strict=True
        ):
            expected_label, data = files[key]
            pixels, _ = apply_view(decode_image(data, name=key), VIEW, seed=5, key=key, view=view)
            assert np.array_equal(image.permute(1, 2, 0), pixels)
            assert label == expected_label


def test_stream_holds_every_sample_once_per_epoch(storage: Storage) -> None:
    loader = make_loader(storage)
    size = loader.num_samples
    steps = -(-2 * size // 12)
    keys = keys_of(take(loader.batches(0, range(4)), steps))
    assert len(set(keys[:size])) == size
    assert sorted(keys[:size]) == sorted(keys[size : 2 * size])
    assert keys[:size] != keys[size : 2 * size]


def test_every_epoch_has_a_view_of_its_own(storage: Storage) -> None:
    loader = make_loader(storage)
    steps = take(loader.batches(0, range(4)), -(-2 * loader.num_samples // 12))
    views = [view for step in steps for batch in step for view in batch.views]
    expected = [slot // loader.num_samples for slot in range(len(views))]
    assert views == expected


def test_views_repeat_after_num_views(storage: Storage) -> None:
    loader = make_loader(storage, num_views=2)
    steps_per_three_epochs = 3 * loader.num_samples // 12
    [first] = take(loader.batches(steps_per_three_epochs, [1]), 1)
    assert set(first[0].views) == {1}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.permutations(range(4)),
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
    st.integers(0, 40),
)
def test_global_batch_is_the_same_for_every_split_over_ranks(
    storage: Storage, order: list[int], cuts: list[int], step: int
) -> None:
    [whole] = take(make_loader(storage).batches(step, range(4)), 1)
    bounds = sorted({0, 4, *cuts})
    found: dict[int, ImageBatch] = {}
    for start, stop in itertools.pairwise(bounds):
        # One "rank" of this layout: a loader of its own with some of the micro-batches.
        [batches] = take(make_loader(storage).batches(step, order[start:stop]), 1)
        found |= {batch.micro_batch: batch for batch in batches}
    assert sorted(found) == [0, 1, 2, 3]
    for batch in whole:
        assert_equal(batch, found[batch.micro_batch])


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 25))
def test_resume_at_any_step_gives_the_same_next_images(storage: Storage, step: int) -> None:
    unbroken = take(make_loader(storage).batches(0, [2, 0]), step + 2)[step:]
    resumed = take(make_loader(storage).batches(step, [2, 0]), 2)
    for before, after in zip(unbroken, resumed, strict=True):
        for first, second in zip(before, after, strict=True):
            assert_equal(first, second)


def test_loader_workers_change_nothing(storage: Storage) -> None:
    features = FeatureStore(storage, "features", FINGERPRINT)
    options = {"features": features, "num_views": NUM_VIEWS}
    here = take(make_loader(storage, **options).batches(3, [1, 3]), 4)
    spawned = take(make_loader(storage, loader_workers=2, **options).batches(3, [1, 3]), 4)
    for before, after in zip(here, spawned, strict=True):
        for first, second in zip(before, after, strict=True):
            assert_equal(first, second)


def test_another_seed_gives_another_stream(storage: Storage) -> None:
    first = keys_of(take(make_loader(storage).batches(0, [0]), 3))
    assert first != keys_of(take(make_loader(storage, seed=6).batches(0, [0]), 3))


def test_features_belong_to_the_very_views(storage: Storage) -> None:
    features = FeatureStore(storage, "features", FINGERPRINT)
    loader = make_loader(storage, features=features, num_views=NUM_VIEWS)
    start = loader.num_samples // 12  # the step in which the second epoch begins
    for batches in take(loader.batches(start, range(4)), 2):
        for batch in batches:
            expected = [[number_of(k), v] for k, v in zip(batch.keys, batch.views, strict=True)]
            assert batch.features["clip"].dtype == torch.float32
            assert batch.features["clip"].tolist() == expected
            assert batch.features["dinov2"].shape == (3, 1)


def test_features_of_another_dataset_are_refused(storage: Storage, tmp_path: Path) -> None:
    other = Storage(tmp_path)
    build_photographs(other.child("data"), crops=1)
    features = FeatureStore(storage, "features", FINGERPRINT)
    loader = make_loader(other, features=features, num_views=NUM_VIEWS)
    with pytest.raises(DataError, match="sha256"):
        next(loader.batches(0, [0]))


def test_missing_shard_is_a_data_error(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    index = build_photographs(storage.child("data"), crops=1)
    for entry in index.shards:
        storage.delete(f"data/{entry.file}")
    with pytest.raises(DataError, match=r"tar: no such file; the dataset is not complete"):
        next(make_loader(storage).batches(0, [0]))


@pytest.mark.parametrize("kind", ["images", "codes"])
def test_another_dataset_than_the_one_asked_for_is_refused(storage: Storage, kind: str) -> None:
    found = load_index(storage.child("data")).dataset_id
    make = make_loader if kind == "images" else make_code_loader
    assert make(storage, expected_id=found).dataset_id == found
    with pytest.raises(DataError, match=f"dataset {found[:16]}, expected {'0' * 16}"):
        make(storage, expected_id="0" * 64)


def test_missing_dataset_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index.json"):
        make_loader(Storage(tmp_path))


def test_center_view_repeats_in_every_epoch(storage: Storage) -> None:
    loader = make_loader(storage, view=ViewConfig(policy="center", image_size=16))
    [batches] = take(loader.batches(loader.num_samples, [0]), 1)
    assert batches[0].views == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_views": 0}, "num_views: 0"),
        ({"view": ViewConfig(policy="center", image_size=8), "num_views": 2}, "expected 1 to 1"),
        (
            {"view": ViewConfig(policy="ten_crop", image_size=8), "num_views": 11},
            "expected 1 to 10",
        ),
    ],
)
def test_wrong_number_of_views_is_a_config_error(
    storage: Storage, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loader(storage, **changes)


def test_features_need_a_number_of_views(storage: Storage) -> None:
    features = FeatureStore(storage, "features", FINGERPRINT)
    with pytest.raises(ConfigError, match="num_views: required with stored teacher features"):
        make_loader(storage, features=features)
    with pytest.raises(ConfigError, match="num_views: 129"):
        make_loader(storage, features=features, num_views=129)


def test_micro_batches_outside_the_global_batch_are_refused(storage: Storage) -> None:
    loader = make_loader(storage)
    for micro_batches in ([], [4], [-1]):
        with pytest.raises(ValueError, match="micro_batches"):
            loader.batches(0, micro_batches)
    with pytest.raises(ValueError, match="start_step -1"):
        loader.batches(-1, [0])
    with pytest.raises(ValueError, match="micro_batch_size 0"):
        make_loader(storage, micro_batch_size=0)


def make_code_loader(
    storage: Storage, *, expected_id: str | None = None, **changes: object
) -> CodeLoader:
    options = {
        "codes": CodeStore(storage, "codes", FINGERPRINT),
        "seed": 5,
        "micro_batch_size": 3,
        "micro_batches_per_step": 4,
        "window_shards": 2,
        "loader_workers": 0,
        "max_damaged_in_a_row": 1,
    }
    dataset = Dataset.open(storage.child("data"), expected_id=expected_id)
    return CodeLoader(dataset, **(options | changes))  # pyright: ignore[reportArgumentType]


def test_codes_are_those_of_the_sample_and_one_view_for_all_codebooks(storage: Storage) -> None:
    for batches in itertools.islice(make_code_loader(storage).batches(0, range(4)), 3):
        for batch in batches:
            assert batch.codes.shape == (3, 2, 2, 2)
            assert batch.codes.dtype == torch.int64
            for codes, key, view in zip(batch.codes, batch.keys, batch.views, strict=True):
                assert (codes[0] == number_of(key)).all()
                assert (codes[1] == view).all()


def test_codes_and_images_of_a_slot_are_of_one_sample(storage: Storage) -> None:
    images = next(make_loader(storage).batches(4, [2]))[0]
    codes = next(make_code_loader(storage).batches(4, [2]))[0]
    assert images.keys == codes.keys
    assert torch.equal(images.labels, codes.labels)


def test_views_of_codes_are_drawn_uniformly_per_key_and_epoch(storage: Storage) -> None:
    loader = make_code_loader(storage)
    epochs = 30
    drawn: dict[str, list[int]] = {}
    for batches in itertools.islice(loader.batches(0, range(4)), epochs * loader.num_samples // 12):
        for batch in batches:
            for key, view in zip(batch.keys, batch.views, strict=True):
                drawn.setdefault(key, []).append(view)
    counts = np.bincount(np.concatenate(list(drawn.values())), minlength=10)
    expected = counts.sum() / 10
    # Chi-squared with 9 degrees of freedom: above 27.9 once in a thousand seeds; the seed is fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 27.9
    assert len({tuple(views) for views in drawn.values()}) == len(drawn)


def test_codes_resume_at_any_step(storage: Storage) -> None:
    unbroken = list(itertools.islice(make_code_loader(storage).batches(0, [1]), 12))
    resumed = next(make_code_loader(storage).batches(11, [1]))
    assert torch.equal(unbroken[11][0].codes, resumed[0].codes)
    assert unbroken[11][0].keys == resumed[0].keys

"""Damaged samples: detected, replaced in the same way everywhere, reported; or an error."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_shards import (
    SIDE,
    colour_of,
    damage_samples,
    key_of,
    write_tiny_dataset,
)
from support.waiting import wait_until

from fqgan_dist.data.batches import CodeBatch, ImageBatch, LoadReport, Replacement, merge_reports
from fqgan_dist.data.cache_folder import CacheFolder
from fqgan_dist.data.config import ShardCacheConfig, ViewConfig
from fqgan_dist.data.consumption import join
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import load_samples
from fqgan_dist.data.loader import CodeLoader, ImageLoader
from fqgan_dist.data.record_stores import CodeStore, FeatureStore
from fqgan_dist.data.views import CropRecord
from fqgan_dist.errors import DataError
from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.storage.storage import Storage

COUNTS = (9, 7, 8, 8, 9)
SIZE = sum(COUNTS)
BATCH = 6
MICRO_BATCHES = 2
STEPS = 2 * SIZE // (BATCH * MICRO_BATCHES) + 1
DAMAGED = {key_of(number) for number in (3, 4, 15, 16, 17, 33)}


def make_dataset(
    folder: Path, damaged: Collection[str] = DAMAGED, *, undecodable: Collection[str] = ()
) -> Storage:
    storage = Storage(folder)
    index = write_tiny_dataset(storage, COUNTS, undecodable=undecodable)
    damage_samples(storage, index, damaged)
    return storage


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return make_dataset(tmp_path_factory.mktemp("damaged"))


def make_loader(storage: Storage, **changes: object) -> ImageLoader:
    options = {
        "seed": 5,
        "view": ViewConfig(policy="random_crop_flip", image_size=SIDE),
        "num_views": None,
        "micro_batch_size": BATCH,
        "micro_batches_per_step": MICRO_BATCHES,
        "window_shards": 2,
        "loader_workers": 0,
        "max_damaged_in_a_row": 5,
    }
    return ImageLoader(Dataset.open(storage), **(options | changes))  # pyright: ignore[reportArgumentType]


def take(
    loader: ImageLoader, steps: int = STEPS, *, start: int = 0, loss_group: LossGroup = ALONE
) -> list[ImageBatch]:
    stream = loader.batches(start, range(MICRO_BATCHES), loss_group=loss_group)
    found = list(itertools.chain.from_iterable(itertools.islice(stream, steps)))
    stream.close()
    return found


def replacements_of(batches: Sequence[ImageBatch]) -> list[Replacement]:
    return [each for batch in batches for each in batch.report.replacements]


def test_a_damaged_sample_is_never_given_but_another_one_in_its_place(storage: Storage) -> None:
    batches = take(make_loader(storage))
    sound = take(make_loader(make_dataset(Path(storage.root).with_name("sound"), ())))
    expected = [key for batch in sound for key in batch.keys]
    replaced = {each.position: each for each in replacements_of(batches)}
    in_two_epochs = [each.key for slot, each in replaced.items() if slot < 2 * SIZE]
    assert sorted(in_two_epochs) == sorted([*DAMAGED, *DAMAGED])
    found = [key for batch in batches for key in batch.keys]
    for slot, key in enumerate(expected):
        if key in DAMAGED:
            assert replaced[slot].key == key
            assert found[slot] == replaced[slot].replacement_key
        else:
            assert found[slot] == key
    assert not DAMAGED & set(found)


def test_a_replacement_brings_its_own_pixels_label_and_view(storage: Storage) -> None:
    for number, batch in enumerate(take(make_loader(storage, num_views=3))):
        for image, label, key in zip(batch.images, batch.labels.tolist(), batch.keys, strict=True):
            assert (image == torch.tensor(colour_of(key), dtype=torch.uint8)[:, None, None]).all()
            assert label == int(key[-1])
        slots = range(number * BATCH, (number + 1) * BATCH)
        assert batch.views == [slot // SIZE % 3 for slot in slots]


def test_a_replacement_brings_its_own_features(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path)
    loader = make_loader(storage, features=store_features(storage, ()), num_views=2)
    batches = take(loader)
    assert replacements_of(batches)
    for batch in batches:
        expected = [
            [int(key[-5:]), view] for key, view in zip(batch.keys, batch.views, strict=True)
        ]
        assert batch.features["clip"].tolist() == expected


def store_features(storage: Storage, damaged: Collection[str] = DAMAGED) -> FeatureStore:
    """Store features that name sample and view; `damaged` had damaged images when it was done."""
    features = FeatureStore(storage, "features", "a" * 64)
    for entry, view in itertools.product(Dataset.open(storage).index.shards, range(2)):
        keys = load_samples(storage, entry).keys
        features.write(
            entry,
            view,
            keys=keys,
            crops=[CropRecord(0, 0, SIDE, SIDE, flip=False)] * len(keys),
            features={"clip": np.array([[int(key[-5:]), view] for key in keys])},
            damaged=[row for row, key in enumerate(keys) if key in damaged],
        )
    return features


def test_samples_without_features_are_replaced_as_damaged_ones_are(
    storage: Storage, tmp_path: Path
) -> None:
    expected = take(make_loader(storage, num_views=2))
    sound = make_dataset(tmp_path, ())
    for data in (sound, storage):  # whether the images are still damaged or not
        loader = make_loader(data, num_views=2, features=store_features(data))
        batches = take(loader)
        for ours, theirs in zip(batches, expected, strict=True):
            assert (ours.keys, ours.views) == (theirs.keys, theirs.views)
            assert torch.equal(ours.images, theirs.images)
            values = [
                [int(key[-5:]), view] for key, view in zip(ours.keys, ours.views, strict=True)
            ]
            assert ours.features["clip"].tolist() == values
        found = replacements_of(batches)
        for ours, theirs in zip(found, replacements_of(expected), strict=True):
            assert replace(ours, reason=theirs.reason) == theirs
        reason = "its image was damaged when this file was made" if data is sound else "also when"
        assert all(reason in each.reason for each in found)
        report = loader.take_report().replacements
        assert report == tuple(found)
    strict = make_loader(sound, num_views=2, features=store_features(sound), max_damaged_in_a_row=1)
    with pytest.raises(
        DataError, match=r"features/.*/shard-00000\d.parquet: sample 'sample000\d\d'"
    ):
        take(strict)


def store_codes(storage: Storage, damaged: Collection[str] = DAMAGED) -> CodeStore:
    """Store codes that name sample and view, of three views."""
    store = CodeStore(storage, "codes", "b" * 64)
    for entry in Dataset.open(storage).index.shards:
        keys = load_samples(storage, entry).keys
        codes = np.zeros((len(keys), 3, 2, 1, 1), np.int64)
        codes[:, :, 0, 0, 0] = np.array([[int(key[-5:])] for key in keys])
        codes[:, :, 1, 0, 0] = np.arange(3)
        store.write(
            entry,
            keys=keys,
            crops=[[CropRecord(0, 0, SIDE, SIDE, flip=False)] * 3 for _ in keys],
            codes=codes,
            codebooks=["visual", "semantic"],
            damaged=[row for row, key in enumerate(keys) if key in damaged],
        )
    return store


def take_codes(
    storage: Storage, store: CodeStore, steps: int = STEPS, *, start: int = 0, **changes: object
) -> list[CodeBatch]:
    group = changes.pop("loss_group", ALONE)
    options = {
        "codes": store,
        "seed": 5,
        "micro_batch_size": BATCH,
        "micro_batches_per_step": MICRO_BATCHES,
        "window_shards": 2,
        "loader_workers": 0,
        "max_damaged_in_a_row": 5,
    }
    loader = CodeLoader(Dataset.open(storage), **(options | changes))  # pyright: ignore[reportArgumentType]
    stream = loader.batches(start, range(MICRO_BATCHES), loss_group=group)  # pyright: ignore[reportArgumentType]
    found = list(itertools.chain.from_iterable(itertools.islice(stream, steps)))
    stream.close()
    reported = loader.take_report().replacements
    assert reported == tuple(each for batch in found for each in batch.report.replacements)
    return found


def test_samples_without_codes_are_replaced_as_damaged_images_are(
    storage: Storage, tmp_path: Path
) -> None:
    sound = make_dataset(tmp_path, ())
    store = store_codes(sound)
    expected = take(make_loader(storage))
    found = take_codes(sound, store)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.codes[:, 0, 0, 0].tolist() == [int(key[-5:]) for key in ours.keys]
        assert ours.codes[:, 1, 0, 0].tolist() == ours.views
        for one, other in zip(ours.report.replacements, theirs.report.replacements, strict=True):
            assert replace(one, reason=other.reason) == other
            assert f"{store.folder}/shard-00000" in one.reason
    # But for the damaged ones the stream is that of the undamaged codes.
    whole = take_codes(sound, store_codes(make_dataset(tmp_path / "whole", ()), ()))
    for ours, theirs in zip(found, whole, strict=True):
        kept = [row for row, key in enumerate(theirs.keys) if key not in DAMAGED]
        assert torch.equal(ours.codes[kept], theirs.codes[kept])
        assert [ours.views[row] for row in kept] == [theirs.views[row] for row in kept]


def test_codes_are_replaced_alike_by_ranks_and_after_a_restart(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path, ())
    store = store_codes(storage)
    whole = take_codes(storage, store, steps=6)
    resumed = take_codes(storage, store, steps=3, start=3)
    for ours, theirs in zip(resumed, whole[3 * MICRO_BATCHES :], strict=True):
        assert (ours.keys, ours.views, ours.report) == (theirs.keys, theirs.views, theirs.report)
        assert torch.equal(ours.codes, theirs.codes)
    parts = [
        take_codes(storage, store, steps=6, loss_group=LossGroup(member=member, size=3))
        for member in range(3)
    ]
    for number, batch in enumerate(whole):
        shares = [part[number] for part in parts]
        assert batch.keys == [key for share in shares for key in share.keys]
        assert torch.equal(batch.codes, torch.cat([share.codes for share in shares]))
        merged = merge_reports(share.report for share in shares)
        assert replace(merged, consumed=tuple(join(merged.consumed))) == batch.report


def test_codes_end_a_training_by_the_limit(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path, ())
    with pytest.raises(DataError, match=r"codes/.*parquet: sample 'sample000\d\d': its image was"):
        take_codes(storage, store_codes(storage), max_damaged_in_a_row=1)
    every = store_codes(storage, {key_of(number) for number in range(SIZE)})
    with pytest.raises(DataError, match=r"^3 damaged sample.*max_damaged_in_a_row is 3"):
        take_codes(storage, every, max_damaged_in_a_row=3)
    with pytest.raises(ValueError, match="max_damaged_in_a_row 0"):
        take_codes(storage, every, max_damaged_in_a_row=0)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    # Each slot has five candidates: one of six samples is sound.
    st.sets(st.integers(0, SIZE - 1), min_size=1, max_size=5).map(
        lambda numbers: {key_of(number) for number in numbers}
    ),
    st.sampled_from([2, 3, 6]),
    st.integers(0, 2**32),
)
def test_replacements_are_the_same_for_all_layouts_and_never_twice_in_a_micro_batch(
    tmp_path_factory: pytest.TempPathFactory, damaged: set[str], members: int, seed: int
) -> None:
    storage = make_dataset(tmp_path_factory.mktemp("layouts"), damaged)
    options = {"seed": seed, "max_damaged_in_a_row": 6}
    alone = take(make_loader(storage, **options), steps=4, start=2)
    for batch in alone:
        assert len(set(batch.keys)) >= BATCH - 1  # an epoch may end in a batch and repeat one
        stand_ins = [each.replacement_key for each in batch.report.replacements]
        assert all(batch.keys.count(key) == 1 for key in stand_ins)
    shared = [
        take(
            make_loader(storage, **options),
            steps=4,
            start=2,
            loss_group=LossGroup(member=member, size=members),
        )
        for member in range(members)
    ]
    for number, batch in enumerate(alone):
        parts = [part[number] for part in shared]
        assert batch.keys == [key for part in parts for key in part.keys]
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert replacements_of([batch]) == replacements_of(parts)


def test_a_resumed_loader_replaces_the_same_samples_by_the_same(storage: Storage) -> None:
    unbroken = replacements_of(take(make_loader(storage), steps=6)[3 * MICRO_BATCHES :])
    assert unbroken
    assert replacements_of(take(make_loader(storage), steps=3, start=3)) == unbroken


def test_the_limit_does_not_change_what_replaces_what(storage: Storage) -> None:
    first = replacements_of(take(make_loader(storage)))
    assert replacements_of(take(make_loader(storage, max_damaged_in_a_row=9))) == first


def test_an_image_that_cannot_be_decoded_is_replaced_too(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path, (), undecodable=[key_of(7)])
    found = replacements_of(take(make_loader(storage)))
    assert {each.key for each in found} == {key_of(7)}
    assert "cannot decode 12 bytes" in found[0].reason


def test_spawned_workers_with_a_cache_report_the_same(storage: Storage, tmp_path: Path) -> None:
    here = make_loader(storage)
    cache = ShardCacheConfig(folder=tmp_path, min_free_gib=0)
    spawned = make_loader(storage, loader_workers=1, cache=cache)
    expected = take(here, steps=3)
    for ours, theirs in zip(take(spawned, steps=3), expected, strict=True):
        assert ours.keys == theirs.keys
        assert ours.report.replacements == theirs.report.replacements
    assert spawned.take_report().replacements == here.take_report().replacements


def test_a_report_covers_the_batches_handed_out_since_the_last_one(storage: Storage) -> None:
    loader = make_loader(storage)
    stream = loader.batches(0, range(MICRO_BATCHES))
    reports: list[LoadReport] = []
    handed_out: list[ImageBatch] = []
    for _ in range(3):
        handed_out += next(stream) + next(stream)
        reports.append(loader.take_report())
    stream.close()
    assert sum(bool(report.replacements) for report in reports) >= 2
    assert replacements_of(handed_out) == [each for part in reports for each in part.replacements]
    total = merge_reports(reports)
    # What one thread read may be in the report of a batch that the other one ended meanwhile, and
    # that was not handed out: of the last batch.
    assert total.samples_read >= (6 * MICRO_BATCHES - 1) * BATCH
    assert total.bytes_read > 40 * total.samples_read
    assert total.cached_samples == 0
    assert loader.take_report() == LoadReport()


def test_a_report_tells_what_came_from_the_cache(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path / "data", ())
    cache = ShardCacheConfig(folder=tmp_path / "cache", min_free_gib=0)
    loader = make_loader(storage, cache=cache)

    def has_all_from_the_cache() -> bool:  # shards arrive in the background
        take(loader)
        report = loader.take_report()
        return report.cached_samples == report.samples_read > 0

    wait_until(has_all_from_the_cache)


def test_a_closed_stream_leaves_the_cache_alone(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path / "data", ())
    cache = ShardCacheConfig(folder=tmp_path / "cache", min_free_gib=0)
    folder = CacheFolder(cache.find_folder(), max_bytes=1, min_free_bytes=0)

    def is_in_use() -> bool:
        if not folder.path.exists():
            return False
        with folder.locked():
            return bool(folder._find_shards_in_use())

    stream = make_loader(storage, cache=cache).batches(0, range(MICRO_BATCHES))
    next(stream)
    wait_until(is_in_use)
    stream.close()
    assert not is_in_use()
    assert "shard-cache" not in {thread.name for thread in threading.enumerate()}


def test_a_damaged_sample_is_warned_of_once(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        replaced = replacements_of(take(make_loader(storage), steps=3 * STEPS))
    assert len(replaced) > 2 * len(DAMAGED)
    for key in DAMAGED:
        found = [text for text in caplog.messages if f"tar: sample '{key}'" in text]
        assert len(found) == 1
        assert "shard-00000" in found[0]
        assert "trained on 'sample" in found[0]


def test_without_replacement_the_first_damaged_sample_is_an_error(storage: Storage) -> None:
    with pytest.raises(DataError, match=r"shard-00000\d.tar: sample 'sample000\d\d': damaged"):
        take(make_loader(storage, max_damaged_in_a_row=1))


def test_too_many_damaged_in_a_row_are_an_error_that_names_them(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path, {key_of(number) for number in range(SIZE)})
    with pytest.raises(DataError, match=r"3 damaged sample.*max_damaged_in_a_row is 3") as caught:
        take(make_loader(storage, max_damaged_in_a_row=3))
    assert str(caught.value).count(": sample 'sample") == 3


def test_a_dataset_without_a_sample_to_spare_is_an_error(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path, {key_of(20)})
    with pytest.raises(DataError, match="no further sample outside the micro-batch"):
        take(make_loader(storage, micro_batch_size=SIZE))


def test_a_missing_shard_is_no_damaged_sample(tmp_path: Path) -> None:
    storage = make_dataset(tmp_path, ())
    loader = make_loader(storage)
    storage.delete(loader.dataset.index.shards[2].file)
    with pytest.raises(DataError, match="no such file; the dataset is not complete"):
        take(loader)


def test_a_limit_below_one_is_refused(storage: Storage) -> None:
    with pytest.raises(ValueError, match="max_damaged_in_a_row 0"):
        make_loader(storage, max_damaged_in_a_row=0)

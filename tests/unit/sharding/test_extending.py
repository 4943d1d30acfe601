from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fqgan_dist.chunks import ChunkWork, run_in_processes
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import (
    DatasetIndex,
    former_index_name,
    load_index,
    load_pinned_index,
    load_samples,
)
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.building import build_dataset
from fqgan_dist.sharding.extending import (
    ExtensionConfig,
    ExtensionReport,
    extend_dataset,
    plan_extension,
)
from fqgan_dist.sharding.plan import ShardingConfig
from fqgan_dist.sharding.problems import load_problems
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage


def write_images(root: Path, *names: str, side: int = 20) -> Path:
    for name in names:
        seed = sum(name.encode())
        size = (side + seed % 7, side, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return root


def build(source: Path, destination: Path, **settings: object) -> DatasetIndex:
    values = {"name": "tiny", "split": "train", "samples_per_shard": 4} | settings
    with open_source(str(source)) as listing:
        config = ShardingConfig.model_validate(values)
        return build_dataset(listing, Storage(destination), config)[0]


def extend(
    source: Path, destination: Path | Storage, **settings: object
) -> tuple[DatasetIndex, ExtensionReport]:
    storage = destination if isinstance(destination, Storage) else Storage(destination)
    with open_source(str(source)) as listing:
        config = ExtensionConfig.model_validate({"samples_per_shard": 2} | settings)
        return extend_dataset(listing, storage, config)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_labels(folder: Path, index: DatasetIndex) -> dict[str, str]:
    labels = {}
    for shard in index.shards:
        table = load_samples(Storage(folder), shard)
        labels |= {
            key: index.classes[label] for key, label in zip(table.keys, table.labels, strict=True)
        }
    return labels


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Ten images of the classes `b` and `d`."""
    names = [f"{'bd'[number % 2]}/{number}.png" for number in range(10)]
    build(write_images(tmp_path / "images", *names), tmp_path / "dataset")
    return tmp_path / "dataset"


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """Three new images and two that the dataset has."""
    return write_images(tmp_path / "more", "b/20.png", "d/21.png", "b/22.png", "b/0.png", "d/1.png")


def test_new_images_come_in_new_shards_and_the_old_ones_stay(dataset: Path, more: Path) -> None:
    before = read_files(dataset)
    former = load_index(Storage(dataset))
    index, report = extend(more, dataset)
    after = read_files(dataset)
    assert {name: after[name] for name in before if name != "index.json"} == {
        name: data for name, data in before.items() if name != "index.json"
    }
    assert index == load_index(Storage(dataset))
    assert index.shards[: len(former.shards)] == former.shards
    assert [shard.file for shard in index.shards[len(former.shards) :]] == [
        "extension-0001-000000.tar",
        "extension-0001-000001.tar",
    ]
    assert (report.num_added, report.num_present, report.work.num_built) == (3, 2, 2)
    labels = read_labels(dataset, index)
    assert len(labels) == index.num_samples == 13
    assert all(key.startswith(name) for key, name in labels.items())
    assert after[former_index_name(former.dataset_id)] == before["index.json"]
    assert json.loads(after["extension-0001.json"])["extends"] == former.dataset_id


def test_the_same_extension_again_does_nothing(dataset: Path, more: Path) -> None:
    first, _ = extend(more, dataset)
    before = read_files(dataset)
    again, report = extend(more, dataset)
    assert (again, report.work.was_complete, report.num_added) == (first, True, 0)
    other_settings, report = extend(more, dataset, seed=5)
    assert (other_settings, report.num_present) == (first, 5)
    assert read_files(dataset) == before


def test_extensions_follow_each_other(dataset: Path, more: Path, tmp_path: Path) -> None:
    extend(more, dataset)
    index, _ = extend(write_images(tmp_path / "third", "d/30.png"), dataset)
    assert index.shards[-1].file == "extension-0002-000000.tar"
    assert (index.num_samples, len(index.plans)) == (14, 3)
    assert build(tmp_path / "images", dataset) == index


def test_new_classes_have_to_be_asked_for_and_come_last(dataset: Path, tmp_path: Path) -> None:
    more = write_images(tmp_path / "more", "a/1.png", "c/1.png", "d/77.png")
    with pytest.raises(DataError, match=r"2 classes are not among the dataset's 2: \['a', 'c'\]"):
        extend(more, dataset)
    index, report = extend(more, dataset, new_classes=True)
    assert index.classes == ["b", "d", "a", "c"]
    assert report.added_classes == ["a", "c"]
    labels = read_labels(dataset, index)
    assert (labels["a_1"], labels["c_1"], labels["d_77"]) == ("a", "c", "d")


def test_another_image_of_a_known_key_is_named(dataset: Path, tmp_path: Path) -> None:
    more = write_images(tmp_path / "more", "b/0.png", "d/3.png", side=33)
    with pytest.raises(DataError, match=r"2 images have the key .* \['b/0\.png', 'd/3\.png'\]"):
        extend(more, dataset)


def test_an_image_is_known_by_the_key_that_it_has_among_others(tmp_path: Path) -> None:
    names = ["b/x.png", "b/x.webp", "b/y.png"]
    build(write_images(tmp_path / "images", *names), tmp_path / "dataset")
    lone = write_images(tmp_path / "lone", "b/x.webp", "b/z.png")
    _, report = extend(lone, tmp_path / "dataset")
    assert (report.num_added, report.num_present) == (1, 1)
    pair = write_images(tmp_path / "pair", "b/y.png", "b/y.webp")
    index, report = extend(pair, tmp_path / "dataset")
    assert (report.num_added, report.num_present) == (1, 1)
    assert index.num_samples == 5


def test_another_image_of_equal_name_and_size_is_new(tmp_path: Path) -> None:
    source = write_images(tmp_path / "images", "b/1.png", "b/2.png")
    data = (source / "b/1.png").read_bytes()
    index = build(source, tmp_path / "dataset")
    more = write_images(tmp_path / "more", "b/1.png")
    # Two names of one stem now, so that neither has the key that b/1.png has in the dataset.
    (more / "b/1.jpg").write_bytes(data[:-1] + b"x")
    with open_source(str(more)) as listing:
        planned = plan_extension(
            listing, Dataset(Storage(tmp_path / "dataset"), index), ExtensionConfig()
        )
    assert planned is not None
    assert (planned.num_present, planned.plan.num_samples) == (1, 1)


def test_which_of_two_images_a_reduced_one_was_cannot_be_told(tmp_path: Path) -> None:
    build(write_images(tmp_path / "images", "b/1.png"), tmp_path / "dataset", short_side=16)
    more = write_images(tmp_path / "more", "b/1.png", "b/1.jpg", "b/2.png")
    with pytest.raises(DataError, match=r"2 images, .*\['b/1.jpg', 'b/1.png'\]; leave out"):
        extend(more, tmp_path / "dataset")
    (more / "b/1.png").unlink()
    (more / "b/1.jpg").rename(more / "b/3.jpg")
    assert extend(more, tmp_path / "dataset")[1].num_added == 2


def test_a_former_index_that_was_changed_is_not_extended(dataset: Path, more: Path) -> None:
    former_id = load_index(Storage(dataset)).dataset_id
    extend(more, dataset)
    former = dataset / former_index_name(former_id)
    former.write_bytes(former.read_bytes().replace(b'"tiny"', b'"tidy"'))
    (dataset / "extension-0001-000001.tar").unlink()
    with pytest.raises(DataError, match=rf"dataset .*, expected {former_id[:16]} as its name says"):
        extend(more, dataset)


def test_new_images_get_the_form_of_the_others(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "b/1.png", side=60)
    build(images, tmp_path / "dataset", short_side=30, jpeg_quality=90)
    more = write_images(tmp_path / "more", "b/2.png", "b/1.png", side=60)
    index, report = extend(more, tmp_path / "dataset")
    storage = Storage(tmp_path / "dataset")
    table = load_samples(storage, index.shards[-1])
    assert (table.keys, table.widths.tolist()) == (["b_2"], [30])
    assert report.num_present == 1  # by its key alone: the bytes are not the source's


def test_images_that_do_not_decode_are_added_to_the_problems(
    dataset: Path, more: Path, tmp_path: Path
) -> None:
    (more / "b" / "bad.png").write_bytes(b"no image")
    index, report = extend(more, dataset)
    assert [problem.name for problem in report.work.problems] == ["b/bad.png"]
    assert [table.file for table in index.problem_tables] == ["extension-0001.problems.jsonl"]
    assert load_problems(Dataset(Storage(dataset), index)) == report.work.problems
    only_bad = tmp_path / "bad" / "b"
    only_bad.mkdir(parents=True)
    (only_bad / "worse.png").write_bytes(b"no image either")
    index, report = extend(tmp_path / "bad", dataset)
    assert (report.num_added, index.num_problems) == (0, 2)
    assert extend(tmp_path / "bad", dataset)[1].work.was_complete


class KilledError(BaseException):
    """Stands for the death of the process."""


class DyingStorage(Storage):
    """Dies at the n-th write, before or after it took effect."""

    def __init__(self, root: Path, lives: int, *, after: bool) -> None:
        super().__init__(root)
        self.lives, self.after = lives, after

    def create_bytes(self, path: str, data: bytes) -> None:
        self._die_or(super().create_bytes, path, data)

    def write_bytes(self, path: str, data: bytes) -> None:
        self._die_or(super().write_bytes, path, data)

    def replace_bytes(self, path: str, data: bytes, *, former: bytes) -> None:
        self._die_or(partial(super().replace_bytes, former=former), path, data)

    def _die_or(self, write: object, path: str, data: bytes) -> None:
        assert callable(write)
        self.lives -= 1
        if self.lives < 0 and not self.after:
            raise KilledError
        write(path, data)
        if self.lives < 0:
            raise KilledError


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_leaves_a_whole_dataset(
    dataset: Path, more: Path, tmp_path: Path, after: bool
) -> None:
    before = read_files(dataset)
    former = load_index(Storage(dataset))
    expected_index, _ = extend(more, dataset)
    expected = read_files(dataset)
    for lives in range(len(expected) - len(before) + 1):
        copy = tmp_path / f"copy{lives}"
        copy.mkdir()
        for name, data in before.items():
            (copy / name).write_bytes(data)
        with pytest.raises(KilledError):
            extend(more, DyingStorage(copy, lives, after=after))
        assert load_index(Storage(copy)) in (former, expected_index)
        extend(more, copy)
        assert read_files(copy) == expected


def test_an_interrupted_extension_keeps_others_out(
    dataset: Path, more: Path, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        extend(more, DyingStorage(dataset, 3, after=False))
    other = write_images(tmp_path / "other", "d/50.png")
    with pytest.raises(DataError, match=r"extension-0001\.json: an extension by .*more"):
        extend(other, dataset)
    extend(more, dataset)
    assert extend(other, dataset)[0].num_samples == 14


def test_of_two_extensions_at_once_the_later_one_waits(
    dataset: Path, more: Path, tmp_path: Path
) -> None:
    other = write_images(tmp_path / "other", "d/50.png")

    class OvertakenStorage(Storage):
        def create_bytes(self, path: str, data: bytes) -> None:
            if path == "extension-0001.parquet":
                with pytest.raises(KilledError):
                    extend(more, DyingStorage(dataset, 3, after=False))
            super().create_bytes(path, data)

    with pytest.raises(DataError, match=r"wait until that .*or delete the files extension-0001\*"):
        extend(other, OvertakenStorage(dataset))
    extend(more, dataset)
    assert extend(other, dataset)[0].num_samples == 14


def test_a_slow_job_does_not_undo_a_later_extension(
    dataset: Path, more: Path, tmp_path: Path
) -> None:
    other = write_images(tmp_path / "other", "d/50.png")

    def be_overtaken(work: ChunkWork) -> None:
        extend(more, dataset)  # the same extension by a faster job, and another one after it
        extend(other, dataset)
        run_in_processes(work)

    with open_source(str(more)) as listing:
        config = ExtensionConfig(samples_per_shard=2)
        index, _ = extend_dataset(listing, Storage(dataset), config, run_chunks=be_overtaken)
    assert index == load_index(Storage(dataset))
    assert (index.num_samples, len(index.plans)) == (14, 3)


def test_an_index_that_was_changed_meanwhile_stays(dataset: Path, more: Path) -> None:
    def change_index(work: ChunkWork) -> None:
        index = load_index(Storage(dataset))
        changed = DatasetIndex(**{**index.model_dump(), "name": "other"})
        (dataset / "index.json").write_bytes(changed.to_bytes())
        run_in_processes(work)

    with (
        open_source(str(more)) as listing,
        pytest.raises(DataError, match="changed by hand while it was extended"),
    ):
        extend_dataset(listing, Storage(dataset), ExtensionConfig(), run_chunks=change_index)
    assert load_index(Storage(dataset)).name == "other"


def test_a_deleted_shard_of_an_extension_is_made_again(dataset: Path, more: Path) -> None:
    index, _ = extend(more, dataset)
    expected = read_files(dataset)
    (dataset / "extension-0001-000001.tar").unlink()
    again, report = extend(more, dataset)
    assert (again, report.work.num_built, report.work.num_kept) == (index, 1, 1)
    assert read_files(dataset) == expected


def test_a_job_names_the_missing_files_that_it_does_not_make(
    dataset: Path, more: Path, tmp_path: Path
) -> None:
    extend(more, dataset)
    lost = (dataset / "shard-000001.tar").read_bytes()
    (dataset / "extension-0001-000001.tar").unlink()
    with pytest.raises(DataError, match=r"does not make them: \['extension-0001-000001.tar'\]"):
        build(tmp_path / "images", dataset)
    extend(more, dataset)
    (dataset / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"does not make them: \['shard-000001.tar'\]"):
        extend(more, dataset)
    build(tmp_path / "images", dataset)
    assert (dataset / "shard-000001.tar").read_bytes() == lost


def test_what_would_be_added_can_be_asked_for(dataset: Path, more: Path) -> None:
    before = read_files(dataset)
    storage = Storage(dataset)
    index = load_index(storage)
    with open_source(str(more)) as listing:
        extension = plan_extension(listing, Dataset(storage, index), ExtensionConfig())
    assert extension is not None
    assert (extension.plan.num_samples, extension.num_present) == (3, 2)
    assert read_files(dataset) == before


def test_a_run_on_the_former_dataset_is_told_where_its_index_is(dataset: Path, more: Path) -> None:
    storage = Storage(dataset)
    former = load_index(storage)
    assert load_pinned_index(storage, former.dataset_id) == former
    extend(more, dataset)
    name = former_index_name(former.dataset_id)
    with pytest.raises(DataError, match=rf"was extended since this run .*{name}"):
        load_pinned_index(storage, former.dataset_id)
    with pytest.raises(DataError, match="expected 0000000000000000, which this run was started on"):
        load_pinned_index(storage, "0" * 64)


def test_shards_that_were_only_indexed_can_be_extended(dataset: Path, more: Path) -> None:
    foreign = load_index(Storage(dataset)).model_dump()
    foreign |= {"plans": [], "image_policy": {"kind": "indexed"}}
    (dataset / "index.json").write_bytes(DatasetIndex(**foreign).to_bytes())
    index, report = extend(more, dataset)
    assert (index.num_samples, report.num_present, len(index.plans)) == (13, 2, 1)
    assert extend(more, dataset)[1].work.was_complete


def test_extending_needs_a_dataset(more: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a finished dataset"):
        extend(more, tmp_path / "nothing")


def test_stored_images_are_the_new_ones(dataset: Path, more: Path) -> None:
    index, _ = extend(more, dataset)
    storage = Storage(dataset)
    for shard in index.shards[-2:]:
        table = load_samples(storage, shard)
        for row, key in enumerate(table.keys):
            start, size = int(table.offsets[row]), int(table.sizes[row])
            data = storage.read_bytes(shard.file, offset=start, length=size)
            assert data == (more / key.replace("_", "/")).with_suffix(".png").read_bytes()
            assert Image.open(io.BytesIO(data)).height == table.heights[row]


def test_a_plan_of_no_extension_is_named(dataset: Path, more: Path) -> None:
    with pytest.raises(KilledError):
        extend(more, DyingStorage(dataset, 3, after=False))
    path = dataset / "extension-0001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extends": None}))
    with pytest.raises(DataError, match="not the plan of an extension"):
        extend(more, dataset)


def test_an_index_of_settings_that_no_dataset_has_is_not_extended(
    dataset: Path, more: Path
) -> None:
    index = load_index(Storage(dataset)).model_copy(update={"name": ""})
    (dataset / "index.json").write_bytes(index.to_bytes())
    with pytest.raises(DataError, match=r"index\.json: 1 problem\(s\)\n.*name"):
        extend(more, dataset)

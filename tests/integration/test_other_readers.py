"""Our shards are plain WebDataset shards: other libraries read them, and we read theirs.

The real images are `imagenet-sample` and `tiny-imagenet-20`; every one of them, and every odd file,
is accounted for.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.cli import main
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex, load_index, load_samples
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.sharding.file_names import IMAGE_SUFFIXES
from fqgan_dist.sharding.problems import load_problems
from fqgan_dist.storage.storage import Storage

pytestmark = pytest.mark.data

Sample = tuple[str, str]
"""Class and sha256 of an image."""

_OTHER_LIBRARY = "Hugging Face `datasets` is not installed: its reader of our shards is untested"


def shard(source: Path, destination: Path, split: str, *options: str) -> DatasetIndex:
    settings = [f"split={split}", "name=real", "samples_per_shard=100", "workers=1", *options]
    assert main(["shard", str(source), str(destination), *settings]) == 0
    return load_index(Storage(destination))


def images_of(archive_path: Path) -> tuple[Counter[Sample], int, list[str]]:
    """Read an archive of `class/name.ext` by tarfile alone.

    Returns:
        The images, the bytes of all of them, and the names of other files.
    """
    images: Counter[Sample] = Counter()
    num_bytes, odd = 0, []
    with tarfile.open(archive_path) as archive:
        for member in archive:
            if not member.isreg():
                continue
            if not member.name.lower().endswith(IMAGE_SUFFIXES):
                odd.append(member.name)
                continue
            stream = archive.extractfile(member)
            assert stream is not None
            data = stream.read()
            images[member.name.split("/")[-2], hashlib.sha256(data).hexdigest()] += 1
            num_bytes += len(data)
    return images, num_bytes, odd


def stored_images(folder: Path) -> Counter[Sample]:
    storage = Storage(folder)
    index = load_index(storage)
    return Counter(
        (index.classes[label], hashlib.sha256(data).hexdigest())
        for entry in index.shards
        for _, label, data in iterate_shard(storage, entry)
    )


@pytest.fixture(scope="module")
def real_dataset(
    test_data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DatasetIndex]:
    """The validation images of `tiny-imagenet-20`, in shards of 100."""
    folder = tmp_path_factory.mktemp("real") / "val"
    return folder, shard(test_data_dir / "tiny-imagenet-20" / "val.tar.gz", folder, "val")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-sample", "train"),
        ("imagenet-sample", "val"),
        pytest.param(
            "tiny-imagenet-20",
            "train",
            marks=pytest.mark.full("10,000 images; val is read always"),
        ),
        ("tiny-imagenet-20", "val"),
    ],
)
def test_every_real_image_and_every_odd_file_is_accounted_for(
    test_data_dir: Path, tmp_path: Path, name: str, split: str
) -> None:
    source = test_data_dir / name / f"{split}.tar.gz"
    index = shard(source, tmp_path / "out", split)
    images, num_bytes, odd = images_of(source)
    storage = Storage(tmp_path / "out")
    tables = [load_samples(storage, entry) for entry in index.shards]
    assert stored_images(tmp_path / "out") == images
    assert sum(int(table.sizes.sum()) for table in tables) == num_bytes
    assert index.num_samples == images.total()
    assert index.classes == sorted({class_name for class_name, _ in images})
    assert [problem.name for problem in load_problems(Dataset(storage, index))] == odd == []
    assert main(["verify", str(tmp_path / "out"), "deep=true", "workers=1"]) == 0


def test_odd_files_among_real_images_are_explained(test_data_dir: Path, tmp_path: Path) -> None:
    """The archives hold none, so they are put beside some of the images."""
    folder = tmp_path / "images"
    with tarfile.open(test_data_dir / "imagenet-sample" / "val.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    first, second = sorted(folder.rglob("*.JPEG"))[:2]
    cut = second.read_bytes()[: second.stat().st_size // 2]
    odd = {
        "LICENSE.txt": (b"free", "not class/name.ext"),
        f"{first.parent.name}/.DS_Store": (b"\0", "a hidden file or folder"),
        f"{first.parent.name}/cut.JPEG": (cut, "cannot be decoded"),
        f"{first.parent.name}/empty.JPEG": (b"", "empty"),
        f"{first.parent.name}/page.JPEG": (b"<html>", "cannot be decoded"),
    }
    for name, (data, _) in odd.items():
        (folder / name).write_bytes(data)
    index = shard(folder, tmp_path / "out", "val")
    problems = load_problems(Dataset(Storage(tmp_path / "out"), index))
    assert {problem.name for problem in problems} == set(odd)
    for problem in problems:
        assert odd[problem.name][1] in problem.reason
    assert index.num_samples == 30


# webdataset leaves local shards open until they are collected as garbage.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_itself_reads_our_shards(real_dataset: tuple[Path, DatasetIndex]) -> None:
    folder, index = real_dataset
    paths = [str(folder / entry.file) for entry in index.shards]
    read = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
    storage = Storage(folder)
    ours = [sample for entry in index.shards for sample in iterate_shard(storage, entry)]
    assert [(sample["__key__"], sample["cls"]) for sample in read] == [
        (key, label) for key, label, _ in ours
    ]
    for theirs, (_, label, data) in zip(read, ours, strict=True):
        assert theirs["json"]["class"] == index.classes[label]
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(theirs["jpg"]), np.asarray(image.convert("RGB")))


def test_hugging_face_datasets_reads_our_shards(
    real_dataset: tuple[Path, DatasetIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason=_OTHER_LIBRARY)
    folder, index = real_dataset
    entry = index.shards[3]
    files = {"val": [str(folder / entry.file)]}
    read = list(datasets.load_dataset("webdataset", data_files=files, split="val", streaming=True))
    ours = list(iterate_shard(Storage(folder), entry))
    assert [(sample["__key__"], sample["cls"]) for sample in read] == [
        (key, label) for key, label, _ in ours
    ]
    for theirs, (_, _, data) in zip(read, ours, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(theirs["jpg"]), np.asarray(image))


def test_shards_of_webdatasets_own_writer_load_by_an_index(
    real_dataset: tuple[Path, DatasetIndex], tmp_path: Path
) -> None:
    folder, index = real_dataset
    (tmp_path / "theirs").mkdir()
    pattern = str(tmp_path / "theirs" / "part-%03d.tar")
    storage = Storage(folder)
    with webdataset.ShardWriter(pattern, maxcount=300, verbose=0) as writer:
        for entry in index.shards:
            for key, label, data in iterate_shard(storage, entry):
                writer.write({"__key__": key, "jpg": data, "txt": index.classes[label]})
    arguments = ["name=x", "split=val", "class_key=txt", "workers=1"]
    assert main(["index", str(tmp_path / "theirs"), *arguments]) == 0
    made = load_index(Storage(tmp_path / "theirs"))
    assert [entry.count for entry in made.shards] == [300, 300, 300, 100]
    assert made.classes == index.classes
    assert stored_images(tmp_path / "theirs") == stored_images(folder)
    assert main(["verify", str(tmp_path / "theirs"), "deep=true", "workers=1"]) == 0

from __future__ import annotations

import io
import json
import multiprocessing
import re
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms
from pydantic import ValidationError
from support.observers import RecordingObserver
from support.shard_jobs import KillingReader
from webdataset.tariterators import group_by_keys, tar_file_expander

from fqgan_dist.chunks import ChunkWork, run_in_processes
from fqgan_dist.data import decoding
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex, load_index, load_samples
from fqgan_dist.errors import ClusterError, DataError
from fqgan_dist.sharding.building import ShardingReport, build_dataset
from fqgan_dist.sharding.plan import ShardingConfig, make_keys, plan_dataset
from fqgan_dist.sharding.plan_files import check_settings
from fqgan_dist.sharding.problems import load_problems
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage

NUM_CLASSES = 5


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five classes of eight small JPEGs."""
    root = tmp_path / "images"
    for label in range(NUM_CLASSES):
        (root / f"n{label:02d}").mkdir(parents=True)
        for number in range(8):
            data = encode(noise(24 + number, 20, seed=10 * label + number))
            (root / f"n{label:02d}" / f"n{label:02d}_{number}.JPEG").write_bytes(data)
    return root


def make_config(**changes: object) -> ShardingConfig:
    values = {"name": "tiny", "split": "train", "samples_per_shard": 7}
    return ShardingConfig.model_validate(values | changes)


def build(
    source: Path,
    destination: Path | Storage,
    config: ShardingConfig | None = None,
    **options: object,
) -> tuple[DatasetIndex, ShardingReport]:
    storage = destination if isinstance(destination, Storage) else Storage(destination)
    with open_source(str(source)) as listing:
        return build_dataset(listing, storage, config or make_config(), **options)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_is_in_the_dataset_once_with_its_bytes_and_label(folder: Path, tmp_path: Path):
    index, report = build(folder, tmp_path / "out")
    storage = Storage(tmp_path / "out")
    found = {}
    for shard in index.shards:
        table = load_samples(storage, shard)
        for row, key in enumerate(table.keys):
            data = storage.read_bytes(
                shard.file, offset=int(table.offsets[row]), length=int(table.sizes[row])
            )
            found[key] = (data, int(table.labels[row]))
            width, height = Image.open(io.BytesIO(data)).size
            assert (width, height) == (table.widths[row], table.heights[row])
    expected = {
        path.stem: (path.read_bytes(), int(path.parent.name[1:])) for path in folder.glob("*/*")
    }
    assert found == expected
    assert index.num_samples == 40
    assert index.classes == [f"n{label:02d}" for label in range(NUM_CLASSES)]
    assert (report.was_complete, report.num_built, report.num_kept) == (False, 6, 0)


def test_any_webdataset_loader_reads_the_shards(folder: Path, tmp_path: Path):
    index, _ = build(folder, tmp_path / "out")
    samples = []
    for shard in index.shards:
        # Our own stream: webdataset's opener leaves files to the garbage collector.
        with (tmp_path / "out" / shard.file).open("rb") as stream:
            urls = [{"url": shard.file, "stream": stream}]
            samples += group_by_keys(tar_file_expander(urls))
    assert len(samples) == 40
    sample = samples[0]
    facts = json.loads(sample["json"])
    assert (folder / facts["source"]).read_bytes() == sample["jpg"]
    assert index.classes[int(sample["cls"])] == facts["class"]


def test_tar_members_have_fixed_metadata(folder: Path, tmp_path: Path):
    index, _ = build(folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / index.shards[0].file) as tar:
        metadata = {
            (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
            for member in tar
        }
    assert metadata == {(0, 0, 0, "", "", 0o644)}


def test_the_same_input_gives_the_same_bytes_for_any_number_of_workers(
    folder: Path, tmp_path: Path
):
    build(folder, tmp_path / "one")
    for workers in (1, 2):
        observer = RecordingObserver()
        run_chunks = partial(run_in_processes, workers=workers, observer=observer)
        build(folder, tmp_path / str(workers), run_chunks=run_chunks)
        assert read_files(tmp_path / "one") == read_files(tmp_path / str(workers))
        assert observer.lines() == ["writing train shards: 40/40 images"]
        assert observer.bars[0].state().skipped == 0


def test_a_worker_that_is_killed_is_an_error_that_says_so(folder: Path, tmp_path: Path):
    with open_source(str(folder)) as listing:
        deadly = replace(listing, reader=KillingReader())
        with pytest.raises(ClusterError, match="writing train shards: one of 2 processes died"):
            build_dataset(
                deadly,
                Storage(tmp_path / "out"),
                make_config(),
                run_chunks=partial(run_in_processes, workers=2),
            )
    assert not multiprocessing.active_children()
    build(folder, tmp_path / "out")


def test_an_error_in_a_worker_stops_the_job_and_ends_the_workers(folder: Path, tmp_path: Path):
    with open_source(str(folder)) as listing:
        for path in folder.glob("*/*"):
            path.unlink()
        with pytest.raises(DataError, match="it is gone"):
            build_dataset(
                listing,
                Storage(tmp_path / "out"),
                make_config(),
                run_chunks=partial(run_in_processes, workers=2),
            )
    assert not multiprocessing.active_children()


def test_a_tar_gives_the_same_dataset_as_its_folder(folder: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        for path in sorted(folder.glob("*/*"), reverse=True):
            tar.add(path, path.relative_to(folder).as_posix())
    by_folder, _ = build(folder, tmp_path / "a")
    by_tar, _ = build(tmp_path / "x.tar.gz", tmp_path / "b")
    assert by_tar.dataset_id == by_folder.dataset_id


def test_another_seed_or_policy_gives_another_dataset(folder: Path, tmp_path: Path):
    ids = {
        build(folder, tmp_path / str(number), make_config(**changes))[0].dataset_id
        for number, changes in enumerate(({}, {"seed": 1}, {"short_side": 16}, {"name": "other"}))
    }
    assert len(ids) == 4


def test_shards_mix_the_classes_and_are_equal_in_size(folder: Path, tmp_path: Path):
    index, _ = build(folder, tmp_path / "out", make_config(samples_per_shard=14))
    assert [shard.count for shard in index.shards] == [13, 13, 14]
    for shard in index.shards:
        labels = load_samples(Storage(tmp_path / "out"), shard).labels
        assert len(np.unique(labels)) >= 4


def test_a_finished_dataset_is_left_alone(folder: Path, tmp_path: Path):
    first, _ = build(folder, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again, report = build(folder, tmp_path / "out")
    assert report.was_complete
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_another_dataset_in_the_way_is_refused(folder: Path, tmp_path: Path):
    build(folder, tmp_path / "out")
    with pytest.raises(DataError, match=r"other settings.*choose another destination"):
        build(folder, tmp_path / "out", make_config(seed=1))


class KilledError(BaseException):
    """Stands for the death of the process."""


class DyingStorage(Storage):
    """Dies at the n-th write, before or after it took effect."""

    def __init__(self, root: Path, lives: int, *, after: bool) -> None:
        super().__init__(root)
        self.lives, self.after = lives, after

    def create_bytes(self, path: str, data: bytes) -> None:
        self.lives -= 1
        if self.lives < 0 and not self.after:
            raise KilledError
        super().create_bytes(path, data)
        if self.lives < 0:
            raise KilledError


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_leaves_no_bad_file_and_the_next_run_finishes(
    folder: Path, tmp_path: Path, after: bool
):
    (folder / "n00" / "bad.jpg").write_bytes(b"\xff\xd8\xff not an image")
    build(folder, tmp_path / "whole")
    expected = read_files(tmp_path / "whole")
    for lives in range(len(expected)):
        out = tmp_path / f"out{lives}"
        with pytest.raises(KilledError):
            build(folder, DyingStorage(out, lives, after=after))
        left = read_files(out) if out.exists() else {}
        assert left.items() <= expected.items()
        assert ("index.json" in left) == (after and lives == len(expected) - 1)
        _, report = build(folder, out)
        assert read_files(out) == expected
        assert report.num_built + report.num_kept == 6
        assert report.num_kept == sum(name.endswith(".samples.parquet") for name in left)


def test_a_plan_of_another_job_is_refused_before_any_image_is_read(folder: Path, tmp_path: Path):
    with pytest.raises(KilledError):
        build(folder, DyingStorage(tmp_path / "out", 3, after=False))
    before = read_files(tmp_path / "out")
    with pytest.raises(DataError, match=r"plan\.json: the plan of another .*seed: 0 there, 1 here"):
        build(folder, tmp_path / "out", make_config(seed=1))
    (folder / "n00" / "new.jpg").write_bytes(encode(noise(30, 30)))
    with pytest.raises(DataError, match="images: 40 there, 41 listed here"):
        build(folder, tmp_path / "out")
    assert read_files(tmp_path / "out") == before


def test_half_a_plan_of_another_job_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(KilledError):
        build(folder, DyingStorage(tmp_path / "out", 1, after=False))
    assert list(read_files(tmp_path / "out")) == ["plan.parquet"]
    with pytest.raises(DataError, match=r"plan\.parquet: the plan of another job"):
        build(folder, tmp_path / "out", make_config(seed=1))


def test_a_job_goes_on_from_its_own_source_only(folder: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.glob("*/*")):
            tar.add(path, path.relative_to(folder).as_posix())
    with pytest.raises(KilledError):
        build(folder, DyingStorage(tmp_path / "out", 5, after=False))
    # The images are the same, but the plan says where they lie in the folder.
    with pytest.raises(DataError, match="the same images in another source"):
        build(tmp_path / "x.tar", tmp_path / "out")
    index, _ = build(folder, tmp_path / "out")
    assert build(tmp_path / "x.tar", tmp_path / "out") == (index, ShardingReport(True, 0, 6, []))


def test_shards_of_a_job_without_a_plan_are_not_continued(folder: Path, tmp_path: Path):
    build(folder, tmp_path / "out")
    for name in ("plan.json", "plan.parquet", "index.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(DataError, match="a shard of another source or with other settings"):
        build(folder, tmp_path / "out", make_config(seed=1))


def test_a_damaged_plan_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(KilledError):
        build(folder, DyingStorage(tmp_path / "out", 2, after=False))
    path = tmp_path / "out" / "plan.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"plan\.json: not a valid plan"):
        build(folder, tmp_path / "out")
    path.write_bytes(whole)
    build(folder, tmp_path / "out")


def test_the_plan_says_what_is_made_of_what(folder: Path, tmp_path: Path):
    index, _ = build(folder, tmp_path / "out", source_options={"subfolder": "x"})
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan["source"], plan["source_kind"]) == (str(folder), "folder")
    assert plan["source_options"] == {"subfolder": "x"}
    assert plan["options"]["samples_per_shard"] == 7
    assert plan["plan_sha256"] == index.plans[0]
    counts = [shard.count for shard in index.shards]
    assert [shard["count"] for shard in plan["shards"]] == counts
    with pq.ParquetFile(tmp_path / "out" / "plan.parquet") as rows:
        assert [rows.metadata.row_group(n).num_rows for n in range(rows.num_row_groups)] == counts
        samples = rows.read(use_threads=False).to_pylist()
    assert {(one["key"], one["label"], one["name"]) for one in samples} == {
        (path.stem, int(path.parent.name[1:]), f"{path.parent.name}/{path.name}")
        for path in folder.glob("*/*")
    }


def test_two_jobs_of_one_plan_work_together(folder: Path, tmp_path: Path):
    build(folder, tmp_path / "whole")
    out = tmp_path / "out"
    reports = []

    def run_other_first(work: ChunkWork) -> None:
        reports.append(build(folder, out)[1])  # the other job takes all shards meanwhile
        run_in_processes(work)

    _, late = build(folder, out, run_chunks=run_other_first)
    assert read_files(out) == read_files(tmp_path / "whole")
    assert (reports[0].num_built, late.problems) == (6, [])


def test_a_damaged_shard_of_an_interrupted_job_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(KilledError):
        build(folder, DyingStorage(tmp_path / "out", 4, after=False))
    shard = tmp_path / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"shard-000000\.tar: damaged: its sha256"):
        build(folder, tmp_path / "out")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-000000\.tar: damaged: it has \d+ bytes"):
        build(folder, tmp_path / "out")
    shard.unlink()
    build(folder, tmp_path / "out")


def test_a_damaged_table_of_an_interrupted_job_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(KilledError):
        build(folder, DyingStorage(tmp_path / "out", 4, after=False))
    (tmp_path / "out" / "shard-000000.samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"shard-000000\.samples\.parquet: damaged: not a table"):
        build(folder, tmp_path / "out")


def test_a_shard_without_one_good_image_is_left_out(folder: Path, tmp_path: Path):
    names = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    with open_source(str(folder)) as source:
        plan = plan_dataset(source, make_config())
        for row in plan.rows[: plan.shards[0].count]:
            (folder / source.names[row]).write_bytes(b"\xff\xd8\xff" + bytes(source.sizes[row] - 3))
    index, report = build(folder, tmp_path / "out")
    assert [shard.file for shard in index.shards] == [f"shard-{n:06d}.tar" for n in range(1, 6)]
    assert {problem.name for problem in report.problems} <= names
    assert len(report.problems) == 40 - index.num_samples == plan.shards[0].count
    assert not (tmp_path / "out" / "shard-000000.tar").exists()
    assert build(folder, tmp_path / "out")[1].was_complete
    assert build(folder, tmp_path / "out")[1].problems == report.problems


def test_an_index_stays_small_with_any_number_of_problems(folder: Path, tmp_path: Path):
    for number in range(300):
        (folder / f"odd-{number:03d}.txt").write_text("x")
    index, report = build(folder, tmp_path / "out")
    assert (len(report.problems), index.num_problems, len(index.problems)) == (300, 300, 100)
    lines = (tmp_path / "out" / "plan.problems.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [one.model_dump() for one in report.problems]
    assert load_problems(Dataset(Storage(tmp_path / "out"), index)) == report.problems
    (tmp_path / "out" / "plan.problems.jsonl").write_text("")
    with pytest.raises(DataError, match=r"plan\.problems\.jsonl: damaged"):
        load_problems(Dataset(Storage(tmp_path / "out"), index))


def test_a_deleted_shard_of_a_finished_dataset_is_made_again(folder: Path, tmp_path: Path):
    first, _ = build(folder, tmp_path / "out")
    expected = read_files(tmp_path / "out")
    (tmp_path / "out" / "shard-000002.tar").unlink()
    again, report = build(folder, tmp_path / "out")
    assert (report.num_built, report.num_kept) == (1, 5)
    assert again == first
    assert read_files(tmp_path / "out") == expected


def make_odd_images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    return {
        "gray.jpg": encode(noise(30, 20).convert("L")),
        "cmyk.jpg": encode(noise(30, 20).convert("CMYK")),
        "rotated.jpg": encode(noise(30, 20), exif=exif),
        "palette.png": encode(noise(30, 20).convert("P"), "PNG"),
        "alpha.webp": encode(noise(30, 20).convert("RGBA"), "WEBP"),
        "tiny.jpg": encode(noise(68, 121)),
        "png_named.JPEG": encode(noise(30, 20), "PNG"),
        "profile.jpg": encode(
            noise(30, 20),
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ),
    }


def write_odd_images(root: Path) -> None:
    (root / "c").mkdir(parents=True)
    for name, data in make_odd_images().items():
        (root / "c" / name).write_bytes(data)


def test_odd_images_keep_their_bytes_and_get_the_extension_of_their_content(tmp_path: Path):
    write_odd_images(tmp_path / "images")
    index, report = build(tmp_path / "images", tmp_path / "out")
    assert report.problems == []
    members = {}
    sizes = {}
    for shard in index.shards:
        with tarfile.open(tmp_path / "out" / shard.file) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
        table = load_samples(Storage(tmp_path / "out"), shard)
        sizes |= zip(table.keys, zip(table.widths, table.heights, strict=True), strict=True)
    odd = make_odd_images()
    assert members["c_gray.jpg"] == odd["gray.jpg"]
    assert members["c_png_named.png"] == odd["png_named.JPEG"]
    assert members["c_alpha.webp"] == odd["alpha.webp"]
    assert sizes["c_rotated"] == (20, 30)
    assert sizes["c_tiny"] == (68, 121)


def test_images_that_do_not_decode_are_named_counted_and_left_out(
    folder: Path, tmp_path: Path, monkeypatch
):
    whole = encode(noise(40, 40))
    bad = {
        "n00/cut.jpg": whole[: len(whole) // 2],
        "n01/text.png": b"not an image",
        "n02/gif.png": encode(noise(10, 10), "GIF"),
        "n03/notes.txt": b"hello",
        "n04/huge.png": encode(Image.new("1", (20_000, 20_000)), "PNG"),
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    index, report = build(folder, tmp_path / "out")
    assert [problem.name for problem in report.problems] == sorted(bad)
    assert index.problems == report.problems
    assert load_index(Storage(tmp_path / "out")) == index
    assert index.num_samples == 40
    reasons = {problem.name: problem.reason for problem in report.problems}
    assert re.search("20000x20000|400000000|bomb", reasons["n04/huge.png"])
    assert "cannot be decoded" in reasons["n00/cut.jpg"]


def test_a_source_without_one_good_image_is_an_error(tmp_path: Path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of its 1 images .*'a/x\.jpg'"):
        build(tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_file_that_vanishes_stops_the_job(folder: Path, tmp_path: Path):
    with open_source(str(folder)) as source:
        (folder / "n00" / "n00_0.JPEG").unlink()
        with pytest.raises(DataError, match=r"'n00/n00_0\.JPEG' changed .*it is gone"):
            build_dataset(source, Storage(tmp_path / "out"), make_config())


def test_short_side_reduces_large_images_only(folder: Path, tmp_path: Path):
    (folder / "n00" / "large.png").write_bytes(encode(noise(90, 60), "PNG"))
    index, _ = build(folder, tmp_path / "out", make_config(short_side=30, jpeg_quality=90))
    assert index.image_policy == {
        "kind": "short_side",
        "short_side": 30,
        "jpeg_quality": 90,
        "only_if_bigger": True,
        "order_seed": 0,
    }
    storage = Storage(tmp_path / "out")
    for shard in index.shards:
        table = load_samples(storage, shard)
        for row, key in enumerate(table.keys):
            data = storage.read_bytes(
                shard.file, offset=int(table.offsets[row]), length=int(table.sizes[row])
            )
            if key == "n00_large":
                assert (table.widths[row], table.heights[row]) == (45, 30)
                assert decoding.decode_image(data, name=key).size == (45, 30)
            else:
                assert data == (folder / key.split("_")[0] / f"{key}.JPEG").read_bytes()


def test_lossy_validation_images_need_to_be_asked_for(folder: Path, tmp_path: Path):
    with pytest.raises(ValidationError, match="reference of rFID"):
        make_config(split="val", short_side=30)
    config = make_config(split="val", short_side=30, allow_lossy_evaluation=True)
    assert build(folder, tmp_path / "out", config)[0].image_policy["lossy_evaluation"] is True


@pytest.mark.parametrize(
    "changes", [{"jpeg_quality": 90}, {"allow_lossy_evaluation": True}, {"samples_per_shard": 0}]
)
def test_settings_without_effect_or_out_of_range_are_refused(changes: dict[str, object]):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        make_config(**changes)


def test_given_classes_fix_the_labels(folder: Path, tmp_path: Path):
    classes = ["n09", *(f"n{label:02d}" for label in reversed(range(NUM_CLASSES)))]
    index, _ = build(folder, tmp_path / "out", classes=classes, class_descriptions={"n09": "x"})
    assert index.classes == classes
    for shard in index.shards:
        table = load_samples(Storage(tmp_path / "out"), shard)
        for key, label in zip(table.keys, table.labels, strict=True):
            assert key.startswith(classes[label])


def test_an_image_of_an_unknown_class_is_an_error(folder: Path, tmp_path: Path):
    with pytest.raises(
        DataError, match=r"4 of its classes are not among the 1 of the given list: \['n01'"
    ):
        build(folder, tmp_path / "out", classes=["n00"])


def test_keys_are_safe_unique_and_readable():
    names = [
        "n01/n01_18.JPEG",
        "cat/x.jpg",
        "cat/x.png",
        "cat/a b.c.jpg",
        "ü/ü.jpg",
        "c/" + "x" * 300,
    ]
    keys = make_keys(names)
    assert keys[0] == "n01_18"
    assert re.fullmatch("cat_x-[0-9a-f]{12}", keys[1])
    assert keys[3] == "cat_a-b-c"
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", key) and len(key) < 95 for key in keys)


def test_a_name_like_the_key_of_another_one_gets_a_key_of_its_own():
    names = ["cat/x.jpg", "cat/x.png"]
    names.append(f"cat/{make_keys(names)[0]}.jpg")
    names.append(f"cat/{make_keys(names)[2]}.jpg")
    assert len(set(make_keys(names))) == 4


def test_names_whose_hashes_collide_are_refused(monkeypatch):
    monkeypatch.setattr("fqgan_dist.sharding.plan._HASH_LENGTH", 1)
    names = [f"cat/x{'.' * number}.jpg" for number in range(1, 30)]
    with pytest.raises(DataError, match=r"'cat/x\.\..*whose hashes begin alike"):
        make_keys(names)


def test_the_order_does_not_depend_on_which_other_images_there_are(folder: Path):
    with open_source(str(folder)) as source:
        config = make_config(samples_per_shard=1000)
        plan = plan_dataset(source, config)
        whole = [plan.keys[row] for row in plan.rows]
        half = plan_dataset(source.select(np.arange(0, 40, 2)), config)
        part = [half.keys[row] for row in half.rows]
    assert part == [key for key in whole if key in part]
    assert whole != sorted(whole)


@pytest.mark.data
def test_real_imagenet_photographs(test_data_dir: Path, tmp_path: Path):
    source = test_data_dir / "imagenet-sample" / "val.tar.gz"
    index, report = build(source, tmp_path / "out", make_config(split="val"))
    assert report.problems == []
    assert index.num_samples == 30
    assert build(source, tmp_path / "out", make_config(split="val"))[1].was_complete


@pytest.mark.data
def test_real_class_folders_of_two_splits_get_the_same_labels(test_data_dir: Path, tmp_path: Path):
    folder = test_data_dir / "tiny-imagenet-20"
    val, report = build(folder / "val.tar.gz", tmp_path / "val", make_config(split="val"))
    with open_source(str(folder / "train.tar.gz")) as source:
        assert val.classes == source.class_names()
    assert (val.num_samples, val.num_classes, report.problems) == (1000, 20, [])


@pytest.mark.parametrize("is_finished", [False, True])
def test_the_setting_that_differs_is_named(folder: Path, tmp_path: Path, is_finished: bool):
    destination = tmp_path / "out"
    build(folder, destination, make_config(samples_per_shard=3))
    if not is_finished:
        (destination / "index.json").unlink()
    other = make_config(samples_per_shard=4)
    with pytest.raises(DataError, match=r"samples_per_shard: 3 there, 4 here"):
        build(folder, destination, other)
    # And before a source is opened, which may have to be unpacked.
    with pytest.raises(DataError, match=r"samples_per_shard: 3 there, 4 here"):
        check_settings(Storage(destination), other)

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image
from support.synthetic_shards import pack
from webdataset.writer import ShardWriter

from fqgan_dist.data.index import load_index, load_samples, write_index
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.foreign_index import IndexConfig, IndexReport, index_shards
from fqgan_dist.sharding.verification import verify_dataset
from fqgan_dist.storage.storage import Storage


def image(number: int, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10 + number), (number, 9, 9)).save(file, kind, **options)
    return file.getvalue()


def sample(key: str, number: int, **members: bytes) -> Iterable[tuple[str, bytes]]:
    yield f"{key}.jpg", image(number)
    for suffix, data in members.items():
        yield f"{key}.{suffix}", data


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.write_bytes(pack(members))
    return path


def make(folder: Path, **settings: object) -> IndexReport:
    classes = settings.pop("classes", None)
    config = IndexConfig(**({"name": "x", "split": "train"} | settings))
    return index_shards(Storage(folder), config, classes=classes)


def read_all(folder: Path) -> dict[str, tuple[int, bytes]]:
    storage = Storage(folder)
    index = load_index(storage)
    return {
        key: (label, data)
        for shard in index.shards
        for key, label, data in iterate_shard(storage, shard)
    }


def problems(report: IndexReport) -> Mapping[str, tuple[str, str]]:
    return {item.name: (item.action, item.reason) for item in report.index.problems}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards as webdataset's own writer makes them."""
    with ShardWriter(str(tmp_path / "part-%04d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"s/{number:03d}", "jpg": image(number), "cls": number % 2, "json": {}}
            )
    return tmp_path


def test_shards_of_webdatasets_own_writer_are_read_by_the_index(shards: Path) -> None:
    tars = {path: path.read_bytes() for path in shards.glob("*.tar")}
    report = make(shards)
    assert not report.was_complete
    assert [shard.count for shard in report.index.shards] == [3, 2]
    assert report.index.classes == ["0", "1"]
    assert read_all(shards) == {
        f"s/{number:03d}": (number % 2, image(number)) for number in range(5)
    }
    table = load_samples(Storage(shards), report.index.shards[0])
    assert (table.widths.tolist(), table.heights.tolist()) == ([20] * 3, [10, 11, 12])
    assert tars == {path: path.read_bytes() for path in shards.glob("*.tar")}


@pytest.mark.parametrize("deep", [False, True])
def test_an_image_that_no_view_in_use_can_be_made_of_is_left_out(shards: Path, deep: bool) -> None:
    file = io.BytesIO()
    Image.new("RGB", (1400, 1)).save(file, "PNG")
    write_tar(shards / "part-9.tar", [("thin.png", file.getvalue()), ("thin.cls", b"0")])
    report = make(shards, deep=deep)
    assert "resized to a short side of 320" in problems(report)["part-9.tar/thin"][1]
    assert verify_dataset(Storage(shards), is_deep=True).damages == []
    (shards / "index.json").unlink()
    assert "part-9.tar/thin" not in problems(make(shards, deep=deep, view_short_side=40))
    assert verify_dataset(Storage(shards), is_deep=True).damages == []
    # Whoever indexed it without asking is told by a deep look.
    index = load_index(Storage(shards))
    policy = {k: v for k, v in index.image_policy.items() if k != "view_short_side"}
    (shards / "index.json").unlink()
    write_index(Storage(shards), index.model_copy(update={"image_policy": policy}))
    damages = verify_dataset(Storage(shards), is_deep=True).damages
    assert [damage.where for damage in damages] == ["part-9.tar: thin"]


def test_made_again_it_does_nothing(shards: Path) -> None:
    first = make(shards)
    times = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    again = make(shards)
    assert again.was_complete
    assert again.index == first.index
    assert times == {path: path.stat().st_mtime_ns for path in shards.iterdir()}


@pytest.mark.parametrize("change", [{"deep": True}, {"name": "y"}, {"class_key": "none"}])
def test_an_index_with_other_settings_is_kept(shards: Path, change: dict[str, object]) -> None:
    make(shards)
    with pytest.raises(DataError, match="with other settings is there"):
        make(shards, **change)


def test_a_new_shard_makes_the_index_another_one(shards: Path) -> None:
    make(shards)
    write_tar(shards / "z.tar", sample("z", 1, cls=b"0"))
    with pytest.raises(DataError, match="of other shards"):
        make(shards)


def test_an_interrupted_job_is_finished(shards: Path) -> None:
    index = make(shards).index
    (shards / "index.json").unlink()
    (shards / index.shards[1].samples_file).unlink()
    assert make(shards).index == index


def test_tables_of_other_settings_are_not_replaced(shards: Path) -> None:
    make(shards)
    (shards / "index.json").unlink()
    with pytest.raises(DataError, match="another table is there"):
        make(shards, class_key="none")


@pytest.mark.parametrize(
    ("members", "settings"),
    [
        ({"txt": b"cat\n"}, {"class_key": "txt"}),
        ({"json": b'{"label": "cat"}'}, {"class_key": "json.label"}),
        ({"cls": b"cat"}, {}),
    ],
)
def test_labels_may_be_names(tmp_path: Path, members, settings) -> None:
    write_tar(tmp_path / "a.tar", [*sample("a", 1, **members), *sample("b", 2, **members)])
    index = make(tmp_path, **settings).index
    assert index.classes == ["cat"]
    assert index.image_policy["label_kind"] == "names"
    assert [label for label, _ in read_all(tmp_path).values()] == [0, 0]


def test_numbers_in_json_are_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a", 1, json=b'{"y": 2}'))
    assert make(tmp_path, class_key="json.y").index.classes == ["0", "1", "2"]


def test_given_classes_number_the_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a", 1, cls=b"cat"))
    assert make(tmp_path, classes=["dog", "cat"]).index.classes == ["dog", "cat"]
    assert read_all(tmp_path)["a"][0] == 1


def test_given_classes_name_the_numbers(shards: Path) -> None:
    assert make(shards, classes=["dog", "cat", "cow"]).index.classes == ["dog", "cat", "cow"]


def test_unlabelled_images_are_of_one_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a", 1))
    assert make(tmp_path, class_key="none").index.classes == ["all"]
    assert read_all(tmp_path)["a"] == (0, image(1))


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([b"0", b"cat"], {}, r"numbers \('0'\) and other texts \('cat'\)"),
        ([b"0", b"5"], {"classes": ["a", "b"]}, "labels go up to 5; expected numbers from 0 to 1"),
        ([b"dog", b"cat"], {"classes": ["dog"]}, "not in the given list of 1 classes: 'cat'"),
        ([b"999999999"], {}, "expected numbers from 0 to 999999"),
        ([b"a/b"], {}, "'a/b' is not a class name"),
        ([b"cat"], {"label_kind": "numbers"}, "no label is a number"),
        ([b""], {}, "no shard holds a sample that can be used"),
    ],
)
def test_wrong_labels_are_named(tmp_path: Path, labels: Sequence[bytes], settings, message) -> None:
    members = [m for i, text in enumerate(labels) for m in sample(f"k{i}", i, cls=text)]
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        make(tmp_path, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_labels_that_are_no_numbers_are_left_out_where_numbers_are_asked_for(tmp_path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("a", 1, cls=b"1"), *sample("b", 2, cls=b"-1")])
    report = make(tmp_path, label_kind="numbers")
    assert problems(report) == {"a.tar/b": ("skipped", ".cls: no label: '-1'")}
    assert list(read_all(tmp_path)) == ["a"]


def test_what_is_no_sample_is_named(tmp_path: Path) -> None:
    members = [
        ("README", b"hello"),
        ("__meta__/x.jpg", b"no sample"),
        *sample("good", 1, cls=b"0"),
        *sample("unlabelled", 2),
        ("no_image.cls", b"0"),
        ("text.jpg", b"hello"),
        ("text.cls", b"0"),
        *sample("two", 3, cls=b"0", png=image(3, "PNG")),
        ("cut.jpg", image(4)[:400]),
        ("cut.cls", b"0"),
        ("empty.jpg", b""),
        ("empty.cls", b"0"),
    ]
    write_tar(tmp_path / "a.tar", members)
    report = make(tmp_path, deep=True)
    assert set(problems(report)) == {
        f"a.tar/{name}"
        for name in (
            *("README", "__meta__/x.jpg"),
            *("unlabelled", "no_image", "text", "two", "cut", "empty"),
        )
    }
    assert "2 images: it has .jpg, .cls, .png" in problems(report)["a.tar/two"][1]
    assert list(read_all(tmp_path)) == ["good"]


def test_image_key_chooses_among_images(tmp_path: Path) -> None:
    members = [("a.rgb.jpg", image(1)), ("a.mask.png", image(2, "PNG")), ("a.cls", b"0")]
    write_tar(tmp_path / "a.tar", members)
    make(tmp_path, image_key="rgb.jpg")
    assert read_all(tmp_path)["a"] == (0, image(1))


def test_names_may_begin_with_a_dot_and_slash(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"./{name}", data) for name, data in sample("x", 1, cls=b"0")])
    make(tmp_path)
    assert list(read_all(tmp_path)) == ["x"]


def test_sizes_are_of_upright_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    members = [("x.jpg", image(3, exif=exif)), ("x.cls", b"0")]
    for folder, deep in ((tmp_path / "fast", False), (tmp_path / "deep", True)):
        folder.mkdir()
        write_tar(folder / "a.tar", members)
        shard = make(folder, deep=deep).index.shards[0]
        table = load_samples(Storage(folder), shard)
        assert (table.widths[0], table.heights[0]) == (13, 20)


@pytest.mark.parametrize("names", [("a.tar", "a.tar"), ("a.tar", "b.tar")])
def test_a_key_that_occurs_twice_is_refused_with_advice(tmp_path: Path, names) -> None:
    members: dict[str, list[tuple[str, bytes]]] = {}
    for number, name in enumerate(names):
        other = sample(f"other{number}", number, cls=b"0")
        members.setdefault(name, []).extend([*sample("k", number, cls=b"0"), *other])
    for name, contents in members.items():
        write_tar(tmp_path / name, contents)
    with pytest.raises(DataError, match=r"'k' occurs in a.tar and again in .*keep_keys=false"):
        make(tmp_path)


def test_a_shard_without_samples_is_named_and_left_out(shards: Path) -> None:
    write_tar(shards / "zero.tar", [("README", b"hello")])
    report = make(shards)
    assert problems(report) == {
        "zero.tar": ("skipped", "the shard holds no usable sample"),
        "zero.tar/README": ("skipped", "no key and extension, as samples have"),
    }
    assert make(shards).was_complete


def test_files_chooses_shards(shards: Path) -> None:
    write_tar(shards / "val-0.tar", sample("v", 1, cls=b"0"))
    index = make(shards, files="val-*.tar").index
    assert [shard.file for shard in index.shards] == ["val-0.tar"]


def test_a_folder_of_compressed_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match=r"only compressed ones \(a.tar.gz"):
        make(tmp_path)


def test_a_compressed_tar_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(pack(sample("x", 1, cls=b"0"))))
    with pytest.raises(DataError, match="not a whole, plain tar"):
        make(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        make(tmp_path)


def test_a_shard_with_a_strange_name_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "my shard.tar", sample("x", 1, cls=b"0"))
    with pytest.raises(DataError, match=r"'my shard.tar' is not a shard name.*rename"):
        make(tmp_path)


@pytest.mark.parametrize("end", [600, 1024, 1600, None], ids=lambda end: end or "no end mark")
def test_a_cut_tar_is_refused(tmp_path: Path, end: int | None) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("x", 1, cls=b"0"), *sample("y", 2, cls=b"0")])
    whole = path.read_bytes()
    content = len(whole.rstrip(b"\0")) + 511 & ~511
    path.write_bytes(whole[: end or content])
    with pytest.raises(DataError, match=r"not a whole|cut off"):
        make(tmp_path)


def test_a_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("x", 1, cls=b"0"), *sample("y", 2, cls=b"0")])
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[offset + 150] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        make(tmp_path)


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_tar_format_are_read(tmp_path: Path, format_: int) -> None:
    key = "d" * 90 + "/" + "k" * 60
    with tarfile.open(tmp_path / "a.tar", "w", format=format_) as archive:
        for name, data in sample(key, 1, cls=b"0"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    make(tmp_path)
    assert list(read_all(tmp_path)) == [key]


def test_rules_are_in_the_policy(shards: Path) -> None:
    policy = make(shards).index.image_policy
    assert json.loads(json.dumps(policy)) == {
        "kind": "indexed",
        "files": "*.tar",
        "decoded": False,
        "class_key": "cls",
        "label_kind": "numbers",
    }

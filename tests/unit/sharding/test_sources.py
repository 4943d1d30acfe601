from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.containers import CONTAINERS
from support.observers import RecordingObserver
from support.source_files import png, special_member, tar_bytes, write_files, write_tar

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.links import LEADS_OUT

TWO_IMAGES = [("b/2.png", png(2)), ("a/1.JPEG", png(1))]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz"])
def test_a_tar_is_listed_by_name_and_read_at_random(tmp_path: Path, name: str):
    with open_source(str(write_tar(tmp_path / name, TWO_IMAGES))) as source:
        assert source.names == ["a/1.JPEG", "b/2.png"]
        assert source.class_names() == ["a", "b"]
        assert [source.read(1), source.read(0)] == [png(2), png(1)]
        assert source.problems == []


def test_a_tar_in_the_working_directory_needs_no_slash(tmp_path: Path, monkeypatch):
    write_tar(tmp_path / "x.tar", TWO_IMAGES)
    monkeypatch.chdir(tmp_path)
    with open_source("x.tar") as source:
        assert len(source) == 2


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    with open_source(str(write_tar(tmp_path / "x[1].tar", TWO_IMAGES))) as source:
        assert source.kind == "tar"
        assert len(source) == 2


def test_a_folder_is_listed_like_a_tar(tmp_path: Path):
    for name, data in TWO_IMAGES:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "lost.png").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    with open_source(str(tmp_path)) as source:
        assert source.names == ["a/1.JPEG", "b/2.png"]
        assert source.read(1) == png(2)
        assert {problem.name: problem.action for problem in source.problems} == {
            "README.md": "skipped",
            "a/deep": "skipped",
            "a/lost.png": "refused",
            "empty": "skipped",
        }


def test_links_of_a_folder_stay_within_it_or_are_refused_by_name(tmp_path: Path):
    outside = write_files(tmp_path / "outside", [("c/9.png", png(9))])
    root = write_files(tmp_path / "set", [("train/a/1.png", png(1)), ("pool/2.png", png(2))])
    train = root / "train"
    (train / "b").symlink_to("../pool")
    (train / "a" / "2.png").symlink_to("../../pool/2.png")
    (train / "a" / "secret.png").symlink_to(outside / "c" / "9.png")
    (train / "a" / "round.png").symlink_to("round.png")
    (train / "c").symlink_to(outside / "c")
    (train / "d").symlink_to("d")
    os.mkfifo(train / "a" / "pipe.png")
    with open_source(str(root), subfolder="train") as source:
        assert source.names == ["a/1.png", "a/2.png", "b/2.png"]
        assert [source.read(row) for row in range(3)] == [png(1), png(2), png(2)]
        broken = "not a file: a broken link, or a circle of links"
        assert {problem.name: problem.reason for problem in source.problems} == {
            "a/secret.png": LEADS_OUT,
            "a/round.png": broken,
            "a/pipe.png": "not a file: a device, pipe or socket",
            "c": LEADS_OUT,
            "d": broken,
        }
        assert {problem.action for problem in source.problems} == {"refused"}
    with open_source(str(train)) as source:
        assert source.names == ["a/1.png"]
        assert {"a/2.png", "b"} < {problem.name for problem in source.problems}


def test_a_listed_file_that_becomes_a_link_is_not_followed(tmp_path: Path):
    write_files(tmp_path, [("set/a/1.png", png(1)), ("outside.png", png(2))])
    with open_source(str(tmp_path / "set")) as source:
        (tmp_path / "set" / "a" / "1.png").unlink()
        (tmp_path / "set" / "a" / "1.png").symlink_to(tmp_path / "outside.png")
        with pytest.raises(DataError, match="leads out"):
            source.read(0)


@pytest.mark.parametrize("kind", ["folder", "tar", "packed tar", "zip", "parquet", "manifest"])
def test_a_source_that_is_named_may_be_a_link(tmp_path: Path, kind: str):
    path = CONTAINERS[kind](tmp_path / "blobs", [("a", png(1)), ("b", png(2))])
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / f"train{''.join(path.suffixes)}"
    link.symlink_to(path)
    options = {"root": str(path.parent)} if kind == "manifest" else {}
    with open_source(str(link), **options) as source:
        assert [source.read(row) for row in range(2)] == [png(1), png(2)]


def test_a_subfolder_holds_the_classes(tmp_path: Path):
    members = [("train/a/1.png", png()), ("val/a/2.png", png()), ("./train/b/3.png", png(3))]
    with open_source(str(write_tar(tmp_path / "x.tar", members)), subfolder="train") as source:
        assert source.names == ["a/1.png", "b/3.png"]
        assert source.read(1) == png(3)
    for name, data in members[:2]:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(data)
    with open_source(str(tmp_path), subfolder="val") as source:
        assert source.names == ["a/2.png"]
        assert source.read(0) == png()


def test_the_wrong_level_of_folders_is_explained(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [("train/a/1.png", png())])
    with (
        pytest.raises(DataError, match=r"'train/a/1\.png': not class/name\.ext.*subfolder="),
        open_source(str(path)),
    ):
        pass


HOSTILE = {
    "../evil.png": special_member("../evil.png", tarfile.REGTYPE),
    "a/../../evil.png": special_member("a/../../evil.png", tarfile.REGTYPE),
    "/etc/evil.png": special_member("/etc/evil.png", tarfile.REGTYPE),
    "C:/evil.png": special_member("C:/evil.png", tarfile.REGTYPE),
    "a\\evil.png": special_member("a\\evil.png", tarfile.REGTYPE),
    "a/\\x1b[31m.png": special_member("a/\x1b[31m.png", tarfile.REGTYPE),
    "a/link.png": special_member("a/link.png", tarfile.SYMTYPE, "/etc/passwd"),
    "a/hard.png": special_member("a/hard.png", tarfile.LNKTYPE, "a/1.JPEG"),
    "a/device.png": special_member("a/device.png", tarfile.CHRTYPE),
    "a/pipe.png": special_member("a/pipe.png", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_dangerous_members_are_refused_by_name(tmp_path: Path, name: str):
    member = HOSTILE[name]
    data = png() if member.isreg() else b""
    path = write_tar(tmp_path / "x.tar", [*TWO_IMAGES, (member, data)])
    with open_source(str(path)) as source:
        assert source.names == ["a/1.JPEG", "b/2.png"]
        assert [(problem.name, problem.action) for problem in source.problems] == [
            (name, "refused")
        ]


@pytest.mark.parametrize("name", ["a/x.pkl", "a/x.pyd", "a/x.txt", "x.png", "a/b/c.png"])
def test_members_that_are_no_class_images_are_skipped_by_name(tmp_path: Path, name: str):
    path = write_tar(tmp_path / "x.tar", [*TWO_IMAGES, (name, b"cos\nsystem\n(S'false'\ntR.")])
    with open_source(str(path)) as source:
        assert len(source) == 2
        assert [(problem.name, problem.action) for problem in source.problems] == [
            (name, "skipped")
        ]


def test_an_empty_member_is_skipped_by_name(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [*TWO_IMAGES, ("a/0.png", b"")])
    with open_source(str(path)) as source:
        assert [problem.reason for problem in source.problems] == ["empty"]


def test_of_two_members_of_one_name_the_first_is_used(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [*TWO_IMAGES, ("a/1.JPEG", png(9))])
    with open_source(str(path)) as source:
        assert source.read(0) == png(1)
        assert source.problems[0].reason.startswith("the name occurs twice")


def test_a_tar_cut_between_two_members_is_an_error(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", TWO_IMAGES)
    path.write_bytes(path.read_bytes()[:1024])  # header and data of the first member
    with pytest.raises(DataError, match="cut off"), open_source(str(path)):
        pass


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.bz2", "x.tar.xz"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_cut_compressed_tar_is_an_error(tmp_path: Path, name: str, share: float):
    path = write_tar(tmp_path / name, TWO_IMAGES)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"cut off|damaged"), open_source(str(path)):
        pass


def test_garbage_named_tar_is_an_error(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(DataError, match="damaged tar file"), open_source(str(tmp_path / "x.tar")):
        pass


def test_a_missing_source_is_named(tmp_path: Path):
    for name in ("none.tar.gz", "none"):
        with pytest.raises(DataError, match=r"none.*no such"), open_source(str(tmp_path / name)):
            pass


def test_photographs_are_a_source():
    config = PhotographsConfig(image_size=16, crops_per_photograph=2)
    with open_source("builtin:photographs", split="val", photographs=config) as source:
        assert len(source) == 24
        assert len(source.read(5)) == source.sizes[5]


def test_photographs_have_two_splits():
    with (
        pytest.raises(ConfigError, match="'train' and 'val'"),
        open_source("builtin:photographs", split="test"),
    ):
        pass


def test_options_without_effect_are_errors(tmp_path: Path):
    with (
        pytest.raises(ConfigError, match="no effect"),
        open_source(str(tmp_path), photographs=PhotographsConfig()),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="no effect"),
        open_source("builtin:photographs", subfolder="train"),
    ):
        pass


def test_a_source_without_files_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"no files; expected images"), open_source(str(tmp_path)):
        pass


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in TWO_IMAGES:
            file.writestr(name, data)
    return path


def write_manifest(path: Path) -> Path:
    write_files(path.parent, TWO_IMAGES)
    path.write_text("path,class\nb/2.png,b\na/1.JPEG,a\n")
    return path


def write_class_tars(path: Path) -> Path:
    return write_tar(path, [(f"{name}.tar", tar_bytes([("1.png", png())])) for name in "ab"])


def write_shard(path: Path) -> Path:
    return write_tar(path, [("1.png", png()), ("1.cls", b"0")])


def write_parquet(folder: Path) -> Path:
    folder.mkdir()
    for name, count in (("a", 1), ("b", 2)):
        table = pa.table({"image": [png()] * count, "label": [0] * count})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize(
    ("write", "name", "lines"),
    [
        (lambda folder: write_files(folder, TWO_IMAGES), "images", ["listing: 2/None files"]),
        (write_zip, "x.zip", ["listing: 2/2 files"]),
        (
            write_manifest,
            "x.csv",
            ["reading rows: 2/None rows", "listing: 3/None files"],
        ),
        (write_class_tars, "x.tar", ["scanning: SIZE/SIZE bytes", "listing classes: 2/2 classes"]),
        (write_shard, "x-0.tar", ["reading shards: 1/1 shards"]),
        (write_parquet, "tables", ["reading rows: 1/1 rows", "reading rows: 2/2 rows"]),
    ],
)
def test_it_is_told_how_far_the_listing_is(
    tmp_path: Path, write: Callable[[Path], Path], name: str, lines: list[str]
):
    path = write(tmp_path / name)
    observer = RecordingObserver()
    with open_source(str(path), observer=observer):
        pass
    size = str(path.stat().st_size)
    # A tar without class tars has none to be listed.
    assert [one for one in observer.lines() if "0/0" not in one] == [
        line.replace("SIZE", size) for line in lines
    ]


def test_unpacking_is_reported_to_its_end(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar.gz", TWO_IMAGES)
    observer = RecordingObserver()
    with open_source(str(path), observer=observer):
        pass
    size = path.stat().st_size
    assert observer.lines()[0] == f"unpacking: {size}/{size} bytes"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("pipe:touch canary", "unknown scheme, and nothing is run"),
        ("http://host/x.tar", "unknown scheme"),
        ("s3://key:secret@bucket/x.tar", "source: holds credentials"),
        ("s3://key:secret@bucket/", "source: holds credentials"),
    ],
)
def test_other_urls_are_refused(tmp_path: Path, monkeypatch, uri: str, message: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught, open_source(uri):
        pass
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_an_unknown_option_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'subfolder'"):
        open_source(str(tmp_path), subfoldr="a").__enter__()


@pytest.mark.parametrize(
    ("option", "value"), [("class_key", "txt"), ("root", "."), ("keep_keys", False)]
)
def test_options_of_other_kinds_of_sources_are_errors(tmp_path: Path, option: str, value: object):
    write_files(tmp_path, TWO_IMAGES)
    with (
        pytest.raises(ConfigError, match=f"{option}: .*has no effect on .*read as folder"),
        open_source(str(tmp_path), **{option: value}),
    ):
        pass


def test_a_folder_of_classes_and_tars_has_to_be_named(tmp_path: Path):
    write_files(tmp_path, TWO_IMAGES)
    write_tar(tmp_path / "left.tar", TWO_IMAGES)
    with pytest.raises(ConfigError, match="format=folder or format=webdataset"):
        open_source(str(tmp_path)).__enter__()
    with open_source(str(tmp_path), format="folder") as source:
        assert source.names == ["a/1.JPEG", "b/2.png"]
        assert [problem.name for problem in source.problems] == ["left.tar"]


@pytest.mark.parametrize("name", ["folder", "x.tar", "x.tar.gz", "x.zip"])
def test_one_content_gives_one_listing_from_any_container(tmp_path: Path, name: str):
    path = tmp_path / name
    if name == "folder":
        write_files(path, TWO_IMAGES)
    elif name == "x.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in TWO_IMAGES:
                archive.writestr(member, data)
    else:
        write_tar(path, TWO_IMAGES)
    with open_source(str(path)) as source:
        assert source.names == ["a/1.JPEG", "b/2.png"]
        assert source.sizes.tolist() == [len(png(1)), len(png(2))]
        assert [source.read(row) for row in range(2)] == [png(1), png(2)]


@pytest.mark.parametrize("name", ["folder", "x.tar", "x.tar.xz"])
def test_the_reader_works_in_another_process(tmp_path: Path, name: str):
    path = tmp_path / name
    _ = write_files(path, TWO_IMAGES) if name == "folder" else write_tar(path, TWO_IMAGES)
    with open_source(str(path)) as source:
        request = pickle.dumps((source.reader, source.names[1], source.place(1)))
        script = (
            "import pickle, sys; reader, name, place = pickle.load(sys.stdin.buffer); "
            "sys.stdout.buffer.write(reader.read(name, place))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], input=request, capture_output=True, check=True
        )
    assert done.stdout == png(2)


@pytest.mark.parametrize(
    ("name", "is_shared", "expected"),
    [("folder", False, False), ("folder", True, True), ("x.tar", True, True)],
)
def test_local_sources_are_shared_if_the_user_says_so(
    tmp_path: Path, name: str, is_shared: bool, expected: bool
):
    path = tmp_path / name
    _ = write_files(path, TWO_IMAGES) if name == "folder" else write_tar(path, TWO_IMAGES)
    with open_source(str(path), is_shared=is_shared) as source:
        assert source.is_shared_by_nodes is expected


def test_an_unpacked_source_is_never_shared(tmp_path: Path):
    path = write_tar(tmp_path / "x.tgz", TWO_IMAGES)
    with open_source(str(path)) as source:
        assert not source.is_shared_by_nodes
    for uri in (str(path), "s3://bucket/x.tar"):
        with pytest.raises(ConfigError, match="is_shared: has no effect"):
            open_source(uri, is_shared=True, format="tar").__enter__()


def test_a_file_of_no_known_kind_has_to_be_named(tmp_path: Path):
    (tmp_path / "notes").write_text("a/1.png,a\n")
    write_files(tmp_path, [("a/1.png", png(1))])
    with pytest.raises(ConfigError, match="no known ending; say what it is with format"):
        open_source(str(tmp_path / "notes")).__enter__()
    with open_source(str(tmp_path / "notes"), format="manifest") as source:
        assert len(source) == 1


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", TWO_IMAGES).rename(tmp_path / "images")
    with open_source(str(path)) as source:
        assert (source.kind, len(source)) == ("tar", 2)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that everybody may enter: pytest's own let in nobody but its user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_a_folder_that_cannot_be_read_is_named(public_folder: Path, request: pytest.FixtureRequest):
    write_files(public_folder, TWO_IMAGES)
    (public_folder / "a").chmod(0)
    request.getfixturevalue("without_root")  # root again before the folder is removed
    with pytest.raises(DataError, match=r"a: no folder that can be read \(Permission denied"):
        open_source(str(public_folder)).__enter__()


def test_a_file_that_changed_after_it_was_listed_is_named(tmp_path: Path):
    write_files(tmp_path, [*TWO_IMAGES, ("c/3.png", png(3))])
    with open_source(str(tmp_path)) as source:
        (tmp_path / "a" / "1.JPEG").write_bytes(png(1) + b"x")
        (tmp_path / "b" / "2.png").write_bytes(png(2)[:-1])
        (tmp_path / "c" / "3.png").unlink()
        for row, name in enumerate(source.names):
            with pytest.raises(DataError, match=f"{name}' changed while it was read"):
                source.read(row)


def test_a_tar_that_became_shorter_is_named(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", TWO_IMAGES)
    with open_source(str(path)) as source:
        path.write_bytes(path.read_bytes()[: int(source.offsets.min()) + 3])
        with pytest.raises(DataError, match=r"'b/2\.png' changed while it was read.*is shorter"):
            source.read(1)


@pytest.mark.parametrize("ending", [".tar", ".zip", ".parquet"])
def test_a_file_whose_name_no_object_may_have_is_named(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"b\\c{ending}").write_bytes(png(1))
    named = pytest.raises(DataError, match=rf"'b\\\\c\{ending}'.*rename")
    with named, open_source(str(tmp_path)):
        pass

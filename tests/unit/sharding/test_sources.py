from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.sources.opening import open_source


def png(color: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[tarfile.TarInfo | str, bytes]]) -> Path:
    mode = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}
    with tarfile.open(path, mode[path.suffix]) as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


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
    "../evil.png": special("../evil.png", tarfile.REGTYPE),
    "a/../../evil.png": special("a/../../evil.png", tarfile.REGTYPE),
    "/etc/evil.png": special("/etc/evil.png", tarfile.REGTYPE),
    "C:/evil.png": special("C:/evil.png", tarfile.REGTYPE),
    "a\\evil.png": special("a\\evil.png", tarfile.REGTYPE),
    "a/\\x1b[31m.png": special("a/\x1b[31m.png", tarfile.REGTYPE),
    "a/link.png": special("a/link.png", tarfile.SYMTYPE, "/etc/passwd"),
    "a/hard.png": special("a/hard.png", tarfile.LNKTYPE, "a/1.JPEG"),
    "a/device.png": special("a/device.png", tarfile.CHRTYPE),
    "a/pipe.png": special("a/pipe.png", tarfile.FIFOTYPE),
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


def test_a_folder_in_a_bucket_is_refused():
    with pytest.raises(ConfigError, match="pack the folder"), open_source("s3://bucket/folder"):
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


def test_unpacking_is_reported_to_its_end(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar.gz", TWO_IMAGES)
    calls: list[tuple[str, int, int]] = []
    with open_source(str(path), progress=lambda *call: calls.append(call)):
        pass
    size = path.stat().st_size
    assert calls[-1] == ("unpacking", size, size)

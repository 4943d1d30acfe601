from __future__ import annotations

import gzip
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from support.dead_owners import name_dead_owner
from support.source_files import png, special_member, tar_bytes, write_tar

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.sources import tar_archive
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.sources.spool import open_spool_folder

CLASS_TARS = [
    ("n02.tar", tar_bytes([("n02_1.JPEG", png(2)), ("./n02_2.JPEG", png(3))])),
    ("n01.tar", tar_bytes([("n01_1.JPEG", png(1))])),
]


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "train.tar.gz"])
def test_a_tar_of_class_tars_is_read_in_place(tmp_path: Path, name: str):
    with open_source(str(write_tar(tmp_path / name, CLASS_TARS))) as source:
        assert source.names == ["n01/n01_1.JPEG", "n02/n02_1.JPEG", "n02/n02_2.JPEG"]
        assert [source.read(row) for row in range(3)] == [png(1), png(2), png(3)]
        assert source.problems == []


def test_class_tars_may_hold_the_class_folder_and_lie_in_a_subfolder(tmp_path: Path):
    inner = tar_bytes([("a/1.png", png(1))])
    path = write_tar(tmp_path / "x.tar", [("train/a.tar", inner), ("val/b.tar", inner)])
    with open_source(str(path), subfolder="train") as source:
        assert source.names == ["a/1.png"]


def test_odd_members_of_class_tars_are_named(tmp_path: Path):
    inner = tar_bytes(
        [
            ("1.png", png()),
            ("deep/2.png", png()),
            ("notes.txt", b"x"),
            ("../evil.png", png()),
            (special_member("link.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
            ("nested.tar", tar_bytes([])),
        ]
    )
    with open_source(str(write_tar(tmp_path / "x.tar", [("a.tar", inner)]))) as source:
        assert source.names == ["a/1.png"]
        assert {problem.name: problem.action for problem in source.problems} == {
            "a/../evil.png": "refused",
            "a/deep/2.png": "skipped",
            "a/link.png": "refused",
            "a/nested.tar": "skipped",
            "a/notes.txt": "skipped",
        }


def test_a_class_tar_that_is_cut_off_is_named(tmp_path: Path):
    cut = CLASS_TARS[0][1][:2048]
    path = write_tar(tmp_path / "x.tar", [("n02.tar", cut), CLASS_TARS[1]])
    # What follows in the outer tar is not taken for members of the inner one.
    with pytest.raises(DataError, match=r"n02\.tar: .*(cut off|damaged)"), open_source(str(path)):
        pass


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [("a/1.png", png())])
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 * 2**30
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    with (
        pytest.raises(DataError, match="an extended header of 8589934592 bytes"),
        open_source(str(path)),
    ):
        pass


def test_a_member_of_negative_size_is_refused(tmp_path: Path):
    info = tarfile.TarInfo("a/1.png")
    info.size = -512
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match="damaged tar file"), open_source(str(path)):
        pass


def test_a_decompression_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tar_archive, "_HARMLESS_BYTES", 2**20)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(bytes(64 * 2**20)))
    with pytest.raises(DataError, match=r"x\.tar\.gz: a decompression bomb"):
        open_source(str(path)).__enter__()


def test_the_temporary_file_is_removed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with open_source(str(write_tar(tmp_path / "x.tar.gz", CLASS_TARS))):
        assert len(os.listdir(tmp_path / "tmp")) == 1
    assert os.listdir(tmp_path / "tmp") == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"fqgan-data-{name_dead_owner()}-abcdefgh").mkdir()
    (tmp_path / "other-dead").mkdir()
    with open_spool_folder() as used:
        with open_spool_folder():
            pass
        assert sorted(os.listdir(tmp_path)) == [used.name, "other-dead"]


def test_thousands_of_extended_headers_in_a_row_are_refused(tmp_path: Path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 7
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a/x.jpg".ljust(512, b"\0")
    (tmp_path / "x.tar").write_bytes(5000 * block + bytes(1024))
    with (
        pytest.raises(DataError, match=r"damaged tar file .*recursion"),
        open_source(str(tmp_path / "x.tar"), format="tar"),
    ):
        pass

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.source_files import png

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.sources.opening import open_source


def write_zip(
    path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


TWO_IMAGES = [("b/2.png", png(2)), ("a/1.JPEG", png(1))]


def replace_field(path: Path, signature: bytes, offset: int, value: bytes) -> None:
    """Overwrite a field of the first header with a signature."""
    data = bytearray(path.read_bytes())
    start = data.index(signature) + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_at_random(tmp_path: Path, method: int):
    path = write_zip(tmp_path / "x.zip", [("a/", b""), *TWO_IMAGES], method)
    with open_source(str(path)) as source:
        assert source.names == ["a/1.JPEG", "b/2.png"]
        assert [source.read(1), source.read(0)] == [png(2), png(1)]
        assert source.problems == []


@settings(max_examples=30)
@given(data=st.data())
def test_what_zipfile_writes_is_listed_as_zipfile_lists_it(tmp_path_factory, data: st.DataObject):
    count = data.draw(st.integers(1, 6))
    generator = random.Random(data.draw(st.integers(0, 2**16)))
    file = io.BytesIO(bytes(data.draw(st.integers(0, 40))))
    file.seek(0, io.SEEK_END)  # a prefix, as self-extracting archives have
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"x" * data.draw(st.sampled_from([0, 1, 65535]))
        for number in range(count):
            info = zipfile.ZipInfo(f"{'k' * generator.randint(1, 90)}/{number}é.png")
            info.extra = struct.pack("<HH", 0x7777, 40) + bytes(40)
            info.compress_type = generator.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
            with archive.open(info, "w", force_zip64=generator.random() < 0.5) as member:
                member.write(generator.randbytes(generator.randint(1, 500)))
    path = tmp_path_factory.mktemp("zip") / "x.zip"
    path.write_bytes(file.getvalue())
    with zipfile.ZipFile(path) as archive, open_source(str(path)) as source:
        assert source.names == sorted(archive.namelist())
        for row, name in enumerate(source.names):
            assert source.read(row) == archive.read(name)


def test_more_members_than_the_old_format_counts(tmp_path: Path):
    count = 2**16 + 1
    path = write_zip(
        tmp_path / "x.zip", [(f"a/{n}.png", b"x") for n in range(count)], zipfile.ZIP_STORED
    )
    with open_source(str(path)) as source:
        assert len(source) == count
        assert source.read(count - 1) == b"x"


def test_a_subfolder_holds_the_classes(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", [("train/a/1.png", png()), ("val/a/2.png", png())])
    with open_source(str(path), subfolder="train") as source:
        assert source.names == ["a/1.png"]


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("../evil.png", "refused"),
        ("/etc/evil.png", "refused"),
        ("a/../../evil.png", "refused"),
        ("a/x.pkl", "skipped"),
        ("a/x.png.exe", "skipped"),
    ],
)
def test_dangerous_and_odd_members_are_named(tmp_path: Path, name: str, action: str):
    path = write_zip(tmp_path / "x.zip", [*TWO_IMAGES, (name, png())])
    with open_source(str(path)) as source:
        assert len(source) == 2
        assert [(problem.name, problem.action) for problem in source.problems] == [(name, action)]


def test_links_are_refused(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", TWO_IMAGES)
    link = zipfile.ZipInfo("a/link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with open_source(str(path)) as source:
        assert [problem.name for problem in source.problems] == ["a/link.png"]


def test_other_compressions_are_named(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", TWO_IMAGES)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/3.png", png(3))
    with open_source(str(path)) as source:
        assert source.problems[0].reason.startswith("compressed by method 14")


def test_encrypted_members_are_named(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", TWO_IMAGES)
    replace_field(path, b"PK\x01\x02", 8, b"\x01\x00")
    with open_source(str(path)) as source:
        assert source.names == ["a/1.JPEG"]
        assert source.problems[0].reason == "encrypted"


def test_a_bomb_is_refused_by_name(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", [*TWO_IMAGES, ("a/bomb.png", bytes(4 * 2**20))])
    with open_source(str(path)) as source:
        assert len(source) == 2
        assert source.problems[0].name == "a/bomb.png"
        assert "decompression bomb" in source.problems[0].reason


def test_a_bomb_that_lies_about_its_size_is_not_inflated_further(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", [("a/bomb.png", bytes(64 * 2**20))])
    replace_field(path, b"PK\x01\x02", 24, struct.pack("<L", 1000))
    with open_source(str(path)) as source:
        assert source.sizes.tolist() == [1000]
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=r"bomb\.png.*inflates to more than the 1000 bytes"):
                source.read(0)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_members_that_share_bytes_are_refused(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", [("a/1.png", png(1)), ("b/2.png", png(1))])
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = bytes(4)  # the place of the first member
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"'a/1\.png' and 'b/2\.png' overlap"):
        open_source(str(path)).__enter__()


def test_a_member_that_claims_to_lie_outside_is_named(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", TWO_IMAGES)
    replace_field(path, b"PK\x01\x02", 42, struct.pack("<L", 10**6))
    with open_source(str(path)) as source:
        assert source.problems[0].reason == "it lies outside of the archive"


def test_damaged_bytes_are_found_when_they_are_read(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", TWO_IMAGES, zipfile.ZIP_STORED)
    with open_source(str(path)) as source:
        data = bytearray(path.read_bytes())
        data[data.index(png(1)) + 30] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"'a/1\.JPEG' changed.*checksum"):
            source.read(0)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9, 0.99])
def test_a_cut_zip_is_an_error(tmp_path: Path, share: float):
    path = write_zip(tmp_path / "x.zip", TWO_IMAGES)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match="not a zip, or cut off"), open_source(str(path)):
        pass


@settings(max_examples=200)
@given(position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_damaged_directory_never_raises_anything_else(tmp_path_factory, position: int, flip: int):
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    write_zip(path, TWO_IMAGES)
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + position % (len(data) - start)] ^= flip
    path.write_bytes(data)
    try:
        with open_source(str(path)) as source:
            for row in range(len(source)):
                source.read(row)
    except DataError:
        pass


def test_a_zip_in_several_files_is_an_error(tmp_path: Path):
    path = write_zip(tmp_path / "x.zip", TWO_IMAGES)
    replace_field(path, b"PK\x05\x06", 4, b"\x01\x00")
    with pytest.raises(DataError, match="several files"), open_source(str(path)):
        pass

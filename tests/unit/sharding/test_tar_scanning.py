from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic_shards import pack

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.tar_scanning import TarMember, TarScan, group_samples

MEMBERS = [("a/x.jpg", b"image"), ("a/x.cls", b"1"), ("__meta__/y.jpg", b"no"), ("README", b"hi")]


def scan(tar: bytes) -> tuple[list[TarMember], tuple[str, int]]:
    scan = TarScan(io.BytesIO(tar), source="x.tar")
    members = list(scan.members(lambda name: not name.endswith(".cls")))
    return members, scan.finish()


def test_members_come_with_their_places_and_the_hash_of_all() -> None:
    tar = pack(MEMBERS)
    members, (sha256, size) = scan(tar)
    assert (sha256, size) == (hashlib.sha256(tar).hexdigest(), len(tar))
    assert [member.name for member in members] == [name for name, _ in MEMBERS]
    for member, (_, data) in zip(members, MEMBERS, strict=True):
        assert tar[member.offset : member.offset + member.size] == data
    assert [member.data for member in members] == [b"image", None, b"no", b"hi"]


def test_samples_are_neighbours_of_one_key() -> None:
    members, _ = scan(pack([*MEMBERS, ("b.jpg", b"1"), ("a/x.png", b"2")]))
    samples = list(group_samples(members))
    assert [sample.key for sample in samples] == ["a/x", "b", "a/x"]
    assert [member.suffix for member in samples[0].members] == ["jpg", "cls"]
    assert samples[0].find("cls", "txt")[0].name == "a/x.cls"


def test_suffixes_are_small_letters_after_the_first_dot() -> None:
    (member, *_), _ = scan(pack([("d.ir/X.RGB.Png", b"")]))
    assert (member.key, member.suffix) == ("d.ir/X", "rgb.png")


def test_folders_are_passed_over() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert scan(file.getvalue())[0] == []


def test_padding_behind_the_end_mark_is_hashed() -> None:
    tar = pack(MEMBERS) + bytes(100_000)
    assert scan(tar)[1] == (hashlib.sha256(tar).hexdigest(), len(tar))


@pytest.mark.parametrize("rest", [b"something", pack(MEMBERS)], ids=["something", "a tar"])
def test_what_follows_the_end_mark_is_never_passed_over(rest: bytes) -> None:
    with pytest.raises(DataError, match="goes on behind its end mark"):
        scan(pack(MEMBERS) + rest)


@settings(max_examples=150)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 4 * 1024), st.integers(0, 255)), min_size=1, max_size=6
    ),
    length=st.integers(0, 10 * 1024),
)
def test_a_damaged_tar_is_an_error_of_ours_or_another_tar(
    changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(pack(MEMBERS)[: length or None])
    for place, value in changes:
        if place < len(data):
            data[place] = value
    try:
        members, (sha256, size) = scan(bytes(data))
    except DataError:
        return
    assert (sha256, size) == (hashlib.sha256(data).hexdigest(), len(data))
    for member in members:
        assert member.offset + member.size <= len(data) or member.danger or not member.data


@pytest.mark.parametrize("data", [b"", b"x" * 512, bytes(10)])
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"not a whole, plain tar|no end mark"):
        scan(data)


@pytest.mark.parametrize("size", [-1, -512, -(2**40)])
def test_a_negative_size_in_an_extended_header_is_refused(size: int) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": str(size)}
    tar = info.tobuf(tarfile.PAX_FORMAT) + pack([("a.cls", b"1")])
    with pytest.raises(DataError, match="not a whole, plain tar"):
        scan(tar)


def test_thousands_of_extended_headers_in_a_row_are_refused() -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5
    block = header.tobuf(tarfile.GNU_FORMAT) + b"a.jpg".ljust(512, b"\0")
    with pytest.raises(DataError, match="recursion"):
        scan(5000 * block + bytes(1024))


def test_a_name_of_a_megabyte_is_shown_by_its_beginning() -> None:
    (member,), _ = scan(pack([("x" * 2**19 + ".jpg", b"")]))
    assert member.danger is not None
    assert "at most 1000" in member.danger
    assert member.name == "x" * 1000 + "..."


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\xff" * 11, b"\x80\0\0\0\x7f" + b"\xff" * 7, b"7" * 11 + b"\0"]
)
def test_a_member_that_ends_behind_the_file_is_not_stepped_over(size: bytes) -> None:
    tar = bytearray(pack(MEMBERS))
    tar[124:136] = size
    tar[148:156] = b" " * 8
    tar[148:156] = b"%06o\0 " % sum(tar[:512])
    with pytest.raises(DataError, match=r"'a/x\.jpg' of [0-9]+ bytes ends behind the file"):
        scan(bytes(tar))

"""Images in no class folder, sets without classes, and files known by their first bytes."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from support.layouts import write_zip
from support.source_files import png, tar_bytes, write_files, write_tar

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.sources.opening import open_source

NESTED = [("1.png", png(1)), ("00/2.v2.png", png(2)), ("00/deep/3.png", png(3))]


def _write(path: Path, files: list[tuple[str, bytes]]) -> str:
    match path.suffix:
        case ".zip":
            write_zip(path, files)
        case "":
            write_files(path, files)
        case _:
            write_tar(path, files)
    return str(path)


@pytest.mark.parametrize("container", ["folder", "x.tar", "x.tar.gz", "x.zip"])
def test_images_without_classes_lie_at_any_depth(tmp_path: Path, container: str) -> None:
    odd = [("notes.txt", b"x"), ("@eaDir/4.png", png(4)), ("00/empty.png", b"")]
    source = _write(tmp_path / container, [*NESTED, *odd])
    with open_source(source, class_key="none") as listing:
        assert listing.names == sorted(f"all/{name}" for name, _ in NESTED)
        assert listing.class_names() == ["all"]
        assert not listing.has_classes
        assert {problem.name for problem in listing.problems} == {
            "notes.txt",
            "@eaDir",
            "00/empty.png",
        }
        assert {listing.read(row) for row in range(3)} == {data for _, data in NESTED}


@pytest.mark.parametrize("container", ["folder", "x.tar", "x.zip"])
@pytest.mark.parametrize("name", ["1.png", "images/1.png"])
def test_images_in_no_class_folder_are_no_class(tmp_path: Path, container: str, name: str) -> None:
    source = _write(tmp_path / container, [(name, png(1))])
    with pytest.raises(DataError, match=r"name the list of their classes .*class_key=none"):
        open_source(source).__enter__()


@pytest.mark.parametrize("container", ["folder", "x.tar", "x.zip"])
def test_a_folder_of_images_in_a_class_folder_stands_for_it(tmp_path: Path, container: str) -> None:
    files = [("a/images/1.png", png(1)), ("b/images/2.png", png(2)), ("val/images/3.png", png(3))]
    source = _write(tmp_path / container, files)
    with open_source(source) as listing:
        assert listing.names == ["a/1.png", "b/2.png"]
        assert listing.read(1) == png(2)
        assert any(problem.name.startswith("val") for problem in listing.problems)


def test_links_that_lead_back_are_named(tmp_path: Path) -> None:
    write_files(tmp_path / "x", NESTED)
    (tmp_path / "x" / "00" / "back").symlink_to(tmp_path / "x")
    with open_source(str(tmp_path / "x"), class_key="none") as listing:
        assert len(listing) == 3
        assert [(p.name, p.reason) for p in listing.problems] == [
            ("00/back", "a link to a folder that holds it")
        ]


def test_samples_without_classes_stay_samples(tmp_path: Path) -> None:
    members = [("00/1.png", png(1)), ("00/1.json", b"{}")]
    with open_source(str(write_tar(tmp_path / "x.tar", members)), class_key="none") as listing:
        assert listing.kind == "webdataset"


TAR = tar_bytes([("a/1.png", png(1))])


def _zstd(data: bytes) -> bytes:
    file = pa.BufferOutputStream()
    with pa.CompressedOutputStream(file, "zstd") as packed:
        packed.write(data)
    return file.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["x.tar.zst", "x.tzst", "x.tar", "images"])
@pytest.mark.parametrize("pack", [_zstd, gzip.compress], ids=["zstd", "gzip"])
def test_a_compressed_tar_is_read_whatever_its_name(tmp_path: Path, name: str, pack) -> None:
    (tmp_path / name).write_bytes(pack(TAR))
    with open_source(str(tmp_path / name)) as listing:
        assert listing.names == ["a/1.png"]
        assert listing.read(0) == png(1)


@pytest.mark.parametrize("cut", [-3, 20])
def test_a_cut_zstd_is_an_error(tmp_path: Path, cut: int) -> None:
    (tmp_path / "x.tar.zst").write_bytes(_zstd(TAR)[:cut])
    with pytest.raises(DataError, match="damaged or cut off"):
        open_source(str(tmp_path / "x.tar.zst")).__enter__()


def test_a_zip_called_tar_is_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.tar", "w") as archive:
        archive.writestr("a/1.png", png(1))
    with open_source(str(tmp_path / "x.tar")) as listing:
        assert listing.kind == "zip"


@pytest.mark.parametrize(
    ("head", "command"),
    [
        (b"7z\xbc\xaf\x27\x1c", "7z x"),
        (b"Rar!\x1a\x07\x01\0", "unrar x"),
        (b"\x04\x22\x4d\x18", "lz4 -d"),
    ],
)
def test_what_is_not_read_is_named_with_what_unpacks_it(
    tmp_path: Path, head: bytes, command: str
) -> None:
    (tmp_path / "x.tar.any").write_bytes(head + bytes(100))
    with pytest.raises(DataError, match=f"unpack it with `{command}`"):
        open_source(str(tmp_path / "x.tar.any")).__enter__()


@pytest.mark.parametrize("value", ["txt", "label"])
def test_a_folder_takes_no_other_class_key(tmp_path: Path, value: str) -> None:
    write_files(tmp_path / "x", NESTED)
    with pytest.raises(
        ConfigError, match=r"class_key: .* has no effect on .*where the class is the folder"
    ):
        open_source(str(tmp_path / "x"), class_key=value, format="folder").__enter__()

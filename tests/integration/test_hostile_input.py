"""Datasets as hostile input: refused by name; nothing is run, nothing is written elsewhere."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.source_files import png, special_member, tar_bytes
from support.synthetic_shards import pack

from data_tools.cli import main
from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import (
    DatasetIndex,
    SampleTable,
    decode_samples,
    encode_samples,
    load_index,
    table_name,
)
from fqgan_dist.data.loader import ImageLoader
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage


class Attack:
    """Unpickled, it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.canary), "w"))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that must not be there, and a folder around which nothing may change."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the attack was run"


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Path]:
    """A folder for shards, deep enough that `../` names stay below `tmp_path`."""
    folder = tmp_path / "outside" / "deep" / "shards"
    folder.mkdir(parents=True)
    yield folder
    outside = [path for path in (tmp_path / "outside").rglob("*") if folder not in path.parents]
    assert outside == [tmp_path / "outside" / "deep", folder], "something was written outside"
    assert not Path("/tmp/fqgan-hostile-canary.jpg").exists()


def good(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(1)), (f"{key}.cls", b"0")]


def index(folder: Path, *options: str) -> int:
    return main(["index", str(folder), "name=x", "split=train", "workers=1", *options])


def refused(folder: Path) -> dict[str, str]:
    problems = load_index(Storage(folder)).problems
    return {problem.name: problem.reason for problem in problems if problem.action == "refused"}


def keys_read(folder: Path) -> list[str]:
    storage = Storage(folder)
    index = load_index(storage)
    return [key for shard in index.shards for key, _, _ in iterate_shard(storage, shard)]


def test_the_attack_works_where_pickles_are_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Attack(tmp_path / "canary"))).close()
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("suffix", ["pkl", "pyd", "pickle", "pth", "pt", "data.pkl", "PKL"])
def test_pickles_are_never_loaded(shards: Path, canary: Path, suffix: str) -> None:
    members = [*good("a"), (f"a.{suffix}", pickle.dumps(Attack(canary)))]
    (shards / "0.tar").write_bytes(pack(members))
    assert index(shards, "deep=true") == 0
    assert "a pickle: loading it would run" in refused(shards)[f"0.tar/a.{suffix}"]
    assert main(["verify", str(shards), "deep=true"]) == 0
    assert keys_read(shards) == ["a"]


def test_an_image_that_is_a_pickle_is_no_image(shards: Path, canary: Path) -> None:
    members = [*good("a"), ("b.png", pickle.dumps(Attack(canary))), ("b.cls", b"0")]
    (shards / "0.tar").write_bytes(pack(members))
    assert index(shards) == 0
    assert keys_read(shards) == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        "../../escape.jpg",
        "x/../../../escape.jpg",
        "/tmp/fqgan-hostile-canary.jpg",
        "C:\\escape.jpg",
        "..\\escape.jpg",
        "bell\a.jpg",
    ],
)
def test_names_that_leave_the_folder_are_refused(shards: Path, name: str, tmp_path: Path) -> None:
    (shards / "0.tar").write_bytes(pack([*good("a"), (name, png(2))]))
    assert index(shards) == 0
    assert len(refused(shards)) == 1
    assert main(["verify", str(shards), "deep=true"]) == 0
    assert main(["reshard", str(shards), str(tmp_path / "new"), "workers=1"]) == 0
    assert keys_read(tmp_path / "new") == ["a"]


@pytest.mark.parametrize(
    ("kind", "target"),
    [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../../x"), (tarfile.CHRTYPE, "")],
)
def test_links_and_devices_are_refused(shards: Path, kind: bytes, target: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(special_member("link.png", kind, target))
        for name, data in good("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (shards / "0.tar").write_bytes(file.getvalue())
    assert index(shards) == 0
    assert list(refused(shards)) == ["0.tar/link.png"]


def bomb_png(side: int) -> bytes:
    """A valid PNG of side x side grey pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    lines = zlib.compress(bytes(side + 1) * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", ["deep=false", "deep=true"])
def test_a_decompression_bomb_is_refused_by_name(shards: Path, depth: str) -> None:
    members = [*good("a"), ("bomb.png", bomb_png(60_000)), ("bomb.cls", b"0")]
    (shards / "0.tar").write_bytes(pack(members))
    assert index(shards, depth) == 0
    problems = {item.name: item.reason for item in load_index(Storage(shards)).problems}
    assert "pixels" in problems["0.tar/bomb"]
    assert keys_read(shards) == ["a"]


def test_a_bomb_in_a_dataset_is_damage(shards: Path) -> None:
    """Its maker vouches for it, so only a look at the image finds it."""
    publish(shards, pack([("bomb.png", bomb_png(60_000)), ("bomb.cls", b"0")]), "bomb")
    assert main(["verify", str(shards), "deep=true"]) == 3


@pytest.mark.parametrize("extended", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_refused(
    shards: Path, extended: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = extended, 2**33
    header = info.tobuf(tarfile.GNU_FORMAT)
    (shards / "0.tar").write_bytes(header + bytes(10_000))
    assert index(shards) == 1
    assert "an extended header of 8589934592 bytes" in capsys.readouterr().err


def pax_header(kind: bytes, data: bytes) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


@pytest.mark.parametrize("command", ["shard", "index"])
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (pax_header(tarfile.XHDTYPE, b"9" * 2**20), "a number of more than 20 digits"),
        (pax_header(tarfile.XGLTYPE, b"9" * 2**12), "a number of more than 20 digits"),
        (pax_header(tarfile.XGLTYPE, b"20 comment=12345678\n" * 1000), "global headers of"),
    ],
)
def test_a_header_that_would_take_hours_is_refused(
    shards: Path, command: str, header: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "0.tar").write_bytes(header + tar_bytes(good("a")))
    if command == "index":
        assert index(shards) == 1
    else:
        options = ["name=x", "split=train", "format=tar"]
        assert main(["shard", str(shards / "0.tar"), str(shards / "out"), *options]) == 1
    assert reason in capsys.readouterr().err


def test_a_sample_of_thousands_of_members_is_refused(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"a.{number}", b"") for number in range(2000)]
    (shards / "0.tar").write_bytes(tar_bytes(members))
    assert index(shards) == 1
    assert "give each sample a key of its own" in capsys.readouterr().err


def test_a_member_of_negative_size_is_refused(shards: Path) -> None:
    header = bytearray(pack(good("a"))[:512])
    header[124:136] = b"\xff" * 12
    unsigned = sum(header[:148]) + 8 * 32 + sum(header[156:])
    header[148:156] = b"%06o\0 " % unsigned
    (shards / "0.tar").write_bytes(bytes(header) + bytes(10_000))
    assert index(shards) == 1


def publish(folder: Path, tar: bytes, key: str, **changes: object) -> None:
    """Write a dataset of one shard by hand, as an attacker would."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        member = archive.getmembers()[0]
    image = tar[member.offset_data : member.offset_data + member.size]

    def column(value: int, kind: type = np.int64) -> np.ndarray:
        return np.array([value], kind)

    table = SampleTable(
        [key],
        column(0, np.int32),
        column(member.offset_data),
        column(member.size),
        column(10, np.int32),
        column(10, np.int32),
        np.frombuffer(hashlib.sha256(image).digest()[:16], np.uint8).reshape(1, 16),
    )
    data = encode_samples(table, {})
    shard = {
        "file": "shard-000000.tar",
        "count": 1,
        "bytes": len(tar),
        "sha256": hashlib.sha256(tar).hexdigest(),
        "samples_sha256": hashlib.sha256(data).hexdigest(),
    }
    values = {
        "name": "x",
        "split": "train",
        "classes": ["a"],
        "image_policy": {},
        "shards": [shard],
    }
    index = DatasetIndex.model_validate(values)
    text = json.loads(index.to_bytes())
    text["shards"][0].update(changes)
    (folder / shard["file"]).write_bytes(tar)
    (folder / table_name(shard["file"])).write_bytes(data)
    (folder / "index.json").write_text(
        json.dumps(text, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )


HOSTILE_FILES = (
    "pipe:touch {canary}",
    "pipe:touch {canary}; cat x.tar",
    "../secret.tar",
    "/etc/passwd.tar",
    "s3://other/x.tar",
    "http://host/x.tar",
    "a/b.tar",
    "file:x.tar",
)


@pytest.mark.parametrize("file", HOSTILE_FILES)
@pytest.mark.parametrize("command", ["verify", "stats", "reshard", "loader"])
def test_an_index_names_no_file_elsewhere_and_no_command(
    shards: Path,
    canary: Path,
    tmp_path: Path,
    file: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = file.format(canary=canary)
    publish(shards, pack(good("a")), "a", file=name)
    match command:
        case "verify":
            assert main(["verify", str(shards)]) == 3
        case "stats":
            assert main(["stats", str(shards)]) == 1
        case "reshard":
            assert main(["reshard", str(shards), str(tmp_path / "new"), "workers=1"]) == 1
        case _:
            with pytest.raises(DataError, match="is not a shard name"):
                load_index(Storage(shards))
            return
    output = capsys.readouterr()
    assert f"{name!r} is not a shard name" in output.out + output.err


@pytest.mark.parametrize("uri", ["pipe:touch {canary}", "pipe:touch {canary} |", "gs://b/x"])
@pytest.mark.parametrize("command", ["shard", "index", "verify", "stats", "reshard", "merge"])
def test_a_source_is_never_a_command(
    canary: Path,
    tmp_path: Path,
    uri: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source, target = uri.format(canary=canary), str(tmp_path / "new")
    settings = ["name=x", "split=train"]
    arguments = {
        "shard": [source, target, *settings],
        "index": [source, *settings],
        "reshard": [source, target],
        "merge": [source, source, target, "name=x"],
    }
    assert main([command, *arguments.get(command, [source])]) in (1, 2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", ["../up", "/etc/x", "a/../../b", "C:x", "a\\b", "a\nb", "a.b"])
def test_a_table_of_hostile_keys_is_refused(shards: Path, key: str) -> None:
    publish(shards, pack(good("a")), key)
    with pytest.raises(DataError, match="is not a safe key"):
        decode_samples((shards / "shard-000000.samples.parquet").read_bytes(), source="x")
    assert main(["verify", str(shards)]) == 3
    assert main(["stats", str(shards)]) == 1


def test_credentials_in_a_uri_are_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "s3://user:secret@bucket/x"]) == 2
    assert "secret" not in capsys.readouterr().err


def test_the_loader_reads_by_places_and_runs_nothing(shards: Path, canary: Path) -> None:
    members = [*good("a"), ("a.pyd", pickle.dumps(Attack(canary))), ("../x.png", png(2))]
    (shards / "0.tar").write_bytes(pack(members))
    assert index(shards) == 0
    loader = ImageLoader(
        Dataset.open(Storage(shards)),
        seed=0,
        view=ViewConfig(policy="center", image_size=8),
        num_views=None,
        micro_batch_size=1,
        micro_batches_per_step=1,
        window_shards=8,
        loader_workers=0,
        max_damaged_in_a_row=1,
    )
    (batch,) = itertools.islice(loader.batches(0, [0]), 1)
    assert batch[0].keys == ["a"]

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.datasets import build_photographs
from support.source_files import png, write_tar
from webdataset.writer import TarWriter

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.sources.shard_pattern import expand_pattern
from fqgan_dist.storage.storage import Storage

CANARY = b"cos\nsystem\n(S'touch canary'\ntR."


def sample(key: str, label: int | str, color: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.png", png(color))]


def write_shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_tar(folder / "shard-000.tar", [*sample("k2", 2, 2), *sample("k10", 10, 10)])
    write_tar(folder / "shard-001.tar", sample("k0", 0, 0))
    return folder


@pytest.mark.parametrize("pattern", ["", "/shard-{000..001}.tar"])
def test_shards_without_an_index_are_scanned(tmp_path: Path, pattern: str):
    folder = write_shards(tmp_path / "shards")
    (folder / "README.md").write_text("hello")
    (folder / "model.pt").write_bytes(CANARY)
    with open_source(f"{folder}{pattern}") as source:
        assert source.kind == "webdataset"
        assert source.names == ["0/k0.image", "10/k10.image", "2/k2.image"]
        assert source.keys == ["k0", "k10", "k2"]
        assert [source.read(row) for row in range(3)] == [png(0), png(10), png(2)]
        # Labels are numbers, so every image keeps its own.
        assert source.class_names() == [str(label) for label in range(11)]
        expected = [] if pattern else ["model.pt"]
        assert [problem.name for problem in source.problems] == expected


def test_one_shard_is_told_from_a_tar_of_class_folders(tmp_path: Path):
    folder = write_shards(tmp_path)
    with open_source(str(folder / "shard-001.tar")) as source:
        assert (source.kind, source.keys) == ("webdataset", ["k0"])


def test_a_dataset_with_an_index_is_listed_without_reading_its_shards(tmp_path: Path):
    index = build_photographs(Storage(tmp_path / "data"))
    shards = [tmp_path / "data" / entry.file for entry in index.shards]
    contents = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards, contents, strict=True):
        shard.write_bytes(bytes(len(content)))
    with open_source(str(tmp_path / "data")) as source:
        assert source.class_names() == index.classes
        assert len(source) == index.num_samples
        for shard, content in zip(shards, contents, strict=True):
            shard.write_bytes(content)
        with open_source("builtin:photographs", photographs=None) as whole:
            assert set(source.class_names()) == set(whole.class_names())
        assert all(source.read(row).startswith(b"\x89PNG") for row in range(len(source)))


def test_the_index_gives_the_same_images_as_a_pass_over_the_shards(tmp_path: Path):
    build_photographs(Storage(tmp_path / "data"))
    with open_source(str(tmp_path / "data")) as by_index:
        rows = range(len(by_index))
        found = {by_index.keys[row]: by_index.read(row) for row in rows if by_index.keys}
    (tmp_path / "data" / "index.json").unlink()
    with open_source(str(tmp_path / "data")) as by_scan:
        rows = range(len(by_scan))
        assert {by_scan.keys[row]: by_scan.read(row) for row in rows if by_scan.keys} == found


def test_a_flipped_bit_is_found_by_the_index(tmp_path: Path):
    index = build_photographs(Storage(tmp_path / "data"))
    path = tmp_path / "data" / index.shards[0].file
    with open_source(str(tmp_path / "data")) as source:
        row = next(n for n in range(len(source)) if source.place(n).file == index.shards[0].file)
        data = bytearray(path.read_bytes())
        data[source.place(row).offset + 20] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"shard-000000\.tar.*changed.*checksum"):
            source.read(row)


def test_the_index_of_a_folder_says_what_belongs_to_it(tmp_path: Path):
    index = build_photographs(Storage(tmp_path / "data"))
    # As an extension leaves it that was interrupted.
    write_tar(tmp_path / "data" / "extension-0001-000000.tar", sample("new", 0))
    with open_source(str(tmp_path / "data")) as source:
        assert (len(source), source.class_names()) == (index.num_samples, index.classes)
        (problem,) = source.problems
    assert problem.name == "extension-0001-000000.tar"
    assert "does not name this shard" in problem.reason


def test_missing_shards_of_an_index_are_an_error(tmp_path: Path):
    index = build_photographs(Storage(tmp_path / "data"))
    (tmp_path / "data" / index.shards[0].file).unlink()
    with (
        pytest.raises(DataError, match=r"1 of its \d+ shards are missing: \['shard-000000.tar'\]"),
        open_source(str(tmp_path / "data")),
    ):
        pass
    last = index.shards[-1]
    with open_source(str(tmp_path / "data" / last.file)) as source:  # what is there may be named
        assert (len(source), source.class_names()) == (last.count, index.classes)


def test_an_index_of_another_program_is_no_index(tmp_path: Path):
    folder = write_shards(tmp_path)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": []}))
    with open_source(str(folder)) as source:
        assert len(source) == 3


def test_repeated_keys_are_refused_or_made_new(tmp_path: Path):
    write_tar(tmp_path / "a.tar", sample("000", 1, 1))
    write_tar(tmp_path / "b.tar", sample("000", 1, 2))
    with pytest.raises(DataError, match=r"'000' occurs twice.*keep_keys=false"):
        open_source(str(tmp_path)).__enter__()
    with open_source(str(tmp_path), keep_keys=False) as source:
        assert source.names == ["1/a/000.image", "1/b/000.image"]
        assert source.keys is None
        assert source.read(1) == png(2)


@pytest.mark.parametrize(
    ("class_key", "members", "expected"),
    [
        ("txt", [("k.txt", b"goldfish\n")], "goldfish"),
        ("cls", [("k.cls", b"007")], "7"),
        ("json.label", [("k.json", b'{"label": 7}')], "7"),
        ("json.label", [("k.json", b'{"label": "fish"}')], "fish"),
        ("none", [], "all"),
    ],
)
def test_the_class_stands_where_the_user_says(
    tmp_path: Path, class_key: str, members: list[tuple[str, bytes]], expected: str
):
    path = write_tar(tmp_path / "x.tar", [("k.png", png()), *members])
    with open_source(str(path), class_key=class_key) as source:
        assert source.names == [f"{expected}/k.image"]


@pytest.mark.parametrize(
    "members",
    [
        [("k.json", b"{")],
        [("k.json", b'{"label": null}')],
        [("k.json", b'{"label": true}')],
        [("k.json", b"[1]")],
        [("k.json", b'{"label": "a/b"}')],
        [("k.json", b'{"label": ".."}')],
        [("k.txt", b"1")],
        [],
    ],
)
def test_samples_without_a_class_are_named(tmp_path: Path, members: list[tuple[str, bytes]]):
    good = [("good.png", png()), ("good.json", b'{"label": 1}')]
    path = write_tar(tmp_path / "x.tar", [("k.png", png()), *members, *good])
    with open_source(str(path), class_key="json.label", format="webdataset") as source:
        assert source.keys == ["good"]
        assert source.problems[0].name == "x.tar/k"


@pytest.mark.parametrize("class_key", ["json", "cls.label", "pyd", "json."])
def test_a_class_cannot_stand_anywhere(tmp_path: Path, class_key: str):
    path = write_tar(tmp_path / "x.tar", sample("k", 1))
    with pytest.raises(ConfigError, match=r"class_key: .*expected cls, txt, json\.FIELD"):
        open_source(str(path), class_key=class_key).__enter__()


def test_hostile_members_are_refused_by_name_and_run_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = ["k.pyd", "k.pkl", "../evil.png", "/evil.png"]
    path = write_tar(tmp_path / "x.tar", [*sample("k", 1), *((name, CANARY) for name in hostile)])
    with open_source(str(path)) as source:
        assert source.keys == ["k"]
        assert {problem.name for problem in source.problems if problem.action == "refused"} == {
            f"x.tar/{name}" for name in hostile
        }
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["x.tar"]
    assert not (tmp_path.parent / "evil.png").exists()


def test_several_images_need_a_choice(tmp_path: Path):
    members = [("k.cls", b"1"), ("k.rgb.png", png(1)), ("k.mask.png", png(2))]
    path = write_tar(tmp_path / "x.tar", [*members, *sample("good", 1)])
    with open_source(str(path)) as source:
        assert source.keys == ["good"]
        assert source.problems[0].name == "x.tar/k"
    with open_source(str(path), image_key="rgb.png") as source:
        assert source.keys == ["k"]
        assert source.read(0) == png(1)


def test_the_shards_of_webdatasets_own_writer_are_a_source(tmp_path: Path):
    with TarWriter(str(tmp_path / "x.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"a/{number}", "png": png(number), "cls": number})
    with open_source(str(tmp_path / "x.tar")) as source:
        assert source.names == ["0/a/0.image", "1/a/1.image", "2/a/2.image"]
        assert source.keys == ["a/0", "a/1", "a/2"]
        assert source.read(2) == png(2)


def test_missing_shards_of_a_pattern_are_named(tmp_path: Path):
    write_shards(tmp_path)
    with pytest.raises(DataError, match=r"2 of 4 files are missing: \['shard-002\.tar'"):
        open_source(str(tmp_path / "shard-{000..003}.tar")).__enter__()


def test_patterns_are_expanded_with_their_zeros():
    assert expand_pattern("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_pattern("{0..1}-{2..3}.tar") == ["0-2.tar", "0-3.tar", "1-2.tar", "1-3.tar"]
    assert expand_pattern("plain.tar") == ["plain.tar"]


@pytest.mark.parametrize(
    "pattern", ["{5..4}.tar", "{0..99999999999}.tar", "{0..9999}{0..9999}.tar"]
)
def test_impossible_patterns_are_errors(pattern: str):
    with pytest.raises(ConfigError, match="stands for"):
        expand_pattern(pattern)

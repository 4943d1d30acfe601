from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.source_files import png, write_files

from data_tools.class_file import read_classes
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.links import LEADS_OUT

FILES = [("a/1.png", png(1)), ("deep/down/2.png", png(2))]
TABLES = {
    "m.csv": "path,class\na/1.png,a\ndeep/down/2.png,b\n",
    "bom.csv": '\ufeffpath,class\r\n"a/1.png","a"\r\ndeep/down/2.png,b\r\n',
    "m.tsv": "class\tpath\na\ta/1.png\nb\tdeep/down/2.png\n",
    "m.jsonl": '{"path": "a/1.png", "class": "a"}\n\n{"path": "./deep/down/2.png", "label": "z", '
    '"class": "b"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_manifest_names_files_and_classes(tmp_path: Path, name: str):
    write_files(tmp_path, FILES)
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8")
    with open_source(str(tmp_path / name)) as source:
        # Where the path begins with the class, the listing is that of class folders.
        assert source.names == ["a/1.png", "b/deep/down/2.png"]
        assert [source.read(0), source.read(1)] == [png(1), png(2)]
        assert source.class_names() == ["a", "b"]
        assert source.keys is None


def test_a_manifest_may_lie_elsewhere_than_its_files(tmp_path: Path):
    write_files(tmp_path / "files", FILES)
    (tmp_path / "m.csv").write_text("file,label\na/1.png,3\n")
    with open_source(str(tmp_path / "m.csv"), root=str(tmp_path / "files")) as source:
        assert source.names == ["3/a/1.png"]
        assert source.class_names() == ["0", "1", "2", "3"]


def test_rows_lead_to_no_file_outside_and_to_no_pipe(tmp_path: Path):
    write_files(tmp_path / "files", FILES)
    (tmp_path / "secret.png").write_bytes(png(9))
    (tmp_path / "files" / "a" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "files" / "up").symlink_to(tmp_path)
    (tmp_path / "files" / "in.png").symlink_to("a/1.png")
    os.mkfifo(tmp_path / "files" / "pipe.png")
    rows = ["a/1.png", "a/out.png", "up/secret.png", "in.png", "pipe.png"]
    (tmp_path / "files" / "m.csv").write_text(
        "path,class\n" + "".join(f"{row},x\n" for row in rows)
    )
    with open_source(str(tmp_path / "files" / "m.csv")) as source:
        assert source.names == ["x/a/1.png", "x/in.png"]
        assert {problem.name: problem.reason for problem in source.problems} == {
            "a/out.png": LEADS_OUT,
            "up/secret.png": LEADS_OUT,
            "pipe.png": "not a file: a device, pipe or socket",
        }


def test_keys_are_kept(tmp_path: Path):
    write_files(tmp_path, FILES)
    (tmp_path / "m.csv").write_text("path,class,key\na/1.png,a,k1\ndeep/down/2.png,b,\n")
    with open_source(str(tmp_path / "m.csv")) as source:
        assert source.keys == ["k1"]
        assert source.problems[0].reason == "row 2: no key, as other rows have"
    with open_source(str(tmp_path / "m.csv"), keep_keys=False) as source:
        assert source.keys is None
        assert len(source) == 2


def test_repeated_keys_are_refused(tmp_path: Path):
    write_files(tmp_path, FILES)
    (tmp_path / "m.csv").write_text("path,class,key\na/1.png,a,k\ndeep/down/2.png,b,k\n")
    with pytest.raises(DataError, match="the key 'k' occurs twice"):
        open_source(str(tmp_path / "m.csv")).__enter__()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd.png",
        "../evil.png",
        "a/../../evil.png",
        "C:/evil.png",
        "s3://other/evil.png",
        "pipe:touch canary.png",
        "a\\\\evil.png",
    ],
)
def test_paths_outside_of_the_root_are_refused_by_name(tmp_path: Path, path: str):
    write_files(tmp_path / "root", FILES)
    (tmp_path / "evil.png").write_bytes(png())
    (tmp_path / "root" / "m.csv").write_text(f"path,class\n{path},a\na/1.png,a\n")
    with open_source(str(tmp_path / "root" / "m.csv")) as source:
        assert source.names == ["a/1.png"]
        assert [(problem.name, problem.action) for problem in source.problems] == [
            (path, "refused")
        ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("gone.png,a", "no such file"),
        ("a,a", "not named as an image"),
        ("a/1.png,", "'' is no class"),
        ("a/1.png,x/y", "not a class name"),
        ("a/1.png,..", "not a class name"),
        (",a", "no path"),
    ],
)
def test_unusable_rows_are_named(tmp_path: Path, row: str, reason: str):
    write_files(tmp_path, FILES)
    (tmp_path / "m.csv").write_text(f"path,class\n{row}\ndeep/down/2.png,b\n")
    with open_source(str(tmp_path / "m.csv")) as source:
        assert len(source) == 1
        assert reason in source.problems[0].reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"", "no rows"),
        ("m.csv", b"path,class\n", "no rows"),
        ("m.csv", b'path,class\n"a/1.png,a\n', "not readable as a table"),
        ("m.csv", b"path,class\n\xff\xfe,a\n", "not readable as a table"),
        ("m.csv", b"path,class\n" + b"x" * (2**20 + 1), "line 2 is longer"),
        ("m.jsonl", b'{"path": "a/1.png", "class": "a"}\n{', "line 2 is no JSON"),
        ("m.jsonl", b"[1]\n", "line 1 is no JSON object"),
    ],
)
def test_a_damaged_manifest_is_an_error(tmp_path: Path, name: str, content: bytes, message: str):
    write_files(tmp_path, FILES)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message), open_source(str(tmp_path / name)):
        pass


def test_columns_of_other_names_have_to_be_said(tmp_path: Path):
    write_files(tmp_path, FILES)
    (tmp_path / "m.csv").write_text("picture,species\na/1.png,fish\n")
    with pytest.raises(ConfigError, match=r"image_key: .*\['picture', 'species'\]"):
        open_source(str(tmp_path / "m.csv")).__enter__()
    options = {"image_key": "picture", "class_key": "species"}
    with open_source(str(tmp_path / "m.csv"), **options) as source:
        assert source.names == ["fish/a/1.png"]


@pytest.mark.parametrize("url", ["https://u:s3cr3t@h/a.jpg", "a.jpg?X-Amz-Signature=s3cr3t&b=.jpg"])
def test_rows_with_credentials_are_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    rows = f"path,class\na.jpg,n01\n{url},n01\nb.jpg,{url.replace('/', '|')}\n"
    (tmp_path / "m.csv").write_text(rows, encoding="utf-8")
    (tmp_path / "b.jpg").write_bytes(b"x")
    with open_source(str(tmp_path / "m.csv")) as source:
        assert source.names == ["n01/a.jpg"]
        assert len(source.problems) == 2
        assert "s3cr3t" not in repr(source.problems)
        assert "s3cr3t" not in repr(source.class_names())


def test_a_list_of_classes_holds_no_credentials(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("n01\thttps://u:s3cr3t@h/fish\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        read_classes(file)
    assert "s3cr3t" not in str(caught.value)

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.layouts import write_zip
from support.source_files import png, write_files, write_tar

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.class_files import read_classes
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
            "up": LEADS_OUT,
            "up/secret.png": LEADS_OUT,
            "m.csv": "1 images are in no row: deep/down/2.png",
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
        ("a/1.png,", "no label: ''"),
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


LISTS = {
    "caffe.txt": "a/1.png a\ndeep/down/2.png b\n",
    "stems.txt": "a/1 a\ndeep/down/2   b\n",
    "tabs.txt": "a/1.png\ta\t0\t0\t9\t9\ndeep/down/2.png\tb\t0\t0\t9\t9\n",
    "commas.txt": "1.png,a\n2.png,b\n",
    "bare.txt": "1.png a\n2 b\n\n",
    "no_header.csv": "a/1.png,a\ndeep/down/2.png,b\n",
    "class_first.tsv": "a\ta/1.png\nb\tdeep/down/2.png\n",
    "solution.csv": "ImageId,PredictionString\n1,a 1 2 3 4 b 1 2 3 4 \n2,b 1 2 3 4 \n",
    "in_order.txt": "a\nb\n\n",
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("container", ["folder", "x.tar", "x.tar.gz", "x.zip"])
def test_any_spelling_is_joined_to_images_in_any_container(
    tmp_path: Path, name: str, container: str
):
    root = tmp_path / container
    if container == "folder":
        write_files(root, FILES)
    elif container == "x.zip":
        write_zip(root, FILES)
    else:
        write_tar(root, FILES)
    (tmp_path / name).write_text(LISTS[name])
    with open_source(str(tmp_path / name), root=str(root)) as source:
        assert source.names == ["a/1.png", "b/deep/down/2.png"]
        assert [source.read(0), source.read(1)] == [png(1), png(2)]
        assert source.problems == []


def _problems(path: Path, **options: object) -> dict[str, str]:
    with open_source(str(path), **options) as source:
        assert len(source) == 1
        return {problem.name: problem.reason for problem in source.problems}


def test_images_that_no_row_names_are_counted_and_named(tmp_path: Path):
    write_files(tmp_path, [("x/1.png", png(1)), ("x/2.png", png(2)), ("x/3.png", png(3))])
    (tmp_path / "m.txt").write_text("x/2.png a\n")
    assert _problems(tmp_path / "m.txt") == {"m.txt": "2 images are in no row: x/1.png, x/3.png"}


def test_a_bare_name_of_several_images_is_named(tmp_path: Path):
    write_files(tmp_path, [("x/1.png", png(1)), ("y/1.png", png(2)), ("y/2.png", png(3))])
    (tmp_path / "m.txt").write_text("1.png a\n2.png b\n")
    problems = _problems(tmp_path / "m.txt")
    assert problems["1.png"] == "row 1: 2 images have this name (x/1.png, y/1.png)"


def test_an_image_that_two_rows_name_has_the_first_class(tmp_path: Path):
    write_files(tmp_path, [("1.png", png(1))])
    (tmp_path / "m.txt").write_text("1.png a\n1.png b\n")
    with open_source(str(tmp_path / "m.txt")) as source:
        assert source.names == ["a/1.png"]
        assert source.problems[0].reason == "row 2: named by row 1 already, which counts"


@pytest.mark.parametrize("text", ["a\n", "a\nb\nc\n"])
def test_a_class_per_line_needs_a_line_for_every_image(tmp_path: Path, text: str):
    write_files(tmp_path / "files", FILES)
    (tmp_path / "m.txt").write_text(text)
    with pytest.raises(DataError, match=r"[13] lines with a class each, but 2 images"):
        open_source(str(tmp_path / "m.txt"), root=str(tmp_path / "files")).__enter__()


@pytest.mark.parametrize(("text", "left"), [("\nb\n", 1), ("-1\nb\n", 1), ("a\n\nb\n", 1)])
def test_a_line_without_a_class_shifts_no_other(tmp_path: Path, text: str, left: int):
    names = ["1.png", "2.png"] if text.count("\n") == 2 else ["0.png", "1.png", "2.png"]
    write_files(tmp_path / "files", [(name, png(row)) for row, name in enumerate(names)])
    (tmp_path / "m.txt").write_text(text)
    with open_source(str(tmp_path / "m.txt"), root=str(tmp_path / "files")) as source:
        assert source.names[-1] == "b/2.png"
        assert len(source.problems) == left


def test_a_list_that_counts_its_rows_holds_no_classes(tmp_path: Path):
    # ILSVRC's ImageSets/CLS-LOC/val.txt
    rows = [(f"val_{row}.png", png(row)) for row in range(1, 12)]
    write_files(tmp_path, rows)
    (tmp_path / "val.txt").write_text("".join(f"val_{row} {row}\n" for row in range(1, 12)))
    with pytest.raises(DataError, match="numbers its 11 rows 1, 2, 3"):
        open_source(str(tmp_path / "val.txt")).__enter__()


def test_a_list_inside_of_an_archive_names_the_images_beside_it(tmp_path: Path):
    write_tar(
        tmp_path / "x.tar", [("v/1.png", png(1)), ("v/l.txt", b"1.png a\n"), ("w.png", png())]
    )
    assert _problems(tmp_path / "x.tar" / "v" / "l.txt") == {}
    with pytest.raises(DataError, match=r"expected a file 'v/gone\.txt'"):
        open_source(f"{tmp_path}/x.tar/v/gone.txt").__enter__()


def test_names_alone_are_images_without_classes(tmp_path: Path):
    write_files(tmp_path, FILES)
    (tmp_path / "m.txt").write_text("a/1.png\n")
    assert _problems(tmp_path / "m.txt", class_key="none") == {}
    with pytest.raises(ConfigError, match=r"class_key: .*columns \['path'\]"):
        open_source(str(tmp_path / "m.txt")).__enter__()


def test_a_root_is_a_folder_tar_or_zip(tmp_path: Path):
    (tmp_path / "m.csv").write_text("path,class\n1.png,a\n")
    with pytest.raises(DataError, match=r"root: .*gone: no such folder or archive"):
        open_source(str(tmp_path / "m.csv"), root=str(tmp_path / "gone")).__enter__()
    with pytest.raises(ConfigError, match=r"root: .*m\.csv: not a folder, tar or zip"):
        open_source(str(tmp_path / "m.csv"), root=str(tmp_path / "m.csv")).__enter__()


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
        read_classes(str(file))
    assert "s3cr3t" not in str(caught.value)

"""What users get wrong with data, and what they are told: the commands of one golden text.

    text = collect_errors(folder)   # runs all commands in an empty folder

Each heading is a kind of mistake; each command is run as a user types it, in the folder that
`write_sources` has filled.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from support.source_files import png, special_member, tar_bytes, write_files, write_tar

from data_tools.cli import main as run_data_tools
from fqgan_dist.cli import main as run_fqgan

TINY = Path(__file__).with_name("tiny.yaml")
SHARD = "fqgan-data shard {} out name=x split=train workers=1"
INDEX = "fqgan-data index {} name=x split=train workers=1"
RUN = 'fqgan run tiny.yaml execution=local storage.root=run "stages=[shards]" {}'

COMMANDS: dict[str, list[str]] = {
    "No such thing": [
        SHARD.format("nowhere"),
        SHARD.format("nowhere.tar"),
        SHARD.format("nowhere.csv"),
        SHARD.format("'nowhere-*.tar'"),
        SHARD.format("'wds/x-{0..3}.tar'"),
        SHARD.format("'no-*/x.tar'"),
        SHARD.format("list.csv") + " root=nowhere",
        SHARD.format("good") + " class_map=nowhere",
        SHARD.format("good") + " classes=nowhere",
        "fqgan-data stats nowhere",
        "fqgan-data verify nowhere",
        "fqgan-data extend good nowhere",
        INDEX.format("nowhere"),
        RUN.format("data.source=nowhere"),
        RUN.format("data.source=good data.validation_source=nowhere"),
        RUN.format("data.source=good data.classes=nowhere"),
    ],
    "Places that are none": [
        SHARD.format("s3://bucket//x"),
        SHARD.format("s3:/bucket/x"),
        SHARD.format("gs://bucket/x"),
        SHARD.format("https://example.org/x.tar"),
        SHARD.format("'s3://bucket/x?X-Amz-Signature=abcdef'"),
        "fqgan-data shard good s3:/bucket/x name=x split=train",
        RUN.format("data.source=s3:/bucket/x"),
        RUN.format("data.source=gs://bucket/x"),
        RUN.format("data.source=https://user:secret@example.org/x"),
        RUN.format("data.validation_source=s3://bucket//x data.source=good"),
        RUN.format("data.source=good data.cache.folder=s3://bucket/cache"),
    ],
    "Options": [
        "fqgan-data shard good",
        "fqgan-data shard good out",
        "fqgan-data shard good out more name=x split=train",
        SHARD.format("good") + " colour=red",
        SHARD.format("good") + " samples_per_shard=0",
        SHARD.format("good") + " format=lmdb",
        SHARD.format("good") + " workers=1",
        "fqgan-data shard good out name=x split=train workers=none",
        SHARD.format("good") + " image_key=x",
        SHARD.format("good") + " root=good",
        SHARD.format("good") + " keep_keys=false",
        SHARD.format("good") + " class_key=label",
        SHARD.format("good") + " class_key=none class_map=map.txt",
        SHARD.format("list.csv") + " id_key=path keep_keys=false",
        SHARD.format("good") + " short_side=320 crop=256",
        SHARD.format("builtin:photographs") + " subfolder=x",
        SHARD.format("good") + " image_size=64",
        "fqgan-data shard good out name=x split=val workers=1 short_side=16",
        INDEX.format("wds") + " class_key=json",
        RUN.format("data.source=good data.source_options.subfolder=a data.source_options.root=x"),
        RUN.format("data.source=good data.source_options.image_key=x"),
        RUN.format("data.source=good data.validation_options.class_key=none"),
        RUN.format("data.source=good data.source_options.colour=red"),
        RUN.format("data.source=good data.validation_fraction=2"),
        'fqgan shards tiny.yaml "stages=[shards]"',
    ],
    "What it is cannot be told": [
        SHARD.format("mixed"),
        SHARD.format("odd.bin"),
        SHARD.format("empty"),
        SHARD.format("x.rar"),
        SHARD.format("texts"),
        RUN.format("data.source=mixed"),
        RUN.format("data.source=empty"),
    ],
    "Splits": [
        "fqgan-data shard splits-of-files out name=x split=mine",
        SHARD.format("splits-and-more"),
        SHARD.format("splits-of-folders"),
        SHARD.format("splits-of-folders.tar"),
        "fqgan-data shard two-splits out name=x split=test",
        RUN.format("data.source=three-splits"),
        RUN.format("data.source=one-image"),
    ],
    "Images that lie elsewhere": [
        SHARD.format("deep"),
        SHARD.format("deep.tar"),
        SHARD.format("flat"),
        SHARD.format("flat.zip"),
        SHARD.format("images"),
        SHARD.format("good") + " files='c/*'",
        SHARD.format("good") + " subfolder=c",
        RUN.format("data.source=deep"),
        RUN.format("data.source=flat"),
    ],
    "Lists": [
        SHARD.format("no-columns.csv"),
        SHARD.format("list.csv") + " class_key=colour",
        SHARD.format("list.csv") + " image_key=file",
        SHARD.format("numbered.txt") + " root=good",
        SHARD.format("missing.csv"),
        SHARD.format("outside.csv"),
        SHARD.format("too-few.txt") + " root=flat",
        SHARD.format("labels-alone.txt") + " class_key=none",
        SHARD.format("broken.jsonl"),
        SHARD.format("list.csv") + " root=table.parquet",
        RUN.format("data.source=missing.csv"),
    ],
    "Classes": [
        SHARD.format("good") + " classes=one-class.txt",
        SHARD.format("good") + " classes=twice.txt",
        SHARD.format("good") + " classes=empty.txt",
        SHARD.format("good") + " class_map=map.txt",
        SHARD.format("unlabelled.parquet"),
        RUN.format("data.source=good data.validation_source=other-classes"),
        RUN.format("data.source=good data.validation_source=good data.classes=one-class.txt"),
        RUN.format("data.source=good data.validation_source=flat"),
    ],
    "Parquet": [
        SHARD.format("strings.parquet"),
        SHARD.format("paths.parquet"),
        SHARD.format("several.parquet"),
        SHARD.format("table.parquet") + " class_key=image",
        SHARD.format("table.parquet") + " class_key=colour",
        SHARD.format("table.parquet") + " id_key=colour",
        SHARD.format("cut.parquet"),
        SHARD.format("unlike"),
        RUN.format("data.source=several.parquet"),
    ],
    "Tars and zips": [
        SHARD.format("cut.tar"),
        SHARD.format("cut.tar.gz"),
        SHARD.format("concatenated.tar"),
        SHARD.format("links.tar"),
        SHARD.format("cut.zip"),
        SHARD.format("joined/'{a,b}.tar'"),
        RUN.format("data.source=concatenated.tar"),
    ],
    "WebDataset": [
        *(
            command
            for name in ("two-images", "unsorted", "dotted", "texts-only", "no-images", "no-label")
            for command in (SHARD.format(f"odd/{name}"), INDEX.format(f"odd/{name}"))
        ),
        SHARD.format("odd/backslash") + " format=webdataset",
        INDEX.format("odd/backslash"),
        SHARD.format("odd/repeated"),
        INDEX.format("odd/repeated"),
        INDEX.format("odd/mixed-labels"),
        INDEX.format("packed"),
        INDEX.format("wds") + " classes=one-class.txt",
        RUN.format("data.source=odd/two-images"),
        RUN.format("data.source=odd/texts-only"),
    ],
    "Datasets that are there": [
        "fqgan-data shard good set name=y split=train workers=1",
        "fqgan-data shard other-classes set name=x split=train workers=1",
        "fqgan-data extend other-classes set workers=1",
        "fqgan-data extend changed set workers=1",
        "fqgan-data reshard set small name=x short_side=8 workers=1 split=train",
        "fqgan-data split set parts parts='{train: 0.999, val: 0.001}' seed=1",
        "fqgan-data split set parts parts='{train: 2}' seed=1",
        "fqgan-data merge set set merged name=x split=train workers=1",
        "fqgan-data index set name=y split=train workers=1",
        SHARD.format("incomplete"),
        "fqgan-data stats damaged",
        "fqgan-data stats changed-index",
    ],
    "Too little for what follows": [
        "fqgan run tiny.yaml execution=local storage.root=run data.source=one-image "
        "data.validation_source=good",
        "fqgan run tiny.yaml execution=local storage.root=run data.source=good "
        "data.validation_source=one-image",
        "fqgan run tiny.yaml execution=local storage.root=run data.source=good "
        "data.validation_source=good autoregressive.model.num_classes=1",
        "fqgan run tiny.yaml execution=local storage.root=run data.source=good "
        "data.validation_source=flat data.validation_options.class_key=none",
    ],
}


def collect_errors(folder: Path) -> str:
    """Run all commands in a folder, and give what each says and its exit code."""
    write_sources(folder)
    parts: list[str] = []
    with contextlib.chdir(folder):
        for heading, commands in COMMANDS.items():
            parts.append(f"# {heading}\n")
            parts += [f"$ {command}\n{_run(command)}\n" for command in commands]
    return "\n".join(parts)


def _run(command: str) -> str:
    program, *arguments = shlex.split(command)
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = run_fqgan(arguments) if program == "fqgan" else run_data_tools(arguments)
        except SystemExit as leaving:  # argparse
            code = leaving.code
    lines = [line for line in errors.getvalue().splitlines() if not _is_log(line)]
    text = "\n".join(lines).replace(os.getcwd(), ".")
    return f"{text}\n[exit {code}]"


def _is_log(line: str) -> bool:
    return re.match(r"\d\d:\d\d:\d\d ", line) is not None


def write_sources(folder: Path) -> None:
    """Write what the commands name."""
    (folder / "tiny.yaml").write_text(TINY.read_text())
    good = [(f"{name}/{row}.png", png(row)) for row, name in enumerate("aabb")]
    write_files(folder / "good", good)
    write_files(folder / "changed", [("a/0.png", png(90) + b" "), ("a/1.png", png(1))])
    write_files(folder / "other-classes", [("c/7.png", png(7)), ("d/8.png", png(8))])
    write_files(folder / "one-image", [("a/9.png", png(9))])
    write_files(folder / "deep", [("data/CLS/train/n1/0.png", png())])
    write_tar(folder / "deep.tar", [("data/CLS/train/n1/0.png", png())])
    write_files(folder / "flat", [("0.png", png(0)), ("1.png", png(1))])
    _write_zip(folder / "flat.zip", [("0.png", png(0))])
    write_files(folder / "images", [("images/0.png", png())])
    write_files(folder / "texts", [("a/notes.txt", b"x"), ("b/notes.txt", b"x")])
    write_files(folder / "mixed", [*good, ("x.tar", b"")])
    (folder / "empty").mkdir()
    (folder / "odd.bin").write_bytes(b"x" * 600)
    (folder / "x.rar").write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(600))
    two = [("train/a/0.png", png(0)), ("val/a/1.png", png(1))]
    write_files(folder / "two-splits", two)
    write_files(folder / "three-splits", [*two, ("test/a/2.png", png(2))])
    flat_splits = [("train/0.png", png(0)), ("val/1.png", png(1))]
    write_files(folder / "splits-of-folders", flat_splits)
    write_tar(folder / "splits-of-folders.tar", flat_splits)
    _write_lists(folder)
    _write_tables(folder)
    _write_archives(folder)
    _write_shards(folder)
    _write_datasets(folder)


def _write_lists(folder: Path) -> None:
    texts = {
        "list.csv": "path,class\ngood/a/0.png,a\n",
        "no-columns.csv": "colour,shape\nred,round\n",
        "numbered.txt": "".join(f"a/{row % 2}.png {row}\n" for row in range(1, 30)),
        "missing.csv": "path,class\ngood/a/77.png,a\n",
        "outside.csv": "path,class\n../x.png,a\n/etc/x.png,a\n",
        "too-few.txt": "3\n",
        "labels-alone.txt": "3\n4\n",
        "broken.jsonl": '{"path": "good/a/0.png", "class": "a"}\n{"path": \n',
        "one-class.txt": "a\n",
        "twice.txt": "a\nb\na\n",
        "empty.txt": "",
        "map.txt": "a cat\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


def _write_tables(folder: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    tables = {
        "table": {"image": [png(0), png(1)], "label": [0, 1]},
        "strings": {"path": ["0.png"], "label": [0]},
        "paths": {"image": pa.array([{"bytes": None, "path": "0.png"}], kind), "label": [0]},
        "several": {"image": [png()], "kind": [0], "colour": [1]},
        "unlabelled": {"image": [png(0), png(1)], "label": [-1, -1]},
        "unlike/0": {"image": [png()], "label": [0]},
        "unlike/1": {"image": [png()], "class": [0]},
        "splits-of-files/train-0": {"image": [png(0)], "label": [0]},
        "splits-of-files/test-0": {"image": [png(1)], "label": [0]},
        "splits-and-more/train-0": {"image": [png(0)], "label": [0]},
        "splits-and-more/val-0": {"image": [png(1)], "label": [0]},
        "splits-and-more/more": {"image": [png(2)], "label": [0]},
    }
    for name, columns in tables.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path)
    data = (folder / "table.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(data[: len(data) // 2])


def _write_archives(folder: Path) -> None:
    whole = tar_bytes([("a/0.png", png(0)), ("b/1.png", png(1))])
    (folder / "cut.tar").write_bytes(whole[:1700])
    packed = tar_bytes([("a/0.png", png(0)), ("b/1.png", png(1))], mode="w:gz")
    (folder / "cut.tar.gz").write_bytes(packed[:-20])
    more = tar_bytes([("c/2.png", png(2))])
    (folder / "concatenated.tar").write_bytes(whole + more)
    write_tar(folder / "links.tar", [(special_member("a/0.png", b"2", "/etc/passwd"), b"")])
    _write_zip(folder / "whole.zip", [("a/0.png", png(0))])
    (folder / "cut.zip").write_bytes((folder / "whole.zip").read_bytes()[:-30])
    (folder / "joined").mkdir()
    for name in ("a", "b"):
        write_tar(folder / "joined" / f"{name}.tar", [("a/0.png", png(0))])


def _write_shards(folder: Path) -> None:
    keys = ["k0", "k1"]
    image, label = (lambda key: (f"{key}.png", png())), (lambda key: (f"{key}.cls", b"1"))
    odd = {
        "two-images": [
            member
            for key in keys
            for member in ((f"{key}.a.png", png()), (f"{key}.b.png", png()), label(key))
        ],
        "unsorted": [*map(image, keys), *map(label, keys)],
        "dotted": [member for key in keys for member in (image(f"{key}.5"), label(f"{key}.5"))],
        "texts-only": [member for key in keys for member in (image(key), (f"{key}.txt", b"a"))],
        "no-images": [member for key in keys for member in ((f"{key}.npy", b"x"), label(key))],
        "no-label": [member for key in keys for member in (image(key), (f"{key}.cls", b"-1"))],
        "backslash": [("d\\k.png", png()), ("d\\k.cls", b"1")],
        "repeated": [*(image("k"), label("k")), *(image("m"), label("m")), image("k"), label("k")],
        "mixed-labels": [image("k0"), ("k0.cls", b"1"), image("k1"), ("k1.cls", b"cat")],
    }
    for name, members in odd.items():
        write_files(folder / "odd" / name, [("x-0.tar", tar_bytes(members))])
    members = [member for key in keys for member in (image(key), label(key))]
    write_files(folder / "wds", [("x-0.tar", tar_bytes(members))])
    write_files(folder / "packed", [("x-0.tar.gz", tar_bytes(members, mode="w:gz"))])


def _write_datasets(folder: Path) -> None:
    with contextlib.chdir(folder), _silence():
        for name in ("set", "incomplete", "damaged", "changed-index"):
            command = ["shard", "good", name, "name=x", "split=train", "workers=1"]
            assert run_data_tools(command) == 0
    (folder / "incomplete" / "shard-000000.tar").unlink()
    (folder / "damaged" / "shard-000000.samples.parquet").write_bytes(b"PAR1")
    index = folder / "changed-index" / "index.json"
    index.write_text(index.read_text().replace('"count"', '"number"', 1))


def _write_zip(path: Path, files: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files:
            archive.writestr(name, data)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield

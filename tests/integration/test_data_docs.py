"""Every command of docs/data.md works as it stands there, on a real S3 server."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.radosgw import S3_BUCKET
from support.source_files import write_files, write_tar
from support.synthetic_shards import pack

from data_tools.cli import COMMANDS, main
from fqgan_dist.config import load_config
from fqgan_dist.data.index import load_index
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", DOCUMENT, re.DOTALL)


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (80, 80 + number, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write_sources(folder: Path) -> None:
    """Write what the document takes for given."""
    images = {f"{'ab'[number % 2]}/{number:02d}.jpg": jpeg(number) for number in range(14)}
    names = list(images)
    for part, chosen in (("imagenet/train", names[:10]), ("imagenet/val", names[10:12])):
        write_files(folder / part, [(name, images[name]) for name in chosen])
    write_files(folder / "more", [(name, images[name]) for name in names[10:]])
    write_tar(folder / "train.tar.gz", list(images.items()))
    with zipfile.ZipFile(folder / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    (folder / "classes.tsv").write_text("b\tsecond letter\na\tfirst letter\n")
    columns = {
        "image": [{"bytes": data, "path": name} for name, data in images.items()],
        "label": [name[0] for name in names],
    }
    pq.write_table(pa.table(columns), folder / "images.parquet")
    write_files(folder / "photos", list(images.items()))
    rows = [f"photos/{name},{name[0]}" for name in names]
    (folder / "photos.csv").write_text("\n".join(["path,class", *rows]) + "\n")
    members = []
    for number, (name, data) in enumerate(images.items()):
        label = json.dumps({"label": name[0]}).encode()
        members += [(f"{number:04d}.jpg", data), (f"{number:04d}.json", label)]
    write_files(
        folder / "wds", [("x-000000.tar", pack(members[:16])), ("x-1.tar", pack(members[16:]))]
    )


def commands() -> Iterator[str]:
    for language, text in BLOCKS:
        if language == "bash":
            yield from text.replace("\\\n", " ").strip().splitlines()


def run_command(line: str) -> None:
    program, *arguments = shlex.split(os.path.expandvars(line))
    if program == "fqgan":
        # Training is tested elsewhere; here, that its settings are what the document says.
        command, config, *overrides = arguments
        assert command == "run"
        loaded = load_config(ROOT / config, overrides, RunConfig)
        assert loaded.data.source.startswith("s3://")
        return
    assert program == "fqgan-data", f"do not know how to test {line!r}"
    assert main(arguments) == 0, line


@pytest.mark.usefixtures("s3_credentials")
def test_every_command_of_the_document_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bucket = f"{S3_BUCKET}/docs-{uuid.uuid4().hex}"
    monkeypatch.setenv("BUCKET", bucket)
    # Each process takes seconds to start, and the result does not depend on their number.
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    write_sources(tmp_path)
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "docs/data.md", "exec"), {"__name__": "document"})
            continue
        for line in text.replace("\\\n", " ").strip().splitlines():
            run_command(line)
    assert "nothing was done" in capsys.readouterr().out
    storage = Storage(f"s3://{bucket}")
    assert load_index(storage.child("val")).image_policy["kind"] == "original"
    assert load_index(storage.child("train")).num_samples == 14
    local = Storage(tmp_path)
    assert load_index(local.child("zip-dataset")).classes == ["b", "a"]
    assert load_index(local.child("no-classes")).num_samples == 14
    assert load_index(local.child("ones")).classes == ["a"]
    for name in ("tar-dataset", "parquet-dataset", "csv-dataset", "wds", "again"):
        assert load_index(local.child(name)).num_samples == 14, name


def test_every_command_is_in_the_document() -> None:
    used = {line.split()[1] for line in commands() if line.startswith("fqgan-data")}
    assert used == {command.name for command in COMMANDS}


def test_options_that_the_document_names_exist() -> None:
    known = {name for command in COMMANDS for name in command.options_type.model_fields}
    prose = re.sub(r"```.*?```", "", DOCUMENT, flags=re.DOTALL)
    named = set(re.findall(r"`([a-z_]+)=", prose))
    assert named - {"key"} <= known
    settings = set(re.findall(r"`data\.([a-z_]+)", prose))
    config = RunConfig.model_fields["data"].annotation
    assert config is not None
    assert settings <= set(config.model_fields)

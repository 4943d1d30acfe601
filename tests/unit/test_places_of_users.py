"""Whatever place a user names, in any setting or argument: one error, no folder, no secret."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.command import main as submit
from data_tools.cli import COMMANDS
from data_tools.cli import main as data_main
from fqgan_dist.cli import main as fqgan_main
from fqgan_dist.command_line import WRONG_USAGE
from fqgan_dist.config import Config, load_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.uri import parse_location

TINY = str(Path(__file__).resolve().parents[1] / "support" / "tiny.yaml")
SECRET = "s3cr3t-of-mine"
MISTYPED = [
    *("s3://bucket//x", "s3:/bucket", "s3:bucket", "S3://bucket/x", "gs://bucket/x", "file:/x"),
    *("file://host/x", "http://host/x", "$HOME/x", "~nobody-of-this-name/x", "s3://", "s3://b/x?a"),
]
WITH_SECRET = [
    f"https://user:{SECRET}@host/x",
    f"https://host/x?X-Amz-Signature={SECRET}",
    f"s3://bucket/x?token={SECRET}",
    f"s3:/user:{SECRET}@bucket/x",
]
PLACES = [
    *("storage.root", "data.source", "data.validation_source", "data.cache.folder"),
    *("evaluation.adm_reference", "upstream.shards"),
]
WEIGHTS = [
    *("tokenizer.perceptual.weights.source", "evaluation.inception.weights.source"),
    *("tokenizer.init_from.source", "autoregressive.init_from.source"),
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "something was written"


def find_members(annotation: Any) -> Iterator[Any]:
    yield annotation
    for member in typing.get_args(annotation):
        yield from find_members(member)


def find_texts(config_type: type[Config], where: str = "") -> Iterator[str]:
    """Find the settings that are texts of any kind, by their dotted names."""
    for name, field in config_type.model_fields.items():
        dotted = f"{where}{name}"
        for member in find_members(field.annotation):
            if isinstance(member, type) and issubclass(member, Config):
                yield from find_texts(member, f"{dotted}.")
            elif member is str:
                yield dotted


@pytest.mark.parametrize(("field", "place"), list(itertools.product(PLACES, MISTYPED)))
def test_no_setting_takes_a_mistyped_place(field: str, place: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load_config(TINY, [f"{field}={place}"], RunConfig)


@pytest.mark.parametrize(("field", "place"), list(itertools.product(WEIGHTS, MISTYPED[:-2])))
def test_no_weights_are_at_a_mistyped_place(field: str, place: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load_config(TINY, [f"{field}={place}.safetensors"], RunConfig)


def test_the_settings_that_are_places_are_known() -> None:
    texts = set(find_texts(RunConfig))
    assert {
        each for each in PLACES if each not in ("data.cache.folder", "upstream.shards")
    } <= texts


@pytest.mark.parametrize("place", WITH_SECRET)
@pytest.mark.parametrize("field", sorted({*find_texts(RunConfig), *PLACES, *WEIGHTS}))
def test_no_setting_holds_credentials(field: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [f"{field}={place}"], RunConfig)
    assert SECRET not in str(caught.value)


def run(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    shown = capsys.readouterr()
    return code, shown.out + shown.err


FQGAN = [
    *(["run"], ["shards"], ["teachers"], ["train"], ["codes"], ["sample"], ["evaluate"]),
    *(["report"], ["doctor"]),
]


@pytest.mark.parametrize("place", [*MISTYPED[:3], *WITH_SECRET])
@pytest.mark.parametrize("command", FQGAN, ids=lambda words: words[0])
def test_every_command_refuses_a_place(
    command: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        [*command, TINY, f"storage.root={place}"],
        [*command, TINY, f"{place}"],
        [*command, place],
    ):
        code, text = run(fqgan_main, arguments, capsys)
        assert code == WRONG_USAGE, text
        assert "Error: " in text
        assert "Traceback" not in text
        assert SECRET not in text


@pytest.mark.parametrize("place", [*MISTYPED[:3], *WITH_SECRET])
@pytest.mark.parametrize(
    "arguments",
    [
        *(["checkpoints", action, TINY, "tokenizer"] for action in ("list", "verify", "prune")),
        ["checkpoints", "export", TINY, "tokenizer", "storage.root=PLACE", "to=x.safetensors"],
        ["checkpoints", "export", TINY, "tokenizer", "to=PLACE"],
        ["weights", "fetch", TINY, "to=PLACE"],
        ["PLACE"],
        ["checkpoints", "PLACE"],
    ],
    ids=" ".join,
)
def test_commands_with_other_arguments_refuse_a_place(
    arguments: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [text.replace("PLACE", place) for text in arguments]
    if given == arguments:
        given.append(f"storage.root={place}")
    code, text = run(fqgan_main, given, capsys)
    assert code == WRONG_USAGE, text
    assert "Traceback" not in text
    assert SECRET not in text


@pytest.mark.parametrize("place", [*MISTYPED, *WITH_SECRET])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_data_command_refuses_a_place(
    command: Any, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {
        "shard": ["name=a", "split=train"],
        "split": ["parts={a: 0.5, b: 0.5}"],
        "merge": ["name=a"],
        "index": ["name=a", "split=train"],
    }
    for position in range(len(command.paths)):
        paths = ["/nonexistent/a"] * len(command.paths)
        paths[position] = place
        arguments = [command.name, *paths, *needed.get(command.name, [])]
        code, text = run(data_main, arguments, capsys)
        assert code == WRONG_USAGE, text
        assert text.startswith("ConfigError: ")
        assert text.count("\n") == 1
        assert SECRET not in text


@pytest.mark.parametrize("place", [*MISTYPED[:3], *WITH_SECRET])
@pytest.mark.parametrize("option", ["root", "classes"])
def test_places_in_options_of_data_commands_are_refused(
    option: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["shard", "/nonexistent", "/nonexistent2", "name=a", "split=a", f"{option}={place}"]
    code, text = run(data_main, arguments, capsys)
    assert code == WRONG_USAGE, text
    assert SECRET not in text


def test_a_job_is_given_no_credentials(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET}@proxy:3128")
    monkeypatch.setenv("MY_LINK", f"https://host/x?sig={SECRET}")
    command = ["--", "fqgan", "run", "x.yaml"]
    with caplog.at_level(logging.ERROR):
        for arguments in (
            ["run=a", "env=HTTPS_PROXY", *command],
            ["run=a", "env=MY_LINK", *command],
            ["run=a", f"address=http://user:{SECRET}@host:8265", *command],
            ["run=a", f"working_dir=https://host/x.zip?token={SECRET}", *command],
            ["run=a", *command, f"data.source=https://user:{SECRET}@host/x"],
        ):
            caplog.clear()
            assert submit(arguments) == WRONG_USAGE
            assert "holds credentials" in caplog.text
            assert SECRET not in caplog.text


def test_tilde_is_the_own_folder_in_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(
        TINY,
        [
            "storage.root=~/runs",
            "data.source=~/data",
            "data.cache.folder=~/cache",
            "upstream.shards=~/r",
        ],
        RunConfig,
    )
    assert config.storage.root == "/home/me/runs"
    assert config.data.source == "/home/me/data"
    assert config.data.cache is not None
    assert str(config.data.cache.folder) == "/home/me/cache"
    assert config.upstream == {"shards": "/home/me/r"}
    assert parse_location("s3://bucket/~/x") == "s3://bucket/~/x"


@pytest.mark.parametrize(
    "arguments",
    [
        ["fqgan_dist.cli", "run", TINY, "storage.root=s3:/bucket/x"],
        ["data_tools.cli", "stats", "s3://bucket//x"],
        ["fqgan_dist.training.run", TINY, "stage=tokenizer", f"data.source=https://u:{SECRET}@h"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.full("starts processes; the same is proven in this one")
def test_real_commands_end_with_one_error(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=False,
    )
    assert done.returncode == WRONG_USAGE, done.stderr
    assert "ConfigError: " in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr + done.stdout

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.uri import parse_location, parse_path

SECRET = "s3cr3t"
WITH_CREDENTIALS = [
    f"https://user:{SECRET}@host/x",
    f"https://{SECRET}@host/x",
    f"https://user:a/{SECRET}@host/x",
    f"https:/user:{SECRET}@host/x",
    f"https:user:{SECRET}@host/x",
    f"user:{SECRET}@host/x",
    f"//user:{SECRET}@host/x",
    f"s3://user:{SECRET}@bucket/x",
    f"S3://user:{SECRET}@bucket/x",
    f"s3:/user:{SECRET}@bucket/x",
    f"ftp://user:{SECRET}@host/x",
    *(
        f"{scheme}://bucket/x{mark}a=1&{name}={SECRET}"
        for scheme, mark, name in itertools.product(
            ("s3", "https"),
            ("?", "#"),
            (
                *("token", "access_token", "X-Amz-Signature", "X-Amz-Credential", "Signature"),
                *("X-Amz-Security-Token", "sig", "AWSAccessKeyId", "X-Goog-Signature", "api_key"),
                *("password", "pwd", "key", "%74oken", "secret", "auth"),
            ),
        )
    ),
]
MISTYPED = [
    *("s3://bucket//x", "s3:/bucket", "s3:bucket", "S3://bucket", "s3//bucket/x", "s3;//bucket"),
    *(" s3://bucket/x", "'s3://bucket/x'", "<s3://bucket>", "s3:\\\\bucket", "s3a://bucket/x"),
    *("s3://", "s3:///x", "s3://bucket/../x", "s3://bucket/x?versionId=1", "s3://bucket/x#y"),
    *("s3://a bucket/x", "s3://$BUCKET/x", "gs://bucket/x", "gs:/bucket", "file:/x", "file://h/x"),
    *("http://host/x", "https:/host/x", "hdfs://x/y", "pipe:touch canary", "arn:aws:s3:::bucket"),
    *("foo:/x", "C:\\data", "$HOME/x", "${HOME}/x", "a/$SCRATCH/x", "~nobody-of-this-name/x"),
    *("a\0b", "", "  "),
]


@pytest.mark.parametrize("text", WITH_CREDENTIALS)
def test_credentials_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="holds credentials") as caught:
        parse_location(text)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", MISTYPED)
def test_mistyped_uris_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|write"):
        parse_location(text)


@pytest.mark.parametrize("text", [*MISTYPED, *WITH_CREDENTIALS])
def test_no_folder_is_made_of_what_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Storage(text).write_bytes("x", b"")
    assert SECRET not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket", "s3://bucket/", "s3://bucket/a@b", "s3://bucket/x-{00..11}.tar"),
        *("s3://bucket/~/x", "/a/b", "a/b", "./s3:/x", "./~", "x:y", "run:1/a", "a//b", "s3/x"),
        *("x-[01].tar", "a?tokenizer=1", "price$", "über/äß"),
    ],
)
def test_paths_and_uris_stay_as_they_are(text: str) -> None:
    assert parse_location(text) == text


def test_what_is_there_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("foo:", "a:b@c", "$HOME"):
        (tmp_path / name / "x").mkdir(parents=True)
        assert parse_location(f"{name}/x") == f"{name}/x"
    # Made by a former version of this program, and still no place for a run.
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    with pytest.raises(ValueError, match="mistyped URI; expected 's3://bucket'"):
        parse_location("s3:/bucket")


def test_the_own_folder_is_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_location("~/runs") == "/home/me/runs"
    assert parse_path("~") == "/home/me"


def test_a_local_path_is_no_uri() -> None:
    with pytest.raises(ValueError, match="no local path"):
        parse_path("s3://bucket/x")

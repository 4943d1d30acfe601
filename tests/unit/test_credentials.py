from __future__ import annotations

import time
from pathlib import Path

import pytest

from fqgan_dist.credentials import is_secret_name, redact, scrub


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN", "MY_PASSWORD"]
)
def test_values_of_secret_variables_are_removed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0123456789abcdef")
    assert scrub("with 0123456789abcdef refused") == "with [removed] refused"


def test_a_secret_that_contains_another_is_removed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh12345678")
    assert scrub("<abcdefgh12345678>") == "<[removed]>"


def test_short_values_and_paths_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_TOKEN", "true")
    monkeypatch.setenv("SOME_TOKEN_PATH", "/run/secrets/token")
    assert scrub("true: /run/secrets/token is missing") == "true: /run/secrets/token is missing"


def test_the_aws_file_is_known(home: Path) -> None:
    (home / ".aws").mkdir()
    (home / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = wJalr%XUtnFEMI\n"
    )
    assert scrub("AKIAEXAMPLE signs with wJalr%XUtnFEMI") == "[removed] signs with [removed]"


def test_a_damaged_aws_file_is_no_obstacle(home: Path) -> None:
    (home / ".aws").mkdir()
    (home / ".aws" / "credentials").write_text("no section\n")
    assert scrub("text") == "text"


def test_rays_token_file_is_known(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("cafe0123cafe0123\n")
    assert scrub("token cafe0123cafe0123 is wrong") == "token [removed] is wrong"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:password@host:1/x", "http://[removed]host:1/x"),
        ("GET /x?X-Amz-Signature=abc&y=1", "GET /x?X-Amz-Signature=[removed]&y=1"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer [removed]"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        ("https://user:a/b@host", "https://[removed]host"),
        ("https:/user:word@host/x", "https:/[removed]host/x"),
        ("x?%74oken=abc&a=1", "x?%74oken=[removed]&a=1"),
        ("x?a=b;sig=abc", "x?a=b;sig=[removed]"),
        ("x?AWSAccessKeyId=AK#access_token=b", "x?AWSAccessKeyId=[removed]#access_token=[removed]"),
        ("git@host:x/y file.py:12: a@b", "git@host:x/y file.py:12: a@b"),
        ("tokenizer.model=a x?tokenizer=b", "tokenizer.model=a x?tokenizer=b"),
    ],
)
def test_credentials_in_urls_and_headers_are_removed(text: str, expected: str) -> None:
    assert scrub(text) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, True)
            for name in ("HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD", "AWS_ACCESS_KEY_ID")
        ),
        *((name, True) for name in ("X-Goog-Signature", "sig", "pwd", "key", "DB_PWD")),
        *((name, False) for name in ("PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "class_key")),
        *((name, False) for name in ("AWS_ENDPOINT_URL", "HTTPS_PROXY", "signal")),
    ],
)
def test_names_of_secrets(name: str, expected: bool) -> None:
    assert is_secret_name(name) == expected


@pytest.mark.parametrize(
    "text", ["://" * 1300, "a:" * 2000, "://" + ":" * 4000, "?a=" * 1300, ";a=b" * 1000]
)
def test_a_hostile_line_costs_little(text: str) -> None:
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 1

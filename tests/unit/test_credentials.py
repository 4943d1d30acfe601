from __future__ import annotations

from pathlib import Path

import pytest

from fqgan_dist.credentials import scrub


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
    ],
)
def test_credentials_in_urls_and_headers_are_removed(text: str, expected: str) -> None:
    assert scrub(text) == expected

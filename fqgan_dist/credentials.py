"""Credentials that must not be shown, and their removal from texts."""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator
from pathlib import Path

# In the names of variables and settings that hold credentials.
SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|API_KEY|CREDENTIAL|PRIVATE", re.IGNORECASE
)
_PATH_NAME = re.compile(r"_(PATH|FILE|URI|DIR)$", re.IGNORECASE)
# Shorter values ("true", "1") are no secrets, and removing them would garble texts.
_SHORTEST_SECRET = 8
_IN_TEXT = (
    re.compile(r"(?<=://)[^/\s@]+@"),  # user:password@host
    re.compile(r"(?<=X-Amz-Signature=)[^&\s]+", re.IGNORECASE),
    re.compile(r"(?<=X-Amz-Credential=)[^&\s]+", re.IGNORECASE),
    re.compile(r"(?<=X-Amz-Security-Token=)[^&\s]+", re.IGNORECASE),
    re.compile(r"(?<=Bearer )\S+"),
)
_REMOVED = "[removed]"


def scrub(text: str) -> str:
    """Remove this process's credentials from a text, and what looks like credentials in a URL.

    Known are the environment variables whose names say so, the AWS tools' credentials file and
    Ray's token file.
    """
    for secret in sorted(set(_find_secrets()), key=len, reverse=True):
        text = text.replace(secret, _REMOVED)
    for pattern in _IN_TEXT:
        text = pattern.sub(_REMOVED, text)
    return text


def _find_secrets() -> Iterator[str]:
    for value in (*_in_environment(), *_in_aws_file(), *_in_ray_token_file()):
        if len(value) >= _SHORTEST_SECRET:
            yield value


def _in_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and not _PATH_NAME.search(name):
            yield value


def _in_aws_file() -> Iterator[str]:
    home = Path.home() / ".aws" / "credentials"
    text = _read_text(Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home)))
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error:
        return  # the AWS tools cannot read it either
    for section in parser.sections():
        for name, value in parser.items(section):
            if SECRET_NAME.search(name):
                yield value


def _in_ray_token_file() -> Iterator[str]:
    home = Path.home() / ".ray" / "auth_token"
    yield _read_text(Path(os.environ.get("RAY_AUTH_TOKEN_PATH", home))).strip()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # no file, no credentials in it

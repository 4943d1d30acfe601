"""Credentials that must not be shown, and their removal from texts."""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

# In the names of variables, settings and parameters of URLs that hold credentials. `TOKENIZER` is
# no token, and PWD is a folder where `pwd` is a password.
_SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!IZ)|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|SIGNATURE|BEARER|COOKIE|JWT"
    r"|(ACCESS|API|ACCOUNT|STORAGE|SIGNING|ENCRYPTION|SSH)[_-]?KEY|CONNECTION[_-]?STRING"
    r"|_(PAT|PWD)$|^SIG$|(?-i:^(pwd|auth|authorization|key)$)",
    re.IGNORECASE,
)
_PATH_NAME = re.compile(r"_(PATH|FILE|URI|DIR)$", re.IGNORECASE)
# Shorter values ("true", "1") are no secrets, and removing them would garble texts.
_SHORTEST_SECRET = 8
_IN_TEXT = (
    # user:password@host; and where the password holds slashes that were not escaped (a port is
    # digits). No pattern goes back over what it has read: texts may be hostile.
    re.compile(r"(?<=://)[^/\s]*@"),
    re.compile(r"(?<=://)(?=[^/\s@:]*:(?!\d{1,5}(?:/|$)))[^\s@]*+@(?=[\w\[])"),
    # The same where the scheme was mistyped, `https:/user:password@host`.
    re.compile(r"(?:(?<=\w:)|(?<=\w:/))(?=[^/\s@:]+:)[^\s@]++@(?=\w)"),
    re.compile(r"(?<=Bearer )[^\s'\"]+"),
)
# `;` separates parameters for some servers, but may stand in a value for others.
_PARAMETER = re.compile(r"(?<=[?&;#])[\w.%+\[\]-]{1,200}+=")
_PARAMETER_VALUE = re.compile(r"[^&\s#'\"<>]*+")
_REMOVED = "[removed]"


def is_secret_name(name: str) -> bool:
    """Whether what is called so holds a credential: a variable, setting or parameter of a URL."""
    return _SECRET_NAME.search(name) is not None


def redact(text: str) -> str:
    """Remove what looks like a credential in a URL or header from a text."""
    for pattern in _IN_TEXT:
        text = pattern.sub(_REMOVED, text)
    return _redact_parameters(text)


def holds_credentials(text: str) -> bool:
    """Whether a text says who is asking; then it must not be repeated or kept."""
    return redact(text) != text


def _redact_parameters(text: str) -> str:
    kept: list[str] = []
    end = 0
    for found in _PARAMETER.finditer(text):
        # Servers read `%74oken` as `token`.
        if found.start() < end or not is_secret_name(unquote(found[0][:-1])):
            continue
        value = _PARAMETER_VALUE.match(text, found.end())
        if value and value[0]:
            kept += [text[end : found.end()], _REMOVED]
            end = value.end()
    return "".join([*kept, text[end:]])


def scrub(text: str) -> str:
    """Remove this process's credentials from a text, and what looks like credentials in a URL.

    Known are the environment variables whose names say so, the AWS tools' credentials file and
    Ray's token file.
    """
    for secret in sorted(set(_find_secrets()), key=len, reverse=True):
        text = text.replace(secret, _REMOVED)
    return redact(text)


def _find_secrets() -> Iterator[str]:
    for value in (*_in_environment(), *_in_aws_file(), *_in_ray_token_file()):
        if len(value) >= _SHORTEST_SECRET:
            yield value


def _in_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if is_secret_name(name) and not _PATH_NAME.search(name):
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
            if is_secret_name(name):
                yield value


def _in_ray_token_file() -> Iterator[str]:
    home = Path.home() / ".ray" / "auth_token"
    yield _read_text(Path(os.environ.get("RAY_AUTH_TOKEN_PATH", home))).strip()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # no file, no credentials in it

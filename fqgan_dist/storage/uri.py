"""Where something lies, as users write it: a path of this machine, or the URI of a store.

Settings and commands read it here, before anything is opened or written. A credential is refused,
and not repeated; so is what looks like a mistyped URI, which would else become a folder `./s3:`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from fqgan_dist.credentials import holds_credentials, redact
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.names import STORES, check_bucket_root, find_scheme
from fqgan_dist.terminal import printable

# As the schemes are written, and as other tools of the same stores call them.
_OF_STORES = dict(zip(STORES, STORES, strict=True)) | {"s3a": "s3", "s3n": "s3"}
# Of stores and protocols of others. One letter before a colon is a drive.
_FOREIGN_SCHEMES = frozenset(
    ("abfs", "arn", "az", "file", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https", "pipe")
)
_AROUND = " \t\r\n'\"<>"
"""What is sometimes copied along with a URI."""
_SLASHES = ("/", "\\")
_START = re.compile(r"[\s'\"<]*([A-Za-z][A-Za-z0-9+.-]*)\s*([:;])")
_NO_COLON = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(//)")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_LOGIN = re.compile(r"/{0,2}[^/@:]+:[^/@]*@[^/@]")  # user:password@host, without a scheme
_VARIABLE = re.compile(r"\$(?:\{\w+\}|[A-Z][A-Z0-9_]+)")
_SHOWN_CHARACTERS = 200


def parse_location(text: str) -> str:
    """Return a path or URI in the form that all else understands: `~` is the user's folder.

    Raises:
        ValueError: it holds credentials, is a mistyped URI or one of no known store, names no
            bucket, or holds a variable that nobody has replaced.
    """
    check_no_credentials(text)
    if "\0" in text:
        raise ValueError(f"{_show(text)} holds a null byte; expected a path or {_forms()}")
    if not text.strip():
        raise ValueError(f"{text!r} names nothing; expected a path or {_forms()}")
    scheme = find_scheme(text)
    if scheme in STORES:
        _check_replaced(text)
        try:
            check_bucket_root(text)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("storage root ")) from error
        return text
    check_no_mistyped_uri(text)
    if not os.path.lexists(text):
        _check_replaced(text)
    return _expand_home(text)


def parse_path(text: str) -> str:
    """Return a path of this machine as `parse_location` does.

    Raises:
        ValueError: as there, or it is a URI.
    """
    path = parse_location(text)
    if find_scheme(path) is not None:
        raise ValueError(f"{_show(text)} is no local path; expected a path on a local disk")
    return path


def check_no_credentials(text: str) -> None:
    """Refuse a text that says who is asking.

    Raises:
        ValueError: it does; the message has what is left without the credential.
    """
    # Blanks would end a URL in a text, but this is all one.
    joined = "".join(text.split())
    is_login = _LOGIN.match(joined) is not None and not os.path.lexists(text)
    if holds_credentials(joined) or is_login:
        shown = "" if is_login else f" ({_show(redact(joined))})"
        raise ValueError(
            f"holds credentials{shown}; expected a path or URI without user, password, token or "
            f"signature, but with {'; '.join(STORES.values())}"
        )


def check_no_mistyped_uri(text: str) -> None:
    """Refuse a path that somebody meant as a URI; what begins with `/` or `./` is a path.

    Raises:
        ValueError: it looks like a URI, and there is no such file or folder.
    """
    if (scheme := find_scheme(text)) is not None:
        is_known = scheme.strip(_AROUND).lower() in _OF_STORES
        describe = _describe_mistyped if is_known else _describe_unknown
        raise ValueError(describe(text, scheme))
    if _DRIVE.match(text):
        raise ValueError(f"{_show(text)} is a path of another system; expected {_forms()} or /path")
    start = _START.match(text) or _NO_COLON.match(text)
    if start is None:
        return
    scheme, mark = start[1].lower(), start[2]
    if scheme in _OF_STORES:
        raise ValueError(_describe_mistyped(text, start[1]))
    # Else `x:y` may well be the name of a folder.
    is_foreign = scheme in _FOREIGN_SCHEMES and mark == ":"
    is_uri = mark == ":" and text[start.end() :].startswith(_SLASHES) and len(scheme) > 1
    if is_foreign or (is_uri and not os.path.lexists(text)):
        raise ValueError(_describe_unknown(text, start[1]))


def _describe_mistyped(text: str, scheme: str) -> str:
    rest = text.strip(_AROUND)[len(scheme.strip(_AROUND)) :].lstrip(" :;/\\")
    store = _OF_STORES[scheme.strip(_AROUND).lower()]
    meant = f"{store}://{rest or 'bucket/prefix'}"
    return (
        f"{_show(text)} looks like a mistyped URI; expected {_show(meant)}, or './' before it if "
        "it is a path of this machine"
    )


def _describe_unknown(text: str, scheme: str) -> str:
    if scheme.lower() == "file":
        return f"{_show(text)}: unknown scheme; expected the path alone, such as /path"
    return (
        f"{_show(text)}: unknown scheme, and nothing is run or fetched; "
        f"expected a path or {_forms()}: copy it there first (a path of this machine with a colon "
        "is written with './' before it)"
    )


def _check_replaced(text: str) -> None:
    found = _VARIABLE.search(text)
    if found is not None:
        raise ValueError(
            f"{_show(text)} holds {found[0]}, which nobody has replaced: settings know no "
            "variables; write its value, or '~' for the own folder"
        )


def _expand_home(text: str) -> str:
    if not text.startswith("~"):
        return text
    path = os.path.expanduser(text)
    if path.startswith("~"):
        name = text.partition("/")[0]
        raise ValueError(
            f"{_show(text)}: the folder of {printable(name)!r} is not known on this machine; write "
            "it out (a file whose name begins with '~' is written with './' before it)"
        )
    return path


def _forms() -> str:
    return " or ".join(f"{scheme}://bucket/prefix" for scheme in sorted(STORES))


def _show(text: str) -> str:
    cut = text[:_SHOWN_CHARACTERS]
    return f"'{printable(redact(cut))}{'...' if len(text) > len(cut) else ''}'"


def read_location(text: str, *, what: str) -> str:
    """Parse a location of the command line; `what` it is begins the message.

    Raises:
        ConfigError: see `parse_location`.
    """
    try:
        return parse_location(text)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error


def _parse_local(value: object) -> object:
    # Before pydantic makes a Path of it, which takes `s3://x` for `s3:/x`.
    return parse_path(str(value)) if isinstance(value, str | Path) else value


Location = Annotated[str, AfterValidator(parse_location)]
"""A setting that names a file, a folder or a prefix, on this machine or in a store."""
LocalPath = Annotated[Path, BeforeValidator(_parse_local)]
"""A setting that names a file or folder of this machine."""

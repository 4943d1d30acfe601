"""Names of storage roots and objects, checked before anything is opened.

What can be seen of a URI is asked here, and which schemes there are in `storage.BACKENDS`: no other
module looks for one. This one imports no store, so that settings can ask it too.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from fqgan_dist.errors import ConfigError


def find_scheme(uri: str) -> str | None:
    """Return what stands before `://`; None for a path of this machine."""
    scheme, mark, _ = uri.partition("://")
    return scheme if mark else None


def is_remote(uri: str) -> bool:
    """Whether a root, file or source is named by a URI of any scheme, not by a path."""
    return find_scheme(uri) is not None


def holds_credentials(uri: str) -> bool:
    """Whether a URI says who is asking; then it must not be repeated in a message."""
    return "@" in urlsplit(uri).netloc


def split_bucket(uri: str) -> tuple[str, str]:
    """Split `scheme://bucket/key` into bucket and key; either may be empty."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def check_relative_path(path: str) -> str:
    """Return a path from an index, manifest or caller if it stays below its root.

    Raises:
        ValueError: it is absolute, or has an empty, `.` or `..` part, a backslash or a null byte.
    """
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path or "\0" in path:
        raise ValueError(
            f"path {path!r}: expected a relative path below the storage root, such as 'a/b.json'"
        )
    return path


def check_bucket_root(uri: str, *, credentials_advice: str) -> str:
    """Return a URI in its one form, `scheme://bucket/prefix` without a slash at its end.

    Raises:
        ConfigError: it names no bucket, or holds credentials (given by `credentials_advice`
            instead), a port, or what is no prefix.
    """
    form = f"{find_scheme(uri)}://bucket/prefix"
    bucket, key = split_bucket(uri)
    if "@" in bucket or ":" in bucket:
        # The value is not repeated: it may be a secret.
        raise ConfigError(
            f"storage root {find_scheme(uri)}://...: credentials or a port in the URI; expected "
            f"{form}, with {credentials_advice}"
        )
    if not bucket:
        raise ConfigError(f"storage root {uri!r}: names no bucket; expected {form}")
    if "?" in uri or "#" in uri:
        raise ConfigError(f"storage root {uri!r}: '?' and '#' are not allowed in {form}")
    if prefix := key.rstrip("/"):
        try:
            check_relative_path(prefix)
        except ValueError as error:
            raise ConfigError(
                f"storage root {uri!r}: the prefix has an empty, '.' or '..' part, or a backslash; "
                f"expected {form}"
            ) from error
    return uri.rstrip("/")

"""Names of storage roots and objects, checked before anything is opened.

What can be seen of a URI is asked here: no module outside this package looks for a scheme. This one
imports no store, so that settings can ask it too.
"""

from __future__ import annotations

import re

from fqgan_dist.errors import ConfigError, DataError

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")

STORES = {
    "s3": "credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws, or an instance "
    "role) and the server in AWS_ENDPOINT_URL",
}
"""By the scheme of its URIs what stands in no URI of a store, and where it is given instead; the
stores themselves are in `storage.BACKENDS`."""


class UnsafePathError(DataError, ValueError):
    """A path that no object may have.

    A wrong argument of a caller's, but names come from folders and files of others too: whoever
    reads them need not look at each, for this is an error of ours.
    """


def find_scheme(uri: str) -> str | None:
    """Return what stands before `://`; None for a path of this machine."""
    scheme, mark, _ = uri.partition("://")
    return scheme if mark else None


def is_remote(uri: str) -> bool:
    """Whether a root, file or source is named by a URI of any scheme, not by a path."""
    return find_scheme(uri) is not None


def split_bucket(uri: str) -> tuple[str, str]:
    """Split `scheme://bucket/key` into bucket and key; either may be empty."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def check_relative_path(path: str) -> str:
    """Return a path from an index, manifest or caller if it stays below its root.

    Raises:
        UnsafePathError: it is absolute, or has an empty, `.` or `..` part, a backslash or a null
            byte.
    """
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path or "\0" in path:
        raise UnsafePathError(
            f"path {path!r}: expected a relative path below the storage root, such as 'a/b.json', "
            "without '..' or a backslash: rename what has this name"
        )
    return path


def check_bucket_root(uri: str) -> str:
    """Return a URI in its one form, `scheme://bucket/prefix` without a slash at its end.

    Raises:
        ConfigError: it names no bucket, or holds credentials, a port, or what is no prefix.
    """
    form = f"{find_scheme(uri)}://bucket/prefix"
    bucket, key = split_bucket(uri)
    if "@" in bucket or ":" in bucket:
        # The value is not repeated: it may be a secret.
        raise ConfigError(
            f"storage root {find_scheme(uri)}://...: credentials or a port in the URI; expected "
            f"{form}, with {STORES[find_scheme(uri) or '']}"
        )
    if not bucket:
        raise ConfigError(f"storage root {uri!r}: names no bucket; expected {form}")
    if _BUCKET.fullmatch(bucket) is None:
        raise ConfigError(
            f"storage root {uri!r}: {bucket!r} is no name of a bucket (letters, digits, '.', '-', "
            f"'_'); expected {form}"
        )
    if "?" in uri or "#" in uri:
        raise ConfigError(f"storage root {uri!r}: '?' and '#' are not allowed; expected {form}")
    if prefix := key.removesuffix("/"):
        try:
            check_relative_path(prefix)
        except ValueError as error:
            raise ConfigError(
                f"storage root {uri!r}: the prefix has an empty, '.' or '..' part, or a backslash; "
                f"expected {form}"
            ) from error
    return uri.rstrip("/")

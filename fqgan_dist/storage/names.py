"""Names of storage roots and objects, checked before anything is opened."""

from __future__ import annotations

import os

from fqgan_dist.errors import ConfigError


def check_root(root: str) -> str:
    """Return a root in its one form: an absolute path, or `s3://bucket/prefix`.

    Raises:
        ConfigError: another scheme, an S3 URI without a bucket, or one with credentials.
    """
    if root.startswith("s3://"):
        return _check_bucket_root(root)
    if "://" in root:
        scheme = root.partition("://")[0]
        raise ConfigError(
            f"storage root {scheme}://...: unknown scheme; expected a path or s3://bucket/prefix"
        )
    return os.path.abspath(root)


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


def _check_bucket_root(uri: str) -> str:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    if "@" in bucket or ":" in bucket:
        # The value is not repeated: it may be a secret.
        raise ConfigError(
            "storage root s3://...: credentials or a port in the URI; expected s3://bucket/prefix, "
            "with credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws, or an "
            "instance role) and the server in AWS_ENDPOINT_URL"
        )
    if not bucket:
        raise ConfigError(f"storage root {uri!r}: names no bucket; expected s3://bucket/prefix")
    root = uri.rstrip("/")
    prefix = root.removeprefix(f"s3://{bucket}").removeprefix("/")
    if "?" in uri or "#" in uri:
        raise ConfigError(
            f"storage root {uri!r}: '?' and '#' are not allowed in s3://bucket/prefix"
        )
    if prefix:
        check_relative_path(prefix)
    return root

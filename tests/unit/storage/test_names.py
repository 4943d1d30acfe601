from __future__ import annotations

import pytest

from fqgan_dist.storage.names import find_scheme, is_remote, split_bucket


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [
        ("s3://bucket/x", "s3"),
        ("http://host", "http"),
        ("/a/b", None),
        ("a:b/c", None),
        ("s3:/bucket", None),
        ("builtin:photographs", None),
        ("", None),
    ],
)
def test_what_has_a_scheme_is_remote(uri: str, scheme: str | None) -> None:
    assert find_scheme(uri) == scheme
    assert is_remote(uri) == (scheme is not None)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("s3://bucket/a/b", ("bucket", "a/b")),
        ("s3://", ("", "")),
    ],
)
def test_a_bucket_is_split_from_its_key(uri: str, parts: tuple[str, str]) -> None:
    assert split_bucket(uri) == parts

"""What the S3 storage says when the server refuses, and what it must not say."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from support.small_s3 import ErrorAnswer, SmallS3, run_small_s3, set_credentials

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.storage.endpoint import find_endpoint
from fqgan_dist.storage.storage import Storage

CALLS: dict[str, Callable[[Storage], object]] = {
    "size": lambda storage: storage.size("x"),
    "read": lambda storage: storage.read_bytes("x"),
    "read_ranges": lambda storage: storage.read_ranges([("x", 0, 1), ("x", 1, 1)]),
    "open_read": lambda storage: storage.open_read("x"),
    "write": lambda storage: storage.write_bytes("x", b"1"),
    "create": lambda storage: storage.create_bytes("x", b"1"),
    "list": lambda storage: storage.list(),
    "walk": lambda storage: list(storage.walk()),
    "delete": lambda storage: storage.delete("x"),
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallS3]:
    with run_small_s3() as server:
        set_credentials(monkeypatch, server.endpoint)
        yield server


@pytest.fixture
def storage() -> Storage:
    return Storage("s3://bucket/run")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ErrorAnswer(404, "NoSuchBucket"), "the bucket does not exist; create it"),
        (ErrorAnswer(403, "AccessDenied"), "access is refused.*lack the right.*grant s3:GetObject"),
        (ErrorAnswer(403, "InvalidAccessKeyId"), "access is refused.*correct AWS_ACCESS_KEY_ID"),
        (ErrorAnswer(403, "SignatureDoesNotMatch"), "secret does not fit.*AWS_SECRET_ACCESS_KEY"),
        (ErrorAnswer(400, "ExpiredToken"), "access is refused.*expired.*AWS_SESSION_TOKEN"),
        (
            ErrorAnswer(400, "InvalidToken", headers={"x-amz-bucket-region": "eu-west-1"}),
            "access is refused.*token is not valid",
        ),
        (ErrorAnswer(403, "SomethingNew"), "access is refused .SomethingNew"),
        (
            ErrorAnswer(400, "AuthorizationHeaderMalformed", elements="<Region>eu-west-1</Region>"),
            "not in the region that was asked.*'eu-west-1'; set AWS_DEFAULT_REGION",
        ),
        (
            ErrorAnswer(301, "PermanentRedirect", headers={"x-amz-bucket-region": "ap-south-1"}),
            "not in the region that was asked.*'ap-south-1'; set AWS_DEFAULT_REGION",
        ),
        (
            ErrorAnswer(400, "IllegalLocationConstraintException"),
            "not in the region that was asked.*another one; set AWS_DEFAULT_REGION",
        ),
        (ErrorAnswer(403, "QuotaExceeded"), "quota is used up.*free space"),
        (ErrorAnswer(400, "Strange"), r"cannot be read or written \(400 Strange\); check the name"),
    ],
    ids=lambda value: value.code if isinstance(value, ErrorAnswer) else "",
)
def test_every_call_says_what_to_change(
    server: SmallS3, storage: Storage, answer: ErrorAnswer, message: str
) -> None:
    server.error = answer
    for name, call in CALLS.items():
        with pytest.raises(DataError, match=message) as caught:
            call(storage)
        assert "s3://bucket/run" in str(caught.value), name
        assert "some-secret" not in str(caught.value)
        assert "some-key" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(("hours", "direction"), [(-2, "ahead of"), (2, "behind")])
def test_a_wrong_clock_is_measured(
    server: SmallS3, storage: Storage, hours: int, direction: str
) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=hours), usegmt=True)
    server.error = ErrorAnswer(403, "RequestTimeTooSkewed", headers={"Date": date})
    message = rf"clock is (7199|720\d) s {direction} the server's\); expected less than 15 minutes"
    with pytest.raises(DataError, match=message):
        storage.read_bytes("x")


def test_absent_credentials_are_said(
    server: SmallS3, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    for call in CALLS.values():
        with pytest.raises(DataError, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
            call(storage)


def test_the_endpoint_of_s3_goes_before_that_of_all_services(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_credentials(monkeypatch, "http://elsewhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "ftp://host")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL_S3: is no plain address"):
        storage.read_bytes("x")
    assert find_endpoint() == ("AWS_ENDPOINT_URL_S3", "ftp://host")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")  # as if it were not set
    assert find_endpoint() == ("AWS_ENDPOINT_URL", "http://elsewhere")


@pytest.mark.parametrize(
    "endpoint", ["http://user:password@127.0.0.1:9", "127.0.0.1:9000", "ftp://host", "http://"]
)
def test_an_endpoint_that_is_none_is_refused_unseen(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    set_credentials(monkeypatch, endpoint)
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL: is no plain address") as caught:
        storage.read_bytes("x")
    assert "password" not in str(caught.value)
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):  # and nothing is left to await
        storage.read_ranges([("x", 0, 1), ("y", 0, 1)])


def test_a_listing_out_of_order_is_refused(server: SmallS3, storage: Storage) -> None:
    server.lists_in_order = False
    server.objects = {"/bucket/run/b": b"", "/bucket/run/a": b""}
    with pytest.raises(DataError, match="lists 'a' out of order"):
        list(storage.walk())


def test_a_full_disk_is_told_apart(server: SmallS3, storage: Storage, tmp_path: Path) -> None:
    server.objects["/bucket/run/x"] = b"0123"
    server.claimed_size = 2**50
    with pytest.raises(OSError, match="No space left") as caught:
        storage.download("x", tmp_path / "copy")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_store_without_conditional_puts_replaces_what_was_unchanged(
    server: SmallS3, storage: Storage
) -> None:
    server.knows_conditions = False
    storage.write_bytes("index", b"first")
    with pytest.raises(FileExistsError):
        storage.replace_bytes("index", b"second", former=b"other")
    storage.replace_bytes("index", b"second", former=b"first")
    assert storage.read_bytes("index") == b"second"

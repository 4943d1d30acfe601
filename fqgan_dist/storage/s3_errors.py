"""What an answer of an S3 server means: whether to ask again, and what to tell the user.

Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; Ceph's gateway and
others send a subset. A message never repeats what a server or client library said in free text
where that could hold a credential (signed URLs, the endpoint's address).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from fqgan_dist.errors import DataError, StorageOutageError
from fqgan_dist.storage.endpoint import endpoint_variable

Kind = Literal["answer", "broken", "unreachable", "credentials", "other"]

_PASSING_STATUSES = (429, 500, 502, 503, 504)
_PASSING_CODES = {
    "BadDigest",  # the body was spoiled on its way
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",  # another create-only put of this name is under way
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",  # a 400: the server waited too long for the body
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_RIGHTS = "grant s3:GetObject, PutObject, ListBucket and DeleteObject on the bucket and its objects"
_REFUSALS = {
    "InvalidAccessKeyId": ("the server does not know the access key", "correct AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": (
        "the secret does not fit the access key",
        "correct AWS_SECRET_ACCESS_KEY",
    ),
    "ExpiredToken": ("the credentials have expired", "renew them (AWS_SESSION_TOKEN)"),
    "InvalidToken": ("the session token is not valid", "renew it (AWS_SESSION_TOKEN)"),
    "TokenRefreshRequired": ("the credentials have expired", "renew them (AWS_SESSION_TOKEN)"),
    "AccessDenied": ("these credentials lack the right", _RIGHTS),
    "AllAccessDisabled": ("the bucket is disabled", "ask the owner of the bucket"),
    "InvalidObjectState": ("the object is archived", "restore it from its storage class first"),
    "403": ("these credentials lack the right", _RIGHTS),
}
_FAULTS = {
    "QuotaExceeded": ("the bucket's quota is used up", "free space in it, or raise the quota"),
    "EntityTooLarge": ("the object is too large for one request", "write smaller objects"),
    "KeyTooLongError": ("the name is too long for the store", "shorten it"),
    "InvalidBucketName": ("no such bucket name is possible", "correct the bucket's name"),
}
_OTHER_REGION = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "Redirect",
    "301",
    "307",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
}


@dataclass(eq=False)
class RequestError(Exception):
    """One try of a request failed."""

    kind: Kind
    """An error that the server answered; an answer that did not arrive whole; no connection; no
    usable credentials; anything else."""
    code: str = ""
    """The server's code, or in words what went wrong."""
    status: int = 0
    """HTTP status of an answer."""
    region: str = ""
    """The bucket's region, where the server tells it."""
    server_time: str = ""
    """The `Date` header of an answer."""
    tries: int = 1
    """How often the request was tried, since it last achieved something."""
    waited_s: float = 0.0
    """Seconds that this took."""

    @classmethod
    def of_answer(cls, response: Mapping[str, Any]) -> RequestError:
        """Read what a client library made of an error answer."""
        error = response.get("Error", {})
        metadata = response.get("ResponseMetadata", {})
        headers = metadata.get("HTTPHeaders", {})
        return cls(
            "answer",
            code=str(error.get("Code", "")),
            status=int(metadata.get("HTTPStatusCode", 0)),
            region=str(error.get("Region") or headers.get("x-amz-bucket-region", "")),
            server_time=str(headers.get("date", "")),
        )

    @property
    def is_passing(self) -> bool:
        """Whether to try again: the server is out of reach, disturbed, or asks for patience."""
        if self.kind == "answer":
            return self.code in _PASSING_CODES or self.status in _PASSING_STATUSES
        return self.kind in ("broken", "unreachable")

    @property
    def is_missing(self) -> bool:
        """Whether there is no such object (a missing bucket is something else)."""
        return self.code in ("NoSuchKey", "404") or (
            self.status == 404 and self.code not in ("NoSuchBucket", "NoSuchUpload")
        )

    @property
    def is_beyond_end(self) -> bool:
        """Whether a range begins at or after the end of the object."""
        return self.code == "InvalidRange" or self.status == 416

    @property
    def is_precondition(self) -> bool:
        """Whether the object is there (create-only) or is another one (reads)."""
        return self.code == "PreconditionFailed" or self.status == 412

    @property
    def is_other_region(self) -> bool:
        """Whether the bucket is elsewhere; AWS names its region in answers to other errors too."""
        is_known = self.code in _FAULTS or self.code in _REFUSALS or self.is_passing
        is_told = bool(self.region) and self.status in (301, 307, 400)
        return self.code in _OTHER_REGION or (is_told and not is_known)

    def __str__(self) -> str:
        return f"{self.status} {self.code}" if self.status else self.code


def explain(uri: str, error: RequestError) -> Exception:
    """Make the error that a caller gets: what failed, what was expected, what to change."""
    if error.is_missing:
        return FileNotFoundError(errno.ENOENT, "no such object", uri)
    if error.code == "NoSuchBucket":
        return DataError(f"{uri}: the bucket does not exist; create it or correct it")
    if error.kind == "credentials":
        return DataError(
            f"{uri}: access is refused ({error.code}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give ~/.aws files or an instance role"
        )
    if error.code == "RequestTimeTooSkewed":
        return DataError(
            f"{uri}: access is refused (RequestTimeTooSkewed: {_describe_skew(error)}); expected "
            "less than 15 minutes; set this machine's clock (NTP)"
        )
    if error.is_other_region:
        region = repr(error.region) if error.region else "another one"
        return DataError(
            f"{uri}: the bucket is not in the region that was asked ({error}); the server says it "
            f"is {region}; set AWS_DEFAULT_REGION to the bucket's region "
            f"(and {endpoint_variable()}, if set, to that region's endpoint)"
        )
    if error.code in _FAULTS:
        reason, change = _FAULTS[error.code]
        return DataError(f"{uri}: cannot be read or written ({error.code}: {reason}); {change}")
    # After the faults: those come with a 403 too.
    if error.code in _REFUSALS or error.status in (401, 403):
        reason, change = _REFUSALS.get(error.code, ("the server refuses it", _RIGHTS))
        return DataError(f"{uri}: access is refused ({error.code}: {reason}); {change}")
    if error.is_precondition:
        return DataError(
            f"{uri}: was replaced while it was read; expected an object at rest; "
            "stop its other writer and read it again"
        )
    if error.is_passing:
        return StorageOutageError(_explain_outage(uri, error))
    return DataError(
        f"{uri}: cannot be read or written ({error}); "
        f"check the name, {endpoint_variable()} and the server"
    )


def _explain_outage(uri: str, error: RequestError) -> str:
    tried = f"{error.tries} attempts in {error.waited_s:.0f} s"
    if error.kind == "unreachable":
        return (
            f"{uri}: cannot be read or written ({error.code}; {tried}); expected an "
            f"S3 server; correct {endpoint_variable()}, start the server, or mend the network"
        )
    return (
        f"{uri}: cannot be read or written: {tried} failed, the last by {error}; the store "
        "throttles or is disturbed: ask for less at once (fewer processes or loader workers), or "
        "check the server and the network"
    )


def _describe_skew(error: RequestError) -> str:
    try:
        server_time = parsedate_to_datetime(error.server_time)
    except ValueError:
        return "this machine's clock and the server's differ too much"
    seconds = (datetime.now(UTC) - server_time.replace(tzinfo=UTC)).total_seconds()
    direction = "ahead of" if seconds > 0 else "behind"
    return f"this machine's clock is {abs(seconds):.0f} s {direction} the server's"

"""Large objects, written in parts that nobody sees before the last request completes them.

Parts of an upload that is neither completed nor aborted are stored, and paid for, until somebody
aborts it. An upload says when it was begun, and not by whom: those of killed writers go by age.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

from fqgan_dist.storage.async_tasks import gather
from fqgan_dist.storage.leftovers import Swept, is_abandoned
from fqgan_dist.storage.owners import FOREIGN_S
from fqgan_dist.storage.s3_errors import RequestError

_MAX_PARTS = 9000  # S3 allows 10 000
_MARK = "fqgan-upload"


class Call(Protocol):
    """Makes one request, and repeats it as long as that helps; raises RequestError."""

    def __call__(self, method: str, **parameters: Any) -> Awaitable[Any]:
        """Call a method of the client."""
        ...


async def upload(
    call: Call,
    size: int,
    part_of: Callable[[int, int], bytes],
    *,
    part_bytes: int,
    transfers: asyncio.Semaphore,
) -> None:
    """Write an object in parts; it appears when all of them are there.

    Args:
        call: makes requests of the object.
        size: its bytes.
        part_of: gives those from one offset to another.
        part_bytes: of a part, more where there were too many.
        transfers: bounds the parts in memory.
    """
    mark = uuid.uuid4().hex
    begun = await call("create_multipart_upload", Metadata={_MARK: mark})
    part_bytes = max(part_bytes, -(-size // _MAX_PARTS))  # S3 limits the number
    identity = {"UploadId": begun["UploadId"]}

    async def put(number: int, start: int, end: int) -> dict[str, Any]:
        async with transfers:
            data = await asyncio.to_thread(part_of, start, end)
            answer = await call("upload_part", PartNumber=number, Body=data, **identity)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    starts = range(0, size, part_bytes)
    try:
        parts = await gather(
            [put(i, at, min(at + part_bytes, size)) for i, at in enumerate(starts, start=1)]
        )
        await _complete(call, mark, {**identity, "MultipartUpload": {"Parts": parts}})
    except BaseException:
        with suppress(RequestError):  # the first error says more
            await call("abort_multipart_upload", **identity)
        raise


async def _complete(call: Call, mark: str, parameters: dict[str, Any]) -> None:
    try:
        await call("complete_multipart_upload", **parameters)
    except RequestError as error:
        # The repetition of a request whose answer was lost finds the upload gone. Then the object
        # bears its mark, or somebody else has replaced it since.
        if error.code != "NoSuchUpload":
            raise
        found = await call("head_object")
        if found["Metadata"].get(_MARK) != mark:
            raise


async def abort_unfinished(call: Call, bucket: str, prefix: str, *, is_superseded: bool) -> Swept:
    """Abort the uploads below a prefix that were begun a day ago, or all of them.

    A living one is a matter of minutes. If it were stopped for a day and went on, it would fail.
    """
    swept = Swept()
    uploads = [each async for each in _list_uploads(call, bucket, prefix)]
    for entry, now in uploads:
        begun = entry["Initiated"]
        age_s = (now - begun).total_seconds()
        if is_superseded or is_abandoned(None, lambda age_s=age_s: age_s, foreign_s=FOREIGN_S):
            identity = {"Bucket": bucket, "Key": entry["Key"], "UploadId": entry["UploadId"]}
            try:
                size = sum([each["Size"] async for each in _list_parts(call, identity)])
                await call("abort_multipart_upload", **identity)
            except RequestError as error:
                if error.code != "NoSuchUpload":  # completed, or swept by another, meanwhile
                    raise
            else:
                swept += Swept(1, size)
    return swept


async def _list_uploads(
    call: Call, bucket: str, prefix: str
) -> AsyncGenerator[tuple[dict[str, Any], datetime], None]:
    """List the uploads of a page and the server's time, page by page."""
    marker: dict[str, Any] = {}
    while True:
        page = await call("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        for entry in page.get("Uploads", ()):
            if entry["Key"].startswith(prefix):
                yield entry, _read_clock(page)
        if not page.get("IsTruncated"):
            return
        marker = {
            "KeyMarker": page["NextKeyMarker"],
            "UploadIdMarker": page["NextUploadIdMarker"],
        }


async def _list_parts(call: Call, identity: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    marker: dict[str, Any] = {}
    while True:
        page = await call("list_parts", **identity, **marker)
        for part in page.get("Parts", ()):
            yield part
        if not page.get("IsTruncated"):
            return
        marker = {"PartNumberMarker": page["NextPartNumberMarker"]}


def _read_clock(answer: dict[str, Any]) -> datetime:
    # The server's, as the age is by its clock too.
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        return parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError):
        return datetime.now(UTC)

"""The storage root: what this process may do there, and how fast.

Everything is tried for real, in a folder of its own below the root, which is removed at the end. A
local root that is not there is made, as a run would make it.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fqgan_dist.diagnosis.connections import explain_silent_url
from fqgan_dist.diagnosis.verdict import Verdict, failed, judge, ok
from fqgan_dist.errors import DataError
from fqgan_dist.storage.endpoint import endpoint_variable, find_endpoint
from fqgan_dist.storage.leftovers import name_mark
from fqgan_dist.storage.s3_errors import RequestError
from fqgan_dist.storage.storage import Storage

ACCESS, SPEED, SPACE = "storage access", "storage speed", "storage space"

_TRANSFER_BYTES = 32 * 2**20
# Loaders read ranges of this size concurrently.
_PART_BYTES = 8 * 2**20
_SMALL_REQUESTS = 10
_SLOW_REQUEST_S = 0.2
# Below it, the background save of a rank's 1.4 GB takes more than a minute.
_SLOW_UPLOAD_MB_PER_S = 20.0
# What the tokenizer's training reads on a node of 8 A100 (performance.md, section 5).
_SLOW_DOWNLOAD_MB_PER_S = 90.0
_LEAST_GIB, _LITTLE_GIB = 1, 20

_GRANT = "grant s3:PutObject, GetObject, ListBucket and DeleteObject on the bucket and the root"
_ADVICE_BY_CODE = {
    "InvalidAccessKeyId": "the access key is unknown to this server: correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret does not fit the key: correct AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "renew the credentials (AWS_SESSION_TOKEN)",
    "InvalidToken": "renew the credentials (AWS_SESSION_TOKEN)",
    "RequestTimeTooSkewed": "set this node's clock (NTP)",
    "NoSuchBucket": "create the bucket, or correct storage.root",
    "AccessDenied": _GRANT,
    "403": _GRANT,  # what a HEAD request says: its answers have no body
    "QuotaExceeded": "free space in the bucket, or raise its quota",
}
_ADVICE_BY_ERRNO = {
    errno.ENOSPC: "free space on the disk",
    errno.EDQUOT: "free space, or raise the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "mount the file system for writing",
    errno.EACCES: "give this user the right to write there, or choose another storage.root",
    errno.EPERM: "give this user the right to write there, or choose another storage.root",
}


def check_access(root: str) -> Verdict:
    """Write, read, create, list and delete below the root."""
    if silence := _explain_silence(root):
        return failed(ACCESS, f"{root}: {silence}", _advise_unreachable())
    granted: list[str] = []
    with _own_folder(root) as folder:
        for name, operation in _OPERATIONS:
            try:
                operation(folder)
            except (DataError, OSError) as error:
                return _explain(root, name, error, granted)
            granted.append(name)
    return ok(ACCESS, f"{root}: {', '.join(granted)} fine")


def check_speed(root: str) -> Verdict:
    """Measure small requests and the transfer of one object."""
    if silence := _explain_silence(root):
        return failed(SPEED, f"{root}: not measured: {silence}", _advise_unreachable())
    data = secrets.token_bytes(_TRANSFER_BYTES)
    with _own_folder(root) as folder:
        try:
            upload_s = _time(lambda: folder.write_bytes("large", data))
            request_s = statistics.median(
                _time(lambda: folder.read_bytes("large", length=1)) for _ in range(_SMALL_REQUESTS)
            )
            start = time.perf_counter()
            parts = folder.read_ranges(
                [("large", offset, _PART_BYTES) for offset in range(0, len(data), _PART_BYTES)]
            )
            download_s = time.perf_counter() - start
        except (DataError, OSError) as error:
            return failed(SPEED, f"{root}: not measured: {error}", _find_advice(error))
    if b"".join(parts) != data:
        advice = "do not use this storage, or what lies between it and this node"
        return failed(SPEED, f"{root}: other bytes were read than were written", advice)
    return judge_speed(
        request_s=request_s,
        upload_mb_per_s=len(data) / 1e6 / upload_s,
        download_mb_per_s=len(data) / 1e6 / download_s,
        is_local=folder.is_local,
    )


def judge_speed(
    *, request_s: float, upload_mb_per_s: float, download_mb_per_s: float, is_local: bool
) -> Verdict:
    """Compare measured speeds with what a training needs."""
    warnings = []
    if request_s > _SLOW_REQUEST_S:
        warnings.append(f"requests over {1000 * _SLOW_REQUEST_S:g} ms: use a nearer bucket")
    if upload_mb_per_s < _SLOW_UPLOAD_MB_PER_S:
        warnings.append(f"uploads under {_SLOW_UPLOAD_MB_PER_S:g} MB/s: checkpoints will take long")
    if download_mb_per_s < _SLOW_DOWNLOAD_MB_PER_S:
        warnings.append(
            f"downloads under {_SLOW_DOWNLOAD_MB_PER_S:g} MB/s: 8 GPUs may wait for images"
        )
    finding = (
        f"{1000 * request_s:.1f} ms per small read, {upload_mb_per_s:.0f} MB/s up, "
        f"{download_mb_per_s:.0f} MB/s down ({_TRANSFER_BYTES // 2**20} MiB)"
    )
    if is_local:
        finding += ", reads from the page cache"
    return judge(SPEED, finding, failures=[], warnings=warnings)


def check_space(root: str) -> Verdict:
    folder = find_existing(Path(root))
    return judge_space(SPACE, f"{root}", shutil.disk_usage(folder).free)


def judge_space(check: str, where: str, free_bytes: int) -> Verdict:
    """Compare free space with what a run needs at the least."""
    free_gib = free_bytes / 2**30
    finding = f"{where}: {free_gib:.1f} GiB free"
    failures = [f"free at least {_LEAST_GIB} GiB"] if free_gib < _LEAST_GIB else []
    warnings = [f"have {_LITTLE_GIB} GiB or more free for a full-size run"]
    return judge(
        check,
        finding,
        failures=failures,
        warnings=warnings if _LEAST_GIB <= free_gib < _LITTLE_GIB else [],
    )


def find_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    # os.path, unlike pathlib, takes a folder that may not be entered for a missing one.
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))


def _explain_silence(root: str) -> str | None:
    found = find_endpoint()
    return None if Storage(root).is_local or not found else explain_silent_url(found[1])


def _write(folder: Storage) -> None:
    folder.write_bytes("object", b"first")
    folder.write_bytes("object", b"second")


def _read(folder: Storage) -> None:
    if folder.read_bytes("object") != b"second":
        raise DataError(f"{folder.root}: an object that was replaced still has its former bytes")


def _create(folder: Storage) -> None:
    folder.create_bytes("created", b"winner")
    with suppress(FileExistsError):
        folder.create_bytes("created", b"loser")
    if folder.read_bytes("created") != b"winner":
        raise DataError(
            f"{folder.root}: a create-only write replaced an object; the server ignores "
            f"If-None-Match, on which the commits of checkpoints rest"
        )


def _list(folder: Storage) -> None:
    if folder.list() != ["created", "object"]:
        raise DataError(f"{folder.root}: what was just written is not listed")


def _delete(folder: Storage) -> None:
    folder.delete("object")
    if folder.exists("object"):
        raise DataError(f"{folder.root}: an object is still there after its deletion")


_OPERATIONS: tuple[tuple[str, Callable[[Storage], None]], ...] = (
    ("write", _write),
    ("read", _read),
    ("create-only", _create),
    ("list", _list),
    ("delete", _delete),
)


@contextmanager
def _own_folder(root: str) -> Iterator[Storage]:
    """Give a folder below the root, and remove it at the end; a new root stays, empty."""
    folder = Storage(root).child(name_mark("doctor"))
    try:
        yield folder
    finally:
        # Without the right to delete or list, which is then the finding, something stays.
        with suppress(DataError, OSError):
            for name in folder.list():
                folder.delete(name)
            folder.sweep(is_superseded=True)
            if folder.is_local:
                Path(folder.root).rmdir()


def _explain(root: str, operation: str, error: Exception, granted: list[str]) -> Verdict:
    before = f"{', '.join(granted)} fine; " if granted else ""
    finding = f"{root}: {before}{operation}: {error}"
    return failed(ACCESS, finding, _find_advice(error))


def _find_advice(error: BaseException) -> str:
    chain = list(_causes(error))
    for each in chain:
        response = getattr(each, "response", None)  # of the S3 client's errors
        code = response["Error"].get("Code", "") if isinstance(response, dict) else ""
        if code in _ADVICE_BY_CODE:
            return _ADVICE_BY_CODE[code]
    if any(isinstance(each, RequestError) and each.kind == "credentials" for each in chain):
        return "give credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or a role"
    for each in chain:
        if isinstance(each, OSError) and each.errno in _ADVICE_BY_ERRNO:
            return _ADVICE_BY_ERRNO[each.errno]
    return f"check the root, the endpoint ({endpoint_variable()}), the credentials and the network"


def _advise_unreachable() -> str:
    return f"correct {endpoint_variable()}, start the server, or mend the network"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _time(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start

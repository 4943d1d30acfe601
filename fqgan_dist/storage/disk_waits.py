"""Waiting for room on a disk, or for a network's file system, in the processes of a run.

A command that somebody waits for fails at once: who sees it can make room.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from fqgan_dist.storage.disk_errors import explain_disk_error, is_passing_disk_error
from fqgan_dist.waiting import WAITS, is_part_of_run, storage_patience_s

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 10.0
_LOG_EVERY_S = 60.0

_logger = logging.getLogger(__name__)

T = TypeVar("T")


def wait_for_disk(uri: str, work: Callable[[], T]) -> T:
    """Do something with a file that can be done again, until the disk allows it.

    Args:
        uri: the file or folder, for messages.
        work: what is done; it leaves nothing behind where it fails.

    Raises:
        OSError: what passes by itself did not, for longer than the run has patience; or another
            error.
    """
    began = time.monotonic()
    number: int | None = None
    wait_s, logged_at = _FIRST_WAIT_S, -_LOG_EVERY_S
    try:
        while True:
            try:
                return work()
            except OSError as error:
                waited_s = time.monotonic() - began
                patience_s = storage_patience_s()
                is_over = not is_part_of_run() or waited_s >= patience_s
                if is_over or not is_passing_disk_error(error):
                    raise
                reason = str(explain_disk_error(uri, error))
            if number is None:
                number = WAITS.begin(f"a disk: {reason}")
            if waited_s - logged_at >= _LOG_EVERY_S:
                logged_at = waited_s
                _logger.warning(
                    "%s; waiting since %.0f s, for up to %.0f s: the run goes on by itself",
                    reason,
                    waited_s,
                    patience_s,
                )
            time.sleep(min(wait_s, max(patience_s - waited_s, 0.0)))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
    finally:
        if number is not None:
            WAITS.end(number)
            _logger.warning("%s: no longer waited for, after %.0f s", uri, time.monotonic() - began)

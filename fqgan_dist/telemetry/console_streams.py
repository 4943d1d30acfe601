"""Keeping log lines off a live display.

rich replaces `sys.stdout` and `sys.stderr` while it draws, so that lines pass above; a log handler
that was made before holds on to the former stream and would write into the drawing (Ray's does).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


@contextmanager
def handlers_follow_streams(former_streams: tuple[TextIO, TextIO]) -> Iterator[None]:
    """Let every log handler that holds a former console stream write to the present one.

    Former are `sys.stdout` and `sys.stderr` as they were before a display replaced them.
    """
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    present = dict(zip(map(id, former_streams), (sys.stdout, sys.stderr), strict=True))
    for handler in _stream_handlers():
        former = handler.stream
        target = present.get(id(former))
        if target is not None and target is not former:
            handler.setStream(target)
            moved.append((handler, former))
    try:
        yield
    finally:
        for handler, former in moved:
            handler.setStream(former)


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(name) for name in tuple(logging.root.manager.loggerDict)]
    for owner in (logging.root, *loggers):
        for handler in owner.handlers:
            if isinstance(handler, logging.StreamHandler):
                yield handler

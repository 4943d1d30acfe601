"""Signals: SIGTERM, as schedulers and `ray job stop` send it, and Ctrl-C.

A training is given notice by the first signal: it finishes its step, saves, and ends by itself
within `termination.grace_s`; a second signal ends it at once. What does not train ends at the
first.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from pydantic import Field

from fqgan_dist.config import Config
from fqgan_dist.errors import NoticeError
from fqgan_dist.notice import NOTICES

EXIT_CODE = 128 + signal.SIGTERM
"""As a shell reports it; `cluster/submit` takes it for a loss and submits again."""

_ECHO_S = 2.0
# Who stops a group of processes signals it as a whole, and torchrun then its ranks again: within so
# long it is the same request.

_DEFAULT_GRACE_S = 60.0
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class TerminationConfig(Config):
    """How a run ends that is asked to by SIGTERM or Ctrl-C."""

    grace_s: float = Field(default=_DEFAULT_GRACE_S, ge=0)
    """Seconds for a training to finish its step and save; it is broken off then. 0: at once."""


class TerminatedError(KeyboardInterrupt):
    """The process was asked to end; handled wherever Ctrl-C is."""


class SignalNotice:
    """The handler of signals of one process: notice first, and the end at a second or too late."""

    def __init__(self, end: Callable[[int], object], *, grace_s: float) -> None:
        """Begin without a signal.

        Args:
            end: ends the process, called in the main thread with a signal's number.
            grace_s: after so long the signal counts once more.
        """
        self.number: int | None = None
        """Of the first signal that gave notice."""
        self._end = end
        self._grace_s = grace_s
        self._since = 0.0
        self._is_over = False
        self._timer: threading.Timer | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Take a signal."""
        now = time.monotonic()
        if self.number is None and self._grace_s and NOTICES.is_heeded:
            self.number, self._since = number, now
            NOTICES.give(_NAMES[signal.Signals(number)], time.time() + self._grace_s)
            self._timer = threading.Timer(self._grace_s, self._lose_patience, args=(number,))
            self._timer.daemon = True
            self._timer.start()
        elif self.number is None or self._is_over or now - self._since >= _ECHO_S:
            self._end(number)

    def _lose_patience(self, number: int) -> None:
        self._is_over = True
        os.kill(os.getpid(), number)

    def close(self) -> None:
        """Forget the notice that it gave."""
        if self._timer is not None:
            self._timer.cancel()
        if self.number is not None:
            NOTICES.clear()


@contextmanager
def clean_termination(grace_s: float = _DEFAULT_GRACE_S) -> Iterator[None]:
    """End a block cleanly at SIGTERM or Ctrl-C.

    Ray installs a handler of its own when it is started, which prints the stacks of C++: so this is
    used again afterwards.

    Raises (in the main thread):
        TerminatedError: SIGTERM came. KeyboardInterrupt: Ctrl-C. In a block that heeds notice
            (`notice`), once it has ended by itself, or after `grace_s`; else at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    notice = SignalNotice(_end, grace_s=grace_s)
    formers = _install(notice)
    try:
        yield
    except NoticeError as error:
        if notice.number is None:
            raise
        _leave_alone(notice.number)
        raise _error_of(notice.number) from error
    finally:
        notice.close()
        for number, former in formers.items():
            if signal.getsignal(number) == notice.handle:
                # None: it was not installed from Python.
                signal.signal(number, signal.SIG_DFL if former is None else former)


def _install(notice: SignalNotice) -> dict[signal.Signals, Any]:
    formers: dict[signal.Signals, Any] = {}
    for number in _NAMES:
        # Whoever starts a command in the background of a script lets it ignore Ctrl-C.
        if number is signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
            continue
        formers[number] = signal.signal(number, notice.handle)
    return formers


def _end(number: int) -> NoReturn:
    _leave_alone(number)
    raise _error_of(number)


def _leave_alone(number: int) -> None:
    """Let what cleans up be; only Ctrl-C breaks it off."""
    if number == signal.SIGTERM:
        # To the end of the process.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _error_of(number: int) -> KeyboardInterrupt:
    return TerminatedError() if number == signal.SIGTERM else KeyboardInterrupt()

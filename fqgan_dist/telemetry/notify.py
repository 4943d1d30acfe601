"""Telling somebody that a run waits for long, was started again, or has ended.

`FQGAN_NOTIFY` is an address (http or https, which gets a POST) or a command, which gets the same on
its standard input: `{"event": "waiting", "run": NAME, "text": ...}`, with the events `waiting` (for
longer than `FQGAN_NOTIFY_AFTER_S`, 300 by default), `restart` and `end`. Whatever it does, the run
goes on as if nobody had been told.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import threading
import time
import urllib.request
from typing import Literal

from fqgan_dist.storage.names import find_scheme, is_remote
from fqgan_dist.waiting import Wait

NOTIFY_VARIABLE = "FQGAN_NOTIFY"
AFTER_VARIABLE = "FQGAN_NOTIFY_AFTER_S"

Event = Literal["waiting", "restart", "end"]

_DEFAULT_AFTER_S = 300.0
_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class Notifier:
    """Tells of the events of one run, in the background."""

    def __init__(self, run: str) -> None:
        """Read the environment; without `FQGAN_NOTIFY` nobody is told."""
        self._run = run
        self._target = os.environ.get(NOTIFY_VARIABLE, "")
        try:
            self._after_s = float(os.environ.get(AFTER_VARIABLE, ""))
        except ValueError:
            self._after_s = _DEFAULT_AFTER_S
        self._told_wait: float | None = None
        self._threads: list[threading.Thread] = []

    def tell(self, event: Event, text: str) -> None:
        """Tell of an event; never waits, never fails."""
        if not self._target:
            return
        message = json.dumps({"event": event, "run": self._run, "text": text}).encode()
        thread = threading.Thread(target=self._deliver, args=(message,), daemon=True)
        thread.start()
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]

    def watch(self, wait: Wait | None) -> None:
        """Tell of a wait once it has lasted for long; called now and then with the longest."""
        if wait is None:
            self._told_wait = None
        elif wait.seconds >= self._after_s and self._told_wait is None:
            self._told_wait = wait.since
            self.tell("waiting", str(wait))

    def close(self) -> None:
        """Give what was told a moment to arrive."""
        deadline = time.monotonic() + _TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _deliver(self, message: bytes) -> None:
        # The target is not repeated in a message: the address of a chat's hook is a credential.
        try:
            if is_remote(self._target):
                _post(self._target, message)
            else:
                subprocess.run(
                    shlex.split(self._target),
                    input=message,
                    timeout=_TIMEOUT_S,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.warning(
                "%s: what it names could not be told of an event (%s)",
                NOTIFY_VARIABLE,
                type(error).__name__,
            )


def _post(address: str, message: bytes) -> None:
    if find_scheme(address) not in ("http", "https"):
        raise ValueError("neither http nor https")
    request = urllib.request.Request(
        address, data=message, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
        pass

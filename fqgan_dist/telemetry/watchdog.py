"""A thread that looks whether its process moves, tells the others, and ends what hangs.

What hangs in a collective can neither raise nor return. Long before it is ended, a line says what
everybody is doing. At the bound the stacks of all threads go to the log, and the processes that
cannot end themselves are ended too.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from fqgan_dist.activity import ACTIVITY, Activity, WatchdogConfig
from fqgan_dist.errors import TRY_AGAIN, HangError
from fqgan_dist.process_identity import read_state
from fqgan_dist.stopped_processes import (
    describe_stacks,
    end_process,
    endable_process,
    is_here,
)
from fqgan_dist.telemetry.log_files import publish_log, write_to_log
from fqgan_dist.telemetry.standstill import (
    HEARTBEAT_S,
    Heartbeat,
    HeartbeatTable,
    Member,
    Standstill,
)
from fqgan_dist.terminal import clean_text

Exchange = Callable[[Heartbeat], Standstill | None]
"""Tells the others of a heartbeat and gives what is known of all of them; may block and raise."""
EndAttempt = Callable[[HangError], None]
"""Ends this process's part of the attempt; called from a thread."""

# A heartbeat that was that late was so because the whole process was stopped, or its machine.
_FROZEN_S = 5.0
# What ends otherwise than by our hand has so long for it.
_LAST_RESORT_S = 60.0
_JOIN_S = 2.0
_OTHERS_BEATS = 2

logger = logging.getLogger(__name__)


def end_here(error: HangError) -> None:
    """End this process at once, as one that may be started again."""
    logger.error("HangError: %s", error)
    publish_log()
    os._exit(TRY_AGAIN)


@dataclass(frozen=True, kw_only=True)
class WatchedProcess:
    """Who is watched, and by which means."""

    name: str
    """For messages, for example `rank 1/2 node0`."""
    group: str = "here"
    """Unique name of the attempt or pool."""
    number: int = 0
    """Rank, or number of the actor."""
    world_size: int = 1
    """Processes that stand still together; 0: this one is judged alone."""
    node: str = ""
    """Ray's id of the node."""
    exchange: Exchange | None = None
    """How the others hear of it; None: there are none."""
    count_collectives: Callable[[], int | None] = lambda: None
    """Gives how many collectives this process has entered."""
    end: EndAttempt = end_here
    ends_others: bool = False
    """Whether it ends stopped processes of its machine; else somebody else does."""
    warns: bool = True
    """Whether its lines are shown, and not only kept in its log file."""


class Watchdog:
    """Watches this process during a block."""

    def __init__(
        self,
        process: WatchedProcess,
        config: WatchdogConfig,
        *,
        activity: Activity = ACTIVITY,
        interval_s: float = HEARTBEAT_S,
    ) -> None:
        """Begin with the block."""
        self._process = process
        self._config = config
        self._activity = activity
        self._interval_s = interval_s
        self._own = HeartbeatTable()
        self._warning = GrowingInterval()
        self._stop = threading.Event()
        self._opened = ExitStack()
        self._news = threading.Condition()
        self._heartbeat: Heartbeat | None = None
        self._answer: Standstill | None = None
        self._answered_at = time.monotonic()
        self.hang: HangError | None = None
        """What ends this process's part; it counts before what follows from it elsewhere."""
        self._last_resort = threading.Timer(_LAST_RESORT_S, os._exit, (TRY_AGAIN,))
        self._last_resort.daemon = True
        self._threads = [
            threading.Thread(target=run, name=f"watchdog {name}", daemon=True)
            for name, run in (("heartbeat", self._watch), ("exchange", self._exchange))
        ]

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        process = self._opened.enter_context(endable_process(self._process.node))
        self._member = Member(
            group=self._process.group,
            number=self._process.number,
            name=self._process.name,
            world_size=self._process.world_size,
            process=process,
        )
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads; the others hear that this process leaves."""
        self._stop.set()
        with self._news:
            self._heartbeat = replace(self._look(), is_last=True)
            self._news.notify()
        for thread in self._threads:
            # One that ends this process is waited for, whatever else may end it meanwhile.
            thread.join(_JOIN_S if self.hang is None else None)
        self._last_resort.cancel()  # the block has ended: whoever owns the process goes on
        self._opened.close()

    def _look(self) -> Heartbeat:
        glance = self._activity.glance()
        count = self._process.count_collectives()
        return self._member.heartbeat(glance, self._config, num_collectives=count)

    def _watch(self) -> None:
        due = time.monotonic()  # at once: who is stopped soon after shall have been heard of
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            now = time.monotonic()
            if now - due > _FROZEN_S:
                self._activity.forgive(now - due)
            due = now + self._interval_s
            heartbeat = self._look()
            with self._news:
                self._heartbeat = heartbeat
                self._news.notify()
            self._own.receive(heartbeat)
            standstill = self._judge()
            if standstill is not None and standstill.is_hang:
                self._end(standstill)
                return
            if self._warning.is_due(standstill):
                assert standstill is not None, "only a standstill is warned of"
                self._say(f"{standstill.text}; {describe_loaders()}".rstrip("; "))

    def _judge(self) -> Standstill | None:
        """Take the answer of who knows all; where there is none for long, what is known here."""
        if self._process.exchange is None:
            return self._own.judge(self._member.group, self._member.number)
        if time.monotonic() - self._answered_at < self._config.after_s:
            return self._answer
        alone = self._own.judge(self._member.group, self._member.number)
        if alone is None:
            return None
        culprit = "how the others are nobody tells: what keeps their heartbeats is out of reach"
        return replace(alone, culprit=culprit)

    def _exchange(self) -> None:
        """Tell the others, in a thread of its own, as an answer may never come."""
        exchange = self._process.exchange
        while exchange is not None:
            with self._news:
                while self._heartbeat is None:
                    self._news.wait()
                heartbeat, self._heartbeat = self._heartbeat, None
            try:
                answer = exchange(heartbeat)
            # Ray's, the store's or the system's errors: who is not heard counts as silent.
            except Exception as error:  # noqa: BLE001
                logger.debug("no heartbeat is exchanged: %s", error)
            else:
                self._answer, self._answered_at = answer, time.monotonic()
            if heartbeat.is_last:
                return

    def _say(self, text: str) -> None:
        if self._process.warns:
            logger.warning("%s", text)
        else:
            write_to_log(str(clean_text(text)))

    def _end(self, standstill: Standstill) -> None:
        text = "; ".join(filter(None, [standstill.text, describe_loaders()]))
        advice = "look at the stacks in logs/; raise watchdog.after_s if nothing hangs"
        self.hang = HangError(f"{text} - {advice}")
        self._last_resort.start()
        write_to_log(str(clean_text(f"HANGS: {text}\n{describe_stacks()}")))
        publish_log()
        if self._process.world_size > 1:
            # Whoever ends first ends the others too: all shall have found the same by then.
            time.sleep(_OTHERS_BEATS * self._interval_s)
        self._end_helpers()
        if self._process.ends_others:
            self._end_silent(standstill)
        publish_log()
        self._process.end(self.hang)

    def _end_helpers(self) -> None:
        # A stopped one would outlive this process.
        for process in self._activity.helper_processes():
            stacks = end_process(process)
            if stacks is not None:
                write_to_log(str(clean_text(f"stacks of its process {process.pid}:\n{stacks}")))
        for child in multiprocessing.active_children():
            child.kill()

    def _end_silent(self, standstill: Standstill) -> None:
        for heartbeat in standstill.silent:
            if heartbeat.number != self._member.number and is_here(heartbeat.process):
                report_end(heartbeat, end_process(heartbeat.process))


def report_end(heartbeat: Heartbeat, stacks: str | None) -> None:
    """Log that a silent process was ended, if it was, with its stacks."""
    if stacks is not None:
        logger.warning(
            "%s (pid %d) gave no sign of life, and was ended: last heard in %s",
            heartbeat.name,
            heartbeat.process.pid,
            heartbeat.phase,
        )
        write_to_log(str(clean_text(f"stacks of {heartbeat.name}:\n{stacks}")))


def describe_loaders() -> str:
    """Name the child processes of this one that are stopped; "" if none is."""
    stopped = [
        child.pid
        for child in multiprocessing.active_children()
        if child.pid is not None and read_state(child.pid) in ("T", "t")
    ]
    return f"stopped: its child process {', '.join(map(str, stopped))}" if stopped else ""


class GrowingInterval:
    """When a standstill is said again: each time after twice as long, and once that it hangs."""

    def __init__(self) -> None:
        """Begin with none said."""
        self._next_s = 0.0
        self._is_hang_said = False

    def is_due(self, standstill: Standstill | None) -> bool:
        """Whether this one is to be said now; None: there is none."""
        if standstill is None:
            self._next_s, self._is_hang_said = 0.0, False
            return False
        is_news = standstill.is_hang and not self._is_hang_said
        if standstill.seconds < self._next_s and not is_news:
            return False
        self._next_s = 2 * standstill.seconds
        self._is_hang_said |= standstill.is_hang
        return True

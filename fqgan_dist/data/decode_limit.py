"""A limit on the time that one image takes to decode, below those on its work, which are counted.

What an image asks of a decoder is bounded before it is given one (`image_work`), so that the same
bytes are taken or refused everywhere. This limit decides nothing: a decoder that is still at work
after it has gone astray, and nothing but the end of its process stops it. So the process ends, as
one that is killed, with an error that names the image.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from fqgan_dist.terminal import clean_text
from fqgan_dist.waiting import WAITS

LIMIT_S = 300
"""Far above what is measured: 36 million pixels took 0.5 s as a JPEG, 2.5 s as a WebP."""
_SHOWN_S = 10
EXIT_CODE = 1
"""As of any other error of the data."""

_NOTE = "decoding"


class limit_decoding:  # as a block, which a generator would make dearer
    """End this process if a block is still at work after `LIMIT_S`.

    All decoders release the interpreter's lock, so a thread sees how long they take.
    """

    def __init__(self, name: str) -> None:
        """Name the shard and sample, for the error."""
        self._block = _Block(name)

    def __enter__(self) -> None:
        """Begin the block."""
        _watch.begin(self._block)

    def __exit__(self, *_: object) -> None:
        """End the block."""
        _watch.end(self._block)


def leave_note_in(folder: Path) -> None:
    """Let another process know of this one's end: `read_note` there finds the error."""
    _watch.notes = folder


def read_note(folder: Path) -> str | None:
    """Read the error of a process that was ended; None: none was."""
    try:
        return (folder / _NOTE).read_text()
    except FileNotFoundError:
        return None


class _Block:
    """A block at work."""

    __slots__ = ("name", "seen", "wait")

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen = 0
        self.wait: int | None = None


class _Watch:
    """Counts, for each block at work, how often a thread that sleeps a second has seen it.

    Not the time since it began: a process that was stopped, or waits for a processor, has not
    decoded meanwhile.
    """

    def __init__(self) -> None:
        self.notes: Path | None = None
        self._forget()
        # A forked process has none of its parent's threads, perhaps in the middle of something.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._blocks: set[_Block] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, block: _Block) -> None:
        with self._lock:
            self._blocks.add(block)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="decode limit", daemon=True)
                self._thread.start()

    def end(self, block: _Block) -> None:
        with self._lock:
            self._blocks.discard(block)
            if block.wait is not None:
                WAITS.end(block.wait)

    def _run(self) -> None:
        while True:
            time.sleep(1.0)
            with self._lock:
                for block in self._blocks:
                    block.seen += 1
                    if block.seen == _SHOWN_S:
                        # Until the limit it is known what is waited for: this is no hang.
                        block.wait = WAITS.begin(f"the decoder of {block.name}")
                over = [block.name for block in self._blocks if block.seen > LIMIT_S]
            if over:
                self._leave(over[0])

    def _leave(self, name: str) -> None:
        text = str(
            clean_text(
                f"{name}: still being decoded after {LIMIT_S} s, which no photograph takes; the "
                "decoder has gone astray: remove the image, and report it"
            )
        )
        if self.notes is not None:
            with suppress(OSError):  # a full disk must not keep it alive
                (self.notes / _NOTE).write_text(text)
        os.write(2, f"error: {text}\n".encode())
        os._exit(EXIT_CODE)


_watch = _Watch()

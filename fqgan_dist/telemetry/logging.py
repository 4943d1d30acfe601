"""Set up logging of one process: rank filtering, rank prefixes and one file per rank.

Modules only call `logging.getLogger(__name__)`; which rank shows what is decided here
only.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

from fqgan_dist.world import World

OWN_LOGGERS = ("fqgan_dist", "data_tools")
"""Packages whose INFO lines are shown; all others show from WARNING."""

_CONSOLE_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_FILE_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
_HANDLER_PREFIX = "fqgan_dist."


def configure_logging(world: World, log_dir: Path | None) -> None:
    """Send log lines to the console and, with a directory, to `rank-NNNNN.log` in it.

    The main rank's console shows everything from INFO, other ranks' consoles errors only; every
    rank's file holds everything. Each line of an error, tracebacks included, starts with
    `[rank 3/8 node1]`. Calling it again replaces what the last call set up and leaves
    foreign handlers alone.
    """
    root = logging.getLogger()
    _remove_own_handlers(root)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    console = _ConsoleHandler(logging.INFO if world.is_main else logging.ERROR)
    _add_handler(root, console, "console", RankFormatter(world, _CONSOLE_FORMAT, "%H:%M:%S"))
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        path = log_dir / f"rank-{world.rank:05d}.log"
        file = logging.FileHandler(path, encoding="utf-8")
        _add_handler(root, file, "file", RankFormatter(world, _FILE_FORMAT, "%Y-%m-%d %H:%M:%S"))


class RankFormatter(logging.Formatter):
    """Put `[rank 3/8 node1]` before every line of an error: outputs of ranks get mixed."""

    def __init__(self, world: World, line_format: str, date_format: str) -> None:
        super().__init__(line_format, date_format)
        self._prefix = f"[{world}] "

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; a traceback is part of it."""
        text = super().format(record)
        if record.levelno < logging.ERROR:
            return text
        return "\n".join(self._prefix + line for line in text.split("\n"))


class _ConsoleHandler(logging.StreamHandler[TextIO]):
    """Write to the `sys.stderr` of the moment, so that lines pass above a live progress bar."""

    def __init__(self, level: int) -> None:
        # Not StreamHandler's constructor: it would bind today's sys.stderr for good.
        logging.Handler.__init__(self, level)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride] looked up late
        return sys.stderr


def _add_handler(
    root: logging.Logger, handler: logging.Handler, name: str, formatter: logging.Formatter
) -> None:
    handler.set_name(_HANDLER_PREFIX + name)
    handler.setFormatter(formatter)
    root.addHandler(handler)


def _remove_own_handlers(root: logging.Logger) -> None:
    for handler in list(root.handlers):
        if (handler.get_name() or "").startswith(_HANDLER_PREFIX):
            root.removeHandler(handler)
            handler.close()

"""Set up logging of one process: rank filtering, prefixes of errors, and its own log file.

Modules only call `logging.getLogger(__name__)`; which rank shows what is decided here
only.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from fqgan_dist.terminal import CleanFormatter
from fqgan_dist.world import World

# Packages whose INFO lines are shown; all others show from WARNING.
OWN_LOGGERS = ("fqgan_dist", "data_tools")

_CONSOLE_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
_FILE_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
_HANDLER_PREFIX = "fqgan_dist."


def configure_logging(
    world: World, log_file: logging.FileHandler | None, *, label: str | None = None
) -> None:
    """Send log lines to the console and to a file.

    The main rank's console shows everything from INFO, others' consoles errors only; every
    process's file holds everything. Each line of an error, tracebacks included, starts with
    `[rank 3/8 node1]`, or with the label of a process that is no rank. Calling it again replaces
    what the last call set up. Handlers of others stay, but for those of the console: every line is
    shown once, by these rules.
    """
    root = logging.getLogger()
    _remove_handlers(root)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    is_shown = world.is_main and label is None
    console = _ConsoleHandler(logging.INFO if is_shown else logging.ERROR)
    name = label or str(world)
    _add_handler(root, console, "console", LabelFormatter(name, _CONSOLE_FORMAT, "%H:%M:%S"))
    if log_file is not None:
        formatter = LabelFormatter(name, _FILE_FORMAT, "%Y-%m-%d %H:%M:%S")
        _add_handler(root, log_file, "file", formatter)


class LabelFormatter(CleanFormatter):
    """Put `[rank 3/8 node1]` before every line of an error: outputs of processes get mixed."""

    def __init__(self, label: str, line_format: str, date_format: str) -> None:
        super().__init__(line_format, date_format)
        self._prefix = f"[{label}] "

    def format(self, record: logging.LogRecord) -> str:
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


def _remove_handlers(root: logging.Logger) -> None:
    """Remove our own handlers, and others' of the console: Ray Train's shows all ranks' lines."""
    consoles = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for handler in list(root.handlers):
        if (handler.get_name() or "").startswith(_HANDLER_PREFIX):
            root.removeHandler(handler)
            handler.close()
        elif isinstance(handler, logging.StreamHandler) and handler.stream in consoles:
            root.removeHandler(handler)

"""Lets one rank of a training hang once, in every process that has this folder on its path.

`FQGAN_TEST_HANG` names how (`stop`, `loader`, `collective`), the rank and a file that is there once
it did: `stop:1:/tmp/hung`. Python imports this module by itself, before anything else.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = "fqgan_dist.training.hooks"
_STEP = 5


class _Finder(importlib.abc.MetaPathFinder):
    """Changes the module of the trainer's hooks once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load: Any = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            _change(module)

        spec.loader.exec_module = load_and_change
        return spec


def _change(module: Any) -> None:
    how, named_rank, marker = os.environ["FQGAN_TEST_HANG"].split(":")
    rank = int(named_rank)
    step_of_hook = module.ShowProgress.step

    def step(self: Any, number: int) -> None:
        step_of_hook(self, number)
        is_here = int(os.environ.get("RANK", "0")) == rank and number == _STEP
        if is_here and not Path(marker).exists():
            Path(marker).touch()
            _hang(how)

    module.ShowProgress.step = step


def _hang(how: str) -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "loader":
        import multiprocessing

        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGSTOP)
    else:
        time.sleep(3600)


if "FQGAN_TEST_HANG" in os.environ:
    sys.meta_path.insert(0, _Finder())

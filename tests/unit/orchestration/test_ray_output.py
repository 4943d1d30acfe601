"""A raylet that died does not fill the driver's output."""

from __future__ import annotations

import pytest
from ray._private import worker

from fqgan_dist.orchestration.ray_output import short_raylet_errors

DEAD = (
    "Raylet is terminated. Termination is unexpected. Possible reasons include: (1) SIGKILL by the "
    "user or system OOM killer, (2) Invalid memory access from Raylet causing SIGSEGV or SIGBUS, "
    "(3) Other termination signals. Last 20 lines of the Raylet logs:\n"
    + "    [state-dump] a\n"
    * 20
)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(
        worker, "print_to_stdstream", lambda data, *_, **__: found.extend(data["lines"])
    )
    return found


def emit(pid: str, text: str) -> None:
    worker.print_to_stdstream({"pid": pid, "lines": [text], "is_err": False}, ignore_prefix=False)


def test_the_state_of_a_raylet_that_died_is_left_out(printed: list[str]) -> None:
    with short_raylet_errors():
        emit("raylet", DEAD)
        emit("raylet", "another error")
        emit("123", DEAD)
    emit("raylet", DEAD)
    assert printed[0].startswith("Raylet is terminated. Termination is unexpected.")
    assert "state-dump" not in printed[0]
    assert len(printed[0].splitlines()) == 1
    assert printed[1:] == ["another error", DEAD, DEAD]


def test_the_words_that_are_looked_for_are_those_of_this_ray() -> None:
    import inspect

    from ray._private import process_watcher

    source = inspect.getsource(process_watcher.report_raylet_error_logs)
    assert '"of the Raylet logs' in source
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages)

"""Ranks that only torchrun has started find who of them hangs, and end."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.distributed import finish, start_torchrun

WORKER = Path(__file__).with_name("hanging_worker.py")

pytestmark = pytest.mark.full("waits for ranks to hang; the rules are proven in unit/telemetry")


@pytest.mark.parametrize(
    ("how", "culprit"),
    [
        ("stop", "rank 1/2 node0 gives no sign of life"),
        ("loader", "the loader of rank 1/2 node0 gives no batch"),
        ("collective", "rank 1/2 node0 has not entered the collective that the others wait in"),
    ],
)
def test_ranks_that_hang_say_why_leave_their_stacks_and_end(
    how: str, culprit: str, tmp_path: Path
) -> None:
    process = start_torchrun(WORKER, str(tmp_path), how, world_size=2)
    with pytest.raises(RuntimeError, match="exitcode  : 75") as caught:
        finish(process)
    output = str(caught.value)
    assert "HangError: nothing moves since" in output
    assert culprit in output
    logs = {path.name[:6]: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert culprit in logs["rank-0"]
    stacks = {"rank-0": logs["rank-0"], "rank-1": logs["rank-1"]}
    if how == "stop":
        stacks["rank-1"] = logs["rank-0"].partition("stacks of rank 1/2 node0")[2]
        # Not by torchrun, which waits for half a minute and leaves no stacks.
        assert "exitcode  : -12 " in output
    for text in stacks.values():
        assert "hanging_worker.py" in text


def test_ranks_that_move_are_left_alone(tmp_path: Path) -> None:
    finish(start_torchrun(WORKER, str(tmp_path), "nothing", world_size=2))
    assert not any("nothing moves" in path.read_text() for path in (tmp_path / "logs").iterdir())

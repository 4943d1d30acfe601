from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from fqgan_dist.diagnosis.programs import run_programs

SLEEPS = "import time; time.sleep(1000)"


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_output_and_errors_are_kept_apart() -> None:
    code = "import sys; print('out'); print('first\\nlast\\n', file=sys.stderr); sys.exit(3)"
    (finished,) = run_programs([python(code)], time_limit_s=30)
    assert not finished.has_succeeded
    assert finished.output == "out\n"
    assert finished.reason == "last"


def test_programs_run_at_once_and_none_blocks_on_a_full_pipe(tmp_path: Path) -> None:
    # Each floods its pipe, then waits for a file of the other.
    code = (
        "import pathlib, sys, time\n"
        "print('x' * 300_000)\n"
        "mine, other = map(pathlib.Path, sys.argv[1:])\n"
        "mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    finished = run_programs([python(code, a, b), python(code, b, a)], time_limit_s=60)
    assert [each.has_succeeded for each in finished] == [True, True]


def test_at_the_time_limit_children_are_ended_too(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEPS!r}])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    (finished,) = run_programs([python(code, str(pid_file))], time_limit_s=3)
    assert finished.exit_code is None
    assert finished.reason == "no answer in time"
    child = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        run_programs([["no-such-program"]], time_limit_s=5)


def test_variables_are_added_to_this_process_s() -> None:
    code = "import os; print(os.environ['ADDED'], os.environ['PATH'])"
    (finished,) = run_programs([python(code)], time_limit_s=30, environments=[{"ADDED": "yes"}])
    assert finished.output.strip() == f"yes {os.environ['PATH']}"

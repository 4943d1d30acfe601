"""Run a script under torchrun, as a user would, and give its error if it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def start_torchrun(script: Path, *arguments: str, world_size: int) -> subprocess.Popen[str]:
    """Start a script on `world_size` processes of this machine; gloo is the script's choice.

    Several may run side by side: each takes a free port.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return start_python(*launcher, script, *arguments)


def start_python(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start Python on one thread with this project and its tests on the path."""
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 300) -> str:
    """Wait for a process and return its output.

    Raises:
        RuntimeError: it failed or took too long; the message holds its output.
    """
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        output, _ = process.communicate()
        raise RuntimeError(f"no end after {timeout_s:g} s:\n{output}") from None
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{output}")
    return output

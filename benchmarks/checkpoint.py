"""Checkpoints against their targets and their peers: stall, writing, training beside it, restoring.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py folder=DIR [key=value ...] [--json]

`--help` lists the options; README.md says what is compared and how a verdict is made. Exit code 0:
every target was met; 1: one was missed, or a result was wrong; 2: wrong usage; 3: nothing was
missed, but something could not be judged (noisy machine) or run (no room).
"""

from __future__ import annotations

import sys
from pathlib import Path

# `benchmarks` itself is a package of this repository, not of the installed project.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.checkpointing.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

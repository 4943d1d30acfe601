"""A run of two trainings through hours of faults, on a Ray cluster of this machine: what is left?

    python benchmarks/faults.py minutes=10 tokenizer_steps=2000 results=benchmarks/results

`--help` lists the options; README.md says what is done and printed. Needs the tests' packages, and
the right to mount a small disk for one of the faults. Exit code 0: the run ended equal to the calm
one and nobody had to do anything; 1: not; 2: wrong usage.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `benchmarks` and `support` are packages of this repository, not of the installed project.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fault_campaign.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

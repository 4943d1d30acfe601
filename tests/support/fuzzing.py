"""Readers fed with mutated files: only errors of ours may come out, in bounded time and memory.

    PYTHONPATH=tests python -m support.fuzzing                    # what there is to be fed
    PYTHONPATH=tests python -m support.fuzzing manifest 17        # one case again: its traceback
    PYTHONPATH=tests python -m support.fuzzing all 1000 50000     # first seed, number of cases

A case is a pure function of the reader's name and a seed. Cases run in a forked process, as a fault
may end it: what that process did last is known, and the next one goes on behind it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from support.byte_mutations import Mutate

from fqgan_dist.errors import FqganError

MAX_CPU_S = 2.0
"""Longest time of processors for a case; of 60,000 none took more than 0.8 s."""
MAX_MESSAGE_CHARACTERS = 2**18
"""Longest message of an error."""
_HEADROOM_BYTES = 4 * 2**30
_MIB = 2**20


@dataclass(frozen=True)
class Target:
    """A reader of files that somebody else may have written."""

    name: str
    make: Callable[[], Sequence[bytes]]
    """Makes valid files."""
    mutate: Mutate
    read: Callable[[bytes, Path], object]
    """Reads a file's bytes, as a file in an empty folder where it has to be one."""
    documented: tuple[type[Exception], ...] = ()
    """What the reader raises beside errors of ours, as its docstring says."""
    max_bytes: int = 256 * _MIB
    """Memory that a case may take."""
    max_wall_s: float = 60
    """When a case is taken to hang, whatever it waits for."""

    @cached_property
    def examples(self) -> Sequence[bytes]:
        return self.make()

    def case(self, seed: int) -> bytes:
        """Give the bytes of a case; below 0 those of a valid file."""
        if seed < 0:
            return self.examples[-1 - seed]
        random = Random(f"{self.name}/{seed}")
        return self.mutate(random.choice(self.examples), random)


@dataclass(frozen=True)
class Finding:
    """A case that was not refused as it should be."""

    target: str
    seed: int
    what: str

    def __str__(self) -> str:
        again = f"PYTHONPATH=tests python -m support.fuzzing {self.target!r} {self.seed}"
        return f"{self.target}, seed {self.seed}: {self.what}\n  again: {again}"


@dataclass
class Tally:
    """What was done with a reader."""

    target: str
    num_cases: int = 0
    num_read: int = 0
    """Cases that were read as good."""
    seconds: float = 0.0
    max_cpu_s: float = 0.0
    max_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.num_cases} cases, {self.num_read} of them good, "
            f"{self.seconds:.1f} s; at most {self.max_cpu_s:.2f} s and {self.max_bytes / _MIB:.0f} "
            f"MiB; {len(self.findings)} faults"
        )


def run_cases(target: Target, seeds: range) -> Tally:
    """Feed a reader with its valid files, then with the cases of some seeds."""
    tally = Tally(target.name)
    start = time.monotonic()
    pending = [*range(-len(target.examples), 0), *seeds]  # they are made once, before the forks
    while pending:
        pending = _run_in_child(target, pending, tally)
    tally.seconds = time.monotonic() - start
    return tally


def _run_in_child(target: Target, seeds: Sequence[int], tally: Tally) -> Sequence[int]:
    """Run cases in a process of their own; return the seeds that are left."""
    # What the child did last, also if it is killed: the seed that it is at.
    place = mmap.mmap(-1, 8)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        with warnings.catch_warnings():
            # Python 3.12: other threads do not live on. The child needs none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _work(target, seeds, place, Path(folder), results)
        _, status = os.waitpid(child, 0)
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    for seed, what, cpu_s, num_bytes in map(json.loads, lines):
        tally.num_cases += 1
        tally.num_read += what == ""
        tally.max_cpu_s = max(tally.max_cpu_s, cpu_s)
        tally.max_bytes = max(tally.max_bytes, num_bytes)
        if what:
            tally.findings.append(Finding(target.name, seed, what))
    if status == 0:
        return []
    seed = struct.unpack("<q", place[:8])[0]
    cause = (
        f"signal {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else status
    )
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        cause = f"nothing for {target.max_wall_s:g} s"
    tally.num_cases += 1
    tally.findings.append(Finding(target.name, seed, f"the process died of it: {cause}"))
    return seeds[seeds.index(seed) + 1 :]


def _work(
    target: Target, seeds: Sequence[int], place: mmap.mmap, folder: Path, results: Path
) -> None:
    """Be the child: run the cases, write a line for each, and end."""
    code = 1
    try:
        set_bounds()
        # Ended by the kernel, as code of C does not listen to Python's handlers.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with results.open("w", encoding="utf-8", buffering=1) as file:
            for seed in seeds:
                place[:8] = struct.pack("<q", seed)
                signal.setitimer(signal.ITIMER_REAL, target.max_wall_s)
                file.write(json.dumps([seed, *run_case(target, seed, folder / "case")]) + "\n")
        code = 0
    except BaseException:  # noqa: BLE001  whatever it is, this process is not pytest's
        traceback.print_exc()
    finally:
        os._exit(code)


def set_bounds() -> None:
    """Limit this process's memory, and let arithmetic that warns raise."""
    logging.disable()
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", RuntimeWarning)  # NumPy's, of numbers that wrap
    # What the process has freed and kept would hide what a case takes.
    ctypes.CDLL(None).malloc_trim(0)
    limit = _read_status("VmSize") + _HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run_case(target: Target, seed: int, folder: Path) -> tuple[str | None, float, int]:
    """Run one case.

    Returns:
        What is wrong, "" where the file was read, None where it was refused as it should be; the
        seconds of processors, and the bytes of memory.
    """
    data = target.case(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the greatest memory so far is forgotten
    memory, start = _read_status("VmRSS"), time.process_time()
    what: str | None = ""
    try:
        target.read(data, folder)
    except FqganError as error:
        what = None if seed >= 0 else _describe(error)
        if not str(error).strip() or len(str(error)) > MAX_MESSAGE_CHARACTERS:
            what = f"a message of {len(str(error))} characters"
    except target.documented:
        what = None
    except BaseException as error:  # noqa: BLE001  a panic of Rust is no Exception
        what = _describe(error)
    cpu_s = time.process_time() - start
    num_bytes = _read_status("VmHWM") - memory
    if not what and cpu_s > MAX_CPU_S:
        what = f"{cpu_s:.1f} s of processors; at most {MAX_CPU_S} s are expected"
    if not what and num_bytes > target.max_bytes:
        what = f"{num_bytes / _MIB:.0f} MiB; at most {target.max_bytes / _MIB:.0f} are expected"
    return what, cpu_s, num_bytes


def _describe(error: BaseException) -> str:
    frames = [
        f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)
    ]
    return f"{type(error).__name__} ({str(error)[:300]!a}) at {' > '.join(frames[-4:])}"


def _read_status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status: no {name}")


def _run_again(target: Target, seed: int) -> None:
    set_bounds()
    with tempfile.TemporaryDirectory() as folder:
        data = target.case(seed)
        sys.stdout.write(f"{len(data)} bytes: {data[:2000]!r}\n")
        target.read(data, Path(folder))


def main(arguments: list[str], targets: dict[str, Target]) -> int:
    match arguments:
        case []:
            sys.stdout.write("\n".join(targets) + "\n")
        case [name, seed]:
            _run_again(targets[name], int(seed))
        case [name, first, count]:
            chosen = list(targets.values()) if name == "all" else [targets[name]]
            for target in chosen:
                tally = run_cases(target, range(int(first), int(first) + int(count)))
                sys.stdout.write(f"{tally}\n")
                kinds: dict[Any, Finding] = {}
                for finding in tally.findings:
                    kinds.setdefault(finding.what.partition(" (")[0] + finding.what[-40:], finding)
                for finding in kinds.values():
                    sys.stdout.write(f"  {finding}\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    from support.fuzz_targets import TARGETS

    sys.exit(main(sys.argv[1:], {target.name: target for target in TARGETS}))

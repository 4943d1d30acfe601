"""A check and its verdict; checks run one by one, and none can stop the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fqgan_dist.credentials import scrub

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    check: str
    status: Status
    """`failed`: a run would fail, or be wrong; `warning`: it may be slow or break later."""
    finding: str
    """What is so, with the numbers."""
    advice: str = ""
    """What to do about it; "" where nothing is to do."""


@dataclass(frozen=True)
class Check:
    """A function that looks at one thing, within a time limit."""

    name: str
    """The verdict's `check`, also when the function gives none."""
    time_limit_s: float
    fn: Callable[[], Verdict]


def ok(check: str, finding: str) -> Verdict:
    return Verdict(check, "ok", finding)


def warning(check: str, finding: str, advice: str) -> Verdict:
    return Verdict(check, "warning", finding, advice)


def failed(check: str, finding: str, advice: str) -> Verdict:
    return Verdict(check, "failed", finding, advice)


def judge(check: str, finding: str, *, failures: list[str], warnings: list[str]) -> Verdict:
    """Give the verdict of several conditions: what to do about each that fails a run, or warns."""
    advice = "; ".join(failures + warnings)
    return Verdict(
        check, "failed" if failures else "warning" if warnings else "ok", finding, advice
    )


def run_checks(checks: Iterable[Check]) -> list[Verdict]:
    """Run checks one after the other; each gives one verdict, whatever happens in it.

    Credentials are taken out of all texts.
    """
    return [_clean(_run(check)) for check in checks]


def _run(check: Check) -> Verdict:
    verdicts: list[Verdict] = []

    def call() -> None:
        try:
            verdicts.append(check.fn())
        # The boundary of a check: whatever it meets is its finding, the other checks go on.
        except Exception as error:  # noqa: BLE001
            text = f"{type(error).__name__}: {error}"
            verdicts.append(failed(check.name, text, "the check itself broke; report this text"))

    # A thread that hangs in a system call cannot be stopped; as a daemon it holds nobody up.
    thread = threading.Thread(target=call, name=f"check {check.name}", daemon=True)
    thread.start()
    thread.join(check.time_limit_s)
    if not verdicts:
        return failed(
            check.name,
            f"no result within {check.time_limit_s:g} s",
            "find out what hangs: the network, a file system or a device",
        )
    return verdicts[0]


def _clean(verdict: Verdict) -> Verdict:
    return replace(verdict, finding=scrub(verdict.finding), advice=scrub(verdict.advice))

from __future__ import annotations

import threading
import time

import pytest

from fqgan_dist.diagnosis.verdict import Check, Verdict, failed, judge, ok, run_checks


def fine() -> Verdict:
    return ok("fine", "all is well")


def test_a_check_that_breaks_fails_alone() -> None:
    def broken() -> Verdict:
        raise ZeroDivisionError("division by zero")

    first, second = run_checks([Check("broken", 5, broken), Check("fine", 5, fine)])
    assert first.check == "broken"
    assert first.status == "failed"
    assert "ZeroDivisionError: division by zero" in first.finding
    assert second == fine()


def test_a_check_that_hangs_fails_alone() -> None:
    release = threading.Event()

    def hanging() -> Verdict:
        release.wait()
        return fine()

    start = time.monotonic()
    first, second = run_checks([Check("hanging", 0.2, hanging), Check("fine", 5, fine)])
    release.set()
    assert time.monotonic() - start < 4
    assert (first.check, first.status) == ("hanging", "failed")
    assert first.finding == "no result within 0.2 s"
    assert second == fine()


def test_no_credential_leaves_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-value")

    def breaks() -> Verdict:
        raise OSError("cannot sign with a-very-secret-value")

    def tells() -> Verdict:
        return failed("tells", "key a-very-secret-value", "change a-very-secret-value")

    verdicts = run_checks([Check("breaks", 5, breaks), Check("tells", 5, tells)])
    assert "a-very-secret-value" not in repr(verdicts)
    assert "cannot sign with [removed]" in verdicts[0].finding


@pytest.mark.parametrize(
    ("failures", "warnings", "status", "advice"),
    [
        ([], [], "ok", ""),
        ([], ["do this"], "warning", "do this"),
        (["do that"], ["do this"], "failed", "do that; do this"),
    ],
)
def test_the_worst_condition_decides(
    failures: list[str], warnings: list[str], status: str, advice: str
) -> None:
    verdict = judge("x", "so it is", failures=failures, warnings=warnings)
    assert (verdict.status, verdict.advice) == (status, advice)

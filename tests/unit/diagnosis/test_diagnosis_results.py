from __future__ import annotations

import json

from fqgan_dist.diagnosis.results import Diagnosis
from fqgan_dist.diagnosis.verdict import failed, ok, warning

FINE = ok("GPUs", "8 x A100")
SLOW = warning("storage speed", "5 MB/s up", "use a nearer bucket")
BROKEN = failed("Python", "3.9\nis old", "use 3.11")


def test_every_verdict_is_one_line() -> None:
    diagnosis = Diagnosis({"node a": [FINE, SLOW], "node b": [BROKEN]}, ["a note"])
    assert diagnosis.text.splitlines() == [
        "node a",
        "  ok       GPUs           8 x A100",
        "  warning  storage speed  5 MB/s up -> use a nearer bucket",
        "",
        "node b",
        "  FAILED   Python  3.9 is old -> use 3.11",
        "",
        "note: a note",
        "ok: 1, warnings: 1, failed: 1",
    ]


def test_warnings_do_not_fail() -> None:
    assert not Diagnosis({"x": [FINE, SLOW]}).has_failed
    assert Diagnosis({"x": [FINE], "y": [BROKEN]}).has_failed


def test_the_report_is_json() -> None:
    report = Diagnosis({"x": [SLOW]}, ["a note"]).report
    assert json.loads(json.dumps(report)) == {
        "counts": {"ok": 0, "warning": 1, "failed": 0},
        "groups": {
            "x": [
                {
                    "check": "storage speed",
                    "status": "warning",
                    "finding": "5 MB/s up",
                    "advice": "use a nearer bucket",
                }
            ]
        },
        "notes": ["a note"],
    }

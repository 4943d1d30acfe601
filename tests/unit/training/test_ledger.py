from __future__ import annotations

from typing import Any

import pytest

from fqgan_dist.data.consumption import OrderId, StandIn, expect
from fqgan_dist.data.order import SampleOrder
from fqgan_dist.training.commit_log import CommitRecord, Consumption
from fqgan_dist.training.ledger import LedgerReport, check_ledger

COUNTS, SEED, WINDOW = [5, 3, 4], 7, 2
ORDER = SampleOrder(COUNTS, dataset_id="d", seed=SEED, window_shards=WINDOW)


def consumed(start: int, end: int, **changes: Any) -> Consumption:
    stand_ins = changes.get("stand_ins", [])
    values: dict[str, Any] = {
        "start": start,
        "end": end,
        "digest": expect(ORDER, start, end, [StandIn(**each) for each in stand_ins]).hex_digest,
        "dataset_id": "d",
        "num_samples": sum(COUNTS),
        "seed": SEED,
        "window_shards": WINDOW,
    }
    return Consumption.model_validate(values | changes)


def commit(number: int, parent: int | None, what: Consumption | None) -> CommitRecord:
    return CommitRecord(
        number=number,
        attempt="a" * 32,
        parent=parent,
        step=number,
        manifest_sha256="0" * 64,
        consumed=what,
        written_at="now",
    )


def check(*commits: CommitRecord, has_order: bool = True) -> LedgerReport:
    def find_order(order: OrderId) -> SampleOrder | None:
        return ORDER if has_order and order.dataset_id == "d" else None

    return check_ledger({each.number: each for each in commits}, commits[-1], find_order)


def test_a_chain_without_gaps_is_proven() -> None:
    report = check(
        commit(2, None, consumed(0, 8)),
        commit(4, 2, consumed(8, 20)),
        commit(5, 2, consumed(8, 16)),  # of an attempt that was stepped over
        commit(9, 4, consumed(20, 30)),
    )
    assert report.problems == []
    assert report.positions == 30
    assert [(each["images"], each["of"]) for each in report.epochs] == [(12, 12), (12, 12), (6, 12)]
    assert (report.num_commits, report.num_rehashed) == (3, 3)
    bare = check(commit(2, None, consumed(0, 8)), has_order=False)
    assert (bare.problems, bare.num_rehashed) == ([], 0)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (consumed(9, 20), "positions 8 to 9 are missing"),
        (consumed(7, 20), "positions 7 to 8 count twice"),
        (consumed(8, 20, digest="0" * 32), "other samples were loaded"),
        (consumed(8, 20, seed=8), "the order is"),
        (consumed(8, 20, num_samples=0), "of 0 samples"),
        (consumed(8, 9).model_copy(update={"end": 2**53}), "of 12 samples"),
        (consumed(8, 20, skipped=[{"step": 1, "start": 3, "end": 9, "reason": "r"}]), "outside"),
        (None, "recorded nothing"),
    ],
)
def test_what_is_not_proven_is_named(second: Consumption | None, problem: str) -> None:
    report = check(commit(2, None, consumed(0, 8)), commit(4, 2, second))
    assert any(problem in each and "checkpoint 4" in each for each in report.problems)


def test_a_parent_that_is_missing_is_named() -> None:
    (problem, gap) = check(commit(4, 3, consumed(8, 20))).problems
    assert "its parent, record 3, is missing" in problem
    assert "positions 0 to 8 are missing" in gap


def test_what_a_rule_left_out_is_listed() -> None:
    stand_ins = [{"position": 13, "shard": 0, "row": 1}]
    skipped = [{"step": 4, "start": 10, "end": 14, "reason": "loss is nan"}]
    report = check(commit(2, None, consumed(0, 16, stand_ins=stand_ins, skipped=skipped)))
    assert report.problems == []
    assert [each["skipped"] for each in report.epochs] == [2, 2]
    assert [each["stood_in"] for each in report.epochs] == [0, 1]
    assert len(report.exceptions) == 2

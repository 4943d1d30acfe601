"""Proof from the commit log alone that every image of every epoch was trained on exactly once.

Each commit says which positions of the endless stream of samples were consumed since its parent
(commit_log.py: `Consumption`). An epoch is a permutation of the dataset, so positions that follow
one another without a gap are every image once. Attempts that were killed or fenced off do not
matter: only what is on the chain from the newest commit to the first was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fqgan_dist.data.consumption import OrderId, StandIn, expect
from fqgan_dist.data.order import SampleOrder
from fqgan_dist.training.commit_log import CommitRecord, Consumption

_MOST_POSITIONS = 10**9
"""Between two checkpoints; 64 nodes train on 10^8 images in a day."""
_MOST_EPOCHS = 10**6

FindOrder = Callable[[OrderId], SampleOrder | None]
"""Gives an order if its dataset is at hand."""


@dataclass
class LedgerReport:
    """What the log proves."""

    step: int
    """Step of the commit that the proof is of."""
    positions: int = 0
    """Samples that were consumed, of all epochs together."""
    epochs: list[dict[str, int]] = field(default_factory=list)
    """Of each epoch: `epoch` from 0, `images` consumed, `of` how many, `stood_in` for by others,
    `skipped`."""
    problems: list[str] = field(default_factory=list)
    """What was consumed twice, or not at all, or cannot be told; empty: it is proven."""
    exceptions: list[str] = field(default_factory=list)
    """What was not trained on by a rule of the run: damaged samples, steps that were skipped."""
    num_commits: int = 0
    """Commits on the chain."""
    num_rehashed: int = 0
    """Of these, commits whose digest was computed again from the dataset's order."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def check_ledger(
    commits: Mapping[int, CommitRecord], newest: CommitRecord, find_order: FindOrder
) -> LedgerReport:
    """Follow the chain of commits from one back to the first.

    Args:
        commits: all commits of the log by number, also those whose files were deleted since.
        newest: the last one of the chain.
        find_order: gives the order of samples of a dataset that is at hand.
    """
    report = LedgerReport(step=newest.step)
    chain = list(_walk(commits, newest, report))
    chain.reverse()
    report.num_commits = len(chain)
    end, order_id = 0, None
    accounted: list[Consumption] = []
    for commit in chain:
        consumed = commit.consumed
        where = f"checkpoint {commit.number} (step {commit.step})"
        if consumed is None:
            report.problems.append(
                f"{where}: it was committed by a version that recorded nothing; what was trained "
                "on since its parent cannot be told"
            )
            end = -1
            continue
        if (fault := _find_fault(consumed)) is not None:
            report.problems.append(f"{where}: {fault}")
            end = -1
            continue
        if end >= 0 and consumed.start > end:
            report.problems.append(f"{where}: positions {end} to {consumed.start} are missing")
        elif end > consumed.start:
            report.problems.append(f"{where}: positions {consumed.start} to {end} count twice")
        current = _order_id(consumed)
        if order_id is not None and current != order_id:
            report.problems.append(f"{where}: the order is {current}, and was {order_id} before")
        end, order_id = consumed.end, current
        accounted.append(consumed)
        _check_digest(consumed, where, find_order, report)
    _count_epochs(accounted, report)
    return report


def _walk(
    commits: Mapping[int, CommitRecord], newest: CommitRecord, report: LedgerReport
) -> Iterator[CommitRecord]:
    commit = newest
    while True:
        yield commit
        if commit.parent is None:
            return
        parent = commits.get(commit.parent)
        if parent is None or parent.number >= commit.number:
            report.problems.append(
                f"checkpoint {commit.number} (step {commit.step}): its parent, record "
                f"{commit.parent}, is missing or damaged"
            )
            return
        commit = parent


def _find_fault(consumed: Consumption) -> str | None:
    """Say why a record cannot be true: nobody has to count what nobody can have trained on."""
    count = consumed.end - consumed.start
    spans = [(each.start, each.end) for each in consumed.skipped]
    spans += [(each.position, each.position + 1) for each in consumed.stand_ins]
    if any(first < consumed.start or last > consumed.end or first > last for first, last in spans):
        return "stand-ins or skipped steps are outside of the positions consumed"
    if consumed.num_samples == 0 or not 0 <= count <= _MOST_POSITIONS:
        return f"positions {consumed.start} to {consumed.end} of {consumed.num_samples} samples"
    if count // consumed.num_samples > _MOST_EPOCHS:
        return f"{count // consumed.num_samples} epochs between two checkpoints"
    return None


def _order_id(consumed: Consumption) -> OrderId:
    return OrderId(
        dataset_id=consumed.dataset_id,
        num_samples=consumed.num_samples,
        seed=consumed.seed,
        window_shards=consumed.window_shards,
    )


def _check_digest(
    consumed: Consumption, where: str, find_order: FindOrder, report: LedgerReport
) -> None:
    order = find_order(_order_id(consumed))
    if order is None:
        return
    stand_ins = [StandIn(**each.model_dump()) for each in consumed.stand_ins]
    report.num_rehashed += 1
    if expect(order, consumed.start, consumed.end, stand_ins).hex_digest != consumed.digest:
        report.problems.append(
            f"{where}: positions {consumed.start} to {consumed.end}: other samples were loaded "
            "than the order of the dataset has there"
        )


def _count_epochs(accounted: Sequence[Consumption], report: LedgerReport) -> None:
    by_epoch: dict[int, dict[str, int]] = {}

    def entry(epoch: int, length: int) -> dict[str, int]:
        new = {"epoch": epoch, "images": 0, "of": length, "stood_in": 0, "skipped": 0}
        return by_epoch.setdefault(epoch, new)

    for consumed in accounted:
        length = consumed.num_samples
        report.positions += consumed.end - consumed.start
        for epoch, count in _split(consumed.start, consumed.end, length):
            entry(epoch, length)["images"] += count
        for each in consumed.stand_ins:
            epoch = each.position // length
            entry(epoch, length)["stood_in"] += 1
            report.exceptions.append(
                f"position {each.position} (epoch {epoch}): damaged; row {each.row} of shard "
                f"{each.shard} stood in"
            )
        for skipped in consumed.skipped:
            for epoch, count in _split(skipped.start, skipped.end, length):
                entry(epoch, length)["skipped"] += count
            report.exceptions.append(
                f"step {skipped.step} (positions {skipped.start} to {skipped.end}): skipped, "
                f"{skipped.reason}"
            )
    report.epochs = [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _split(start: int, end: int, length: int) -> Iterator[tuple[int, int]]:
    """Give the epochs that positions are in, and how many are in each."""
    while start < end:
        epoch = start // length
        stop = min(end, (epoch + 1) * length)
        yield epoch, stop - start
        start = stop

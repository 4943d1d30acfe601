"""The commands' results as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.shard import ShardSummary
from data_tools.stats import DatasetStats, Spread
from data_tools.verify import VerifyReport

_SHOWN_PROBLEMS = 20


def render_shard(summary: ShardSummary) -> str:
    """Say what `shard` did."""
    size = (
        f"{summary.num_samples} images of {summary.num_classes} classes in "
        f"{summary.num_shards} shards"
    )
    if summary.dataset_id is None:
        state = f"dry run: {summary.destination} would get {size}"
    elif summary.was_complete:
        state = f"{summary.destination} is complete already ({size}); nothing was done"
    else:
        state = (
            f"{summary.destination}: {size} ({summary.num_built} written, "
            f"{summary.num_kept} from an earlier run)"
        )
    lines = [state]
    if summary.dataset_id is not None:
        lines.append(f"dataset id {summary.dataset_id}")
    problems = [f"{item['name']}: {item['action']}: {item['reason']}" for item in summary.problems]
    if problems:
        lines.append(f"{len(problems)} members of the source are not in the dataset:")
    return "\n".join(lines + _indent(problems))


def render_verify(report: VerifyReport) -> str:
    """Say what `verify` found; every damage is named."""
    damages = [f"  {damage.where}: {damage.reason}" for damage in report.damages]
    lines = [f"{len(damages)} damaged:", *damages] if damages else []
    if report.unlisted_files:
        lines.append(f"{len(report.unlisted_files)} files that the index does not name:")
        lines += _indent(report.unlisted_files)
    decoded = f", {report.num_decoded} images decoded" if report.num_decoded else ""
    verdict = "damaged" if damages else "whole"
    lines.append(
        f"{verdict}: {report.num_shards} shards checked, {report.num_samples} images{decoded}; "
        f"dataset id {report.dataset_id or 'not known'}"
    )
    return "\n".join(lines)


def render_stats(stats: DatasetStats) -> str:
    """Show the figures of a dataset, one per line."""
    policy = ", ".join(f"{key} {value}" for key, value in stats.image_policy.items())
    rows = {
        "dataset": f"{stats.name} ({stats.split})",
        "dataset id": stats.dataset_id,
        "images": f"{stats.num_samples}, {stats.num_problems} left out",
        "image policy": policy,
        "classes": str(stats.num_classes),
        "shards": f"{stats.num_shards}, {stats.num_bytes / 2**20:.1f} MiB",
        "images per class": _format(stats.samples_per_class),
        "images per shard": _format(stats.samples_per_shard),
        "classes per shard": _format(stats.classes_per_shard),
        "bytes per image": _format(stats.image_bytes),
        "width": _format(stats.width),
        "height": _format(stats.height),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _format(spread: Spread) -> str:
    return f"{spread.minimum:g} to {spread.maximum:g}, median {spread.median:g}"


def _indent(items: Sequence[str]) -> list[str]:
    lines = [f"  {item}" for item in items[:_SHOWN_PROBLEMS]]
    if len(items) > _SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(items) - _SHOWN_PROBLEMS} more (--json names all)")
    return lines

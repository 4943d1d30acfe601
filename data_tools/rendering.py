"""The commands' results as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.extend import ExtendSummary
from data_tools.index import IndexSummary
from data_tools.rearrange import SplitSummary
from data_tools.shard import ShardSummary, WorkSummary
from data_tools.stats import DatasetStats, Spread
from fqgan_dist.sharding.labels import describe_classes
from fqgan_dist.sharding.verification import VerifyReport
from fqgan_dist.terminal import Lines, join_lines

_SHOWN_PROBLEMS = 20


def render_shard(summary: ShardSummary) -> Lines:
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
            f"{summary.destination}: {size} ({summary.work.num_built} written, "
            f"{summary.work.num_kept} from an earlier run)"
        )
    classes = describe_classes(summary.classes)
    return join_lines([state, classes, *_render_work(summary.dataset_id, summary.work)])


def render_split(summary: SplitSummary) -> Lines:
    """Say what `split` did, part by part."""
    lines = [line for part in summary.parts.values() for line in render_shard(part).split("\n")]
    return join_lines(lines)


def render_extend(summary: ExtendSummary) -> Lines:
    """Say what `extend` did."""
    size = f"{summary.num_samples} images in {summary.num_shards} shards"
    present = f"{summary.num_present} of the source it had already"
    if summary.dataset_id is None:
        state = f"dry run: {summary.destination} would get {summary.num_added} images ({present})"
    elif summary.was_complete:
        state = f"{summary.destination} has all images already ({size}); nothing was done"
    else:
        state = (
            f"{summary.destination}: {summary.num_added} images added, {present}; now {size} "
            f"({summary.work.num_built} written)"
        )
    lines = [state]
    if summary.added_classes:
        lines.append(f"{len(summary.added_classes)} new classes:")
        lines += _indent(list(summary.added_classes))
    return join_lines([*lines, *_render_work(summary.dataset_id, summary.work)])


def _render_work(dataset_id: str | None, work: WorkSummary) -> list[str]:
    lines = []
    if work.num_images:
        lines.append(
            f"{work.num_images} images read ({work.bytes_read / 2**20:.1f} MiB), "
            f"{work.bytes_written / 2**20:.1f} MiB written in {work.seconds:.1f} s, "
            f"{work.images_per_s:g} images/s"
        )
    if dataset_id is not None:
        lines.append(f"dataset id {dataset_id}")
    if work.num_problems:
        where = f" ({', '.join(work.problem_tables)})" if work.problem_tables else ""
        lines.append(f"{work.num_problems} members of the source are not in the dataset{where}:")
    lines += _indent(
        [f"{item['name']}: {item['action']}: {item['reason']}" for item in work.problems],
        total=work.num_problems,
    )
    return lines


def render_index(summary: IndexSummary) -> Lines:
    """Say what `index` did."""
    size = (
        f"{summary.num_samples} images of {summary.num_classes} classes in "
        f"{summary.num_shards} shards"
    )
    done = "had this index already; nothing was done" if summary.was_complete else "has an index"
    lines = [f"{summary.source} {done}: {size}", f"dataset id {summary.dataset_id}"]
    if summary.num_problems:
        lines.append(f"{summary.num_problems} members of the shards are not in the dataset:")
    problems = [f"{item['name']}: {item['action']}: {item['reason']}" for item in summary.problems]
    return join_lines(lines + _indent(problems, total=summary.num_problems))


def render_verify(report: VerifyReport) -> Lines:
    """Say what `verify` found; every damage is named."""
    damages = [f"  {damage.where}: {damage.reason}" for damage in report.damages]
    lines = [f"{len(damages)} damaged:", *damages] if damages else []
    if report.unlisted_files:
        lines.append(f"{len(report.unlisted_files)} files that the index does not name:")
        lines += _indent(report.unlisted_files)
    if report.num_duplicates:
        lines.append(f"{report.num_duplicates} images have the very bytes of another one:")
        lines += _indent([" = ".join(names) for names in report.duplicates])
    decoded = f", {report.num_decoded} images decoded" if report.num_decoded else ""
    verdict = "damaged" if damages else "whole"
    lines.append(
        f"{verdict}: {report.num_shards} shards checked, {report.num_samples} images{decoded}; "
        f"dataset id {report.dataset_id or 'not known'}"
    )
    return join_lines(lines)


def render_stats(stats: DatasetStats) -> Lines:
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
    return join_lines(f"{name:<{width}}  {value}" for name, value in rows.items())


def _format(spread: Spread) -> str:
    return f"{spread.minimum:g} to {spread.maximum:g}, median {spread.median:g}"


def _indent(items: Sequence[str], *, total: int | None = None) -> list[str]:
    """Show the first items of `total`, by default of what is given."""
    lines = [f"  {item}" for item in items[:_SHOWN_PROBLEMS]]
    rest = (len(items) if total is None else total) - len(lines)
    if rest > 0:
        lines.append(f"  ... and {rest} more")
    return lines

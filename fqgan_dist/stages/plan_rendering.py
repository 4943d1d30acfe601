"""A plan as text for people."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fqgan_dist.stages.model_states import name_engine
from fqgan_dist.telemetry.progress import render_text
from fqgan_dist.terminal import Lines, printable

_WIDTH = 100


def render_plan(plan: dict[str, Any]) -> Lines:
    """Render what `fqgan_dist.stages.plan.plan_run` returned as plain text tables."""
    return render_text(
        _run_table(plan),
        *(_stage_table(stage, plan[stage]) for stage in plan["stages"] if stage in plan),
        *(Text(printable(f"- {note}")) for note in plan["notes"]),
        width=_WIDTH,
    )


def _run_table(plan: dict[str, Any]) -> Table:
    table = _table(f"run {plan['name']}")
    dataset, stored, placement = plan["dataset"], plan["stored"], plan["placement"]
    _add(table, "storage root", plan["storage_root"])
    _add(table, "stages", ", ".join(plan["stages"]))
    _add(table, "placement", f"{placement['execution']}: {placement['description']}")
    _add(table, "device", placement["device"])
    _add_processes(table, placement)
    images = f"{dataset['training_images']:,} ({dataset['known_from']})"
    _add(table, "training images", images)
    features = "none"
    if stored["features_bytes"]:
        features = f"{_size(stored['features_bytes'])} for {stored['feature_views']} views"
    _add(table, "stored teacher features", features)
    _add(
        table, "stored codes", f"{_size(stored['codes_bytes'])} for {stored['code_crops']} crop(s)"
    )
    return table


def _stage_table(stage: str, plan: dict[str, Any]) -> Table:
    table = _table(stage)
    for name, count in plan["parameters"].items():
        _add(table, f"parameters: {name.replace('_', ' ')}", f"{count:,}")
    training, memory = plan["training"], plan["memory"]
    _add(
        table,
        "images per step",
        f"{training['global_batch_size']} = {training['micro_batches_per_step']} micro-batch(es) "
        f"of {training['micro_batch_size']}; at most {training['largest_world_size']} ranks",
    )
    _add(table, "ranks", _describe_ranks(training))
    _add(
        table,
        "steps",
        f"{training['steps']:,}, {training['images_seen']:,} images "
        f"= {training['epochs_of_imagenet']} epochs of ImageNet's 1,281,167",
    )
    _add(table, "memory per GPU", _size(memory["per_gpu_bytes"]))
    engine = memory["engine"]
    title = f"  states, {name_engine(engine['zero_stage'])} x{engine['ranks']}"
    _add(table, title, _states(memory["states_bytes"]))
    for name, size in memory["saved_activations_bytes"].items():
        title = f"  saved activations, {name.replace('_', ' ')}"
        _add(
            table,
            title,
            f"{_size(size)}, {training['images_per_pass']} image(s), {training['precision']}",
        )
    if memory["frozen_bytes"]:
        _add(table, "  frozen networks", _size(memory["frozen_bytes"]))
    others = memory["other_engines"]
    _add(
        table,
        f"states of other engines x{others['ranks']}",
        ", ".join(f"{name} {_size(size)}" for name, size in others["states_bytes"].items()),
    )
    checkpoints = f"{_size(memory['checkpoint_bytes'])} each, {training['checkpoints']:,} in all"
    _add(table, "checkpoints", checkpoints)
    return table


def _add_processes(table: Table, placement: dict[str, Any]) -> None:
    workers = placement.get("train_workers")
    if workers:
        sizes = [size for each in workers["valid_sizes"].values() for size in each]
        least, most = min(sizes, default=workers["count"]), workers["count"]
        count = f"{most}" if least == most else f"{least} to {most}"
        _add(
            table,
            "train workers",
            f"{count} with {_resources(workers)} each, {workers['strategy']}; up to "
            f"{workers['max_failures']} restart(s)",
        )
    for stage, pool in placement.get("pools", {}).items():
        first, last = pool["min_actors"], pool["max_actors"]
        count = f"{first}" if first == last else f"{first} to {last}"
        _add(table, f"pool of {stage}", f"{count} with {_resources(pool)} each")
    if "most_at_a_time" in placement:
        most = placement["most_at_a_time"]
        _add(table, "most at a time", f"{most['gpus']:g} GPU, {most['cpus']:g} CPU")


def _resources(process: dict[str, Any]) -> str:
    named = {"GPU": process["gpus_each"], "CPU": process["cpus_each"], **process["custom_each"]}
    return (
        ", ".join(f"{amount:g} {name}" for name, amount in named.items() if amount) or "no resource"
    )


def _describe_ranks(training: dict[str, Any]) -> str:
    ranks, size = training["ranks"], training["ranks_per_micro_batch"]
    shared = f", {size} to a micro-batch" if size > 1 else ""
    idle = training["idle_passes_per_step"]
    return (
        f"{ranks}{shared}: {training['passes_per_step']} pass(es) of "
        f"{training['images_per_pass']} image(s) each per step"
        + (f"; {idle} pass(es) of all are idle" if idle else "")
    )


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(Text(printable(title)), no_wrap=True)
    table.add_column("")
    return table


def _add(table: Table, name: str, value: str) -> None:
    # Text, not str: rich would read [brackets] as markup.
    table.add_row(Text(printable(name)), Text(printable(value)))


def _states(sizes: dict[str, int]) -> str:
    parts = ", ".join(
        f"{name.replace('_', ' ')} {_size(size)}"
        for name, size in sizes.items()
        if size and name != "total"
    )
    return f"{_size(sizes['total'])}: {parts}"


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:,.2f} MiB"
    )

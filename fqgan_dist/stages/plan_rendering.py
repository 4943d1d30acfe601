"""A plan as text for people."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 100


def render_plan(plan: dict[str, Any]) -> str:
    """Render what `fqgan_dist.stages.plan.plan_run` returned as plain text tables."""
    output = io.StringIO()
    console = Console(file=output, width=_WIDTH, color_system=None)
    console.print(_run_table(plan))
    for stage in ("tokenizer", "autoregressive"):
        console.print(_stage_table(stage, plan[stage]))
    for note in plan["notes"]:
        console.print(Text(f"- {note}"))
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip("\n")


def _run_table(plan: dict[str, Any]) -> Table:
    table = _table(f"run {plan['name']}")
    dataset, stored, placement = plan["dataset"], plan["stored"], plan["placement"]
    _add(table, "storage root", plan["storage_root"])
    _add(table, "stages", ", ".join(plan["stages"]))
    _add(table, "placement", f"{placement['execution']}: {placement['description']}")
    _add(table, "device", placement["device"])
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
        f"of {training['micro_batch_size']}; at most {training['largest_world_size']} rank(s)",
    )
    _add(
        table,
        "steps",
        f"{training['steps']:,}, {training['images_seen']:,} images "
        f"= {training['epochs_of_imagenet']} epochs of ImageNet's 1,281,167",
    )
    _add(table, "memory per GPU, plain/DDP", _states(memory["plain_bytes"]))
    if memory["zero1_ranks"] > 1:
        title = f"memory per GPU, ZeRO-1 x{memory['zero1_ranks']}"
        _add(table, title, _states(memory["zero1_bytes"]))
    for name, size in memory["saved_activations_bytes"].items():
        title = f"saved activations, {name.replace('_', ' ')}"
        _add(table, title, f"{_size(size)} per micro-batch, {training['precision']}")
    if memory["frozen_bytes"]:
        _add(table, "frozen networks", _size(memory["frozen_bytes"]))
    checkpoints = f"{_size(memory['checkpoint_bytes'])} each, {training['checkpoints']:,} in all"
    _add(table, "checkpoints", checkpoints)
    return table


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(Text(title), no_wrap=True)
    table.add_column("")
    return table


def _add(table: Table, name: str, value: str) -> None:
    # Text, not str: rich would read [brackets] as markup.
    table.add_row(Text(name), Text(value))


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

"""What test_restore_layouts.py looks at, for one world size.

    torchrun --nproc-per-node=N tests/distributed/restore_layouts_worker.py FOLDER

World size 1 comes first: it writes the reference. The others load it, and what the world before
saved, in each engine, and save what they loaded.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from engine_deepspeed_worker import COMPARISONS, START, Comparison, engines, save
from support.counted_reads import CountedReads, count_reads
from support.tensor_digests import digest_tensors
from torch import Tensor

from fqgan_dist.storage.storage import Storage
from fqgan_dist.training import checkpoint_files
from fqgan_dist.training.checkpoint import CheckpointStore, Fragment, LoadedCheckpoint
from fqgan_dist.training.checkpoint_format import FileRecord, Needs, Span, checkpoint_folder
from fqgan_dist.training.checkpoint_reading import DamagedCheckpointError, find_blocks
from fqgan_dist.training.task import Parts
from fqgan_dist.world import World

BLOCK_BYTES = 128
"""Small, as the networks are."""
FILE_BYTES = 20_000
FOUR_RANKS = "autoregressive.training.micro_batch_size=3"
"""Four micro-batches, where the comparison of engines has three; nothing is trained here."""


def restore(task: Any, folder: Path, name: str, world: World) -> dict[str, int]:
    """Restore as the trainer does; tell what was read, and what the rank needed."""
    storage, counted = count_reads(folder)

    def read(loaded: LoadedCheckpoint) -> tuple[LoadedCheckpoint, Parts]:
        return loaded, loaded.read_parts(task.needed_state())

    found = CheckpointStore(storage, name).read_newest(read, world=world)
    assert found is not None
    loaded, parts = found
    task.load_state_dict(parts)
    return describe_reads(loaded, counted, task.state_dict())


def describe_reads(loaded: LoadedCheckpoint, counted: CountedReads, own: Parts) -> dict[str, int]:
    """Compare what was read with whole weights and averages, and the moments that are the rank's.

    These are what it saves itself; without partitions, all.
    """
    needed = optimizer_needed = 0
    for file in loaded.manifest.files:
        shares = dict[str, Span]()
        for name, record in file.tensors.items():
            here = Span(record.start or 0, record.count)
            is_moment = file.part.endswith("_optimizer")
            shares[name] = cut_own(own[file.part], name, here) if is_moment else here
        assert file.blocks is not None
        sizes = [block_size(file, number) for number in find_blocks(file, shares)]
        needed += sum(sizes)
        optimizer_needed += sum(sizes) if file.part.endswith("_optimizer") else 0
    optimizer = [file for file in loaded.manifest.files if file.part.endswith("_optimizer")]
    return {
        "read": counted.num_bytes(),
        "reported": loaded.bytes_read,
        "twice": count_overlap(counted),
        "needed": needed,
        "all": sum(file.bytes for file in loaded.manifest.files),
        "optimizer": sum(length for uri, _, length in counted.reads if "_optimizer.rank-" in uri),
        "optimizer_needed": optimizer_needed,
        "optimizer_all": sum(file.bytes for file in optimizer),
    }


def count_overlap(counted: CountedReads) -> int:
    """Count the bytes that were read more than once."""
    overlap, end_of = 0, dict[str, int]()
    for uri, start, length in sorted(counted.reads):
        if uri.endswith(".safetensors"):
            end = end_of.get(uri, 0)
            overlap += max(0, min(end, start + length) - start)
            end_of[uri] = max(end, start + length)
    return overlap


def block_size(file: FileRecord, number: int) -> int:
    assert file.blocks is not None
    return min(file.bytes, (number + 1) * file.blocks.bytes) - number * file.blocks.bytes


def cut_own(own: Mapping[str, Tensor | Fragment], name: str, here: Span) -> Span:
    """Give what a rank has of a tensor of the optimizer's state, of the elements in a file."""
    if not own:  # nothing is partitioned, and the main rank saves for all
        return here
    parameter, _, key = name.rpartition(".")
    if key == "step":  # of what it has anything of
        return here if f"{parameter}.exp_avg" in own else Span(0, 0)
    value = own.get(name)
    if value is None:
        return Span(0, 0)
    if isinstance(value, Tensor):
        return here
    first = max(here.start, value.start)
    last = min(here.start + here.count, value.start + len(value.tensor))
    return Span(first, max(0, last - first))


def run_layout(
    comparison: Comparison, engine: str, world: World, folder: Path
) -> dict[str, dict[str, int]]:
    """Load the reference, and what another world saved in pieces; save what was loaded."""
    sources = [f"{comparison.name}-reference"]
    if world.world_size > 1:
        sources.append(f"{comparison.name}-zero1-world-{world.world_size - 1}")
    reads: dict[str, dict[str, int]] = {}
    for source in sources:
        task = comparison.new_task(world, engine, FOUR_RANKS)
        reads[source] = restore(task, folder, source, world)
        target = f"{comparison.name}-{engine}-world-{world.world_size}"
        is_reference = source.endswith("-reference")
        save(task, Storage(folder), target if is_reference else f"{target}-again", world)
    return reads


def agree_on_damage(comparison: Comparison, world: World, folder: Path) -> dict[str, Any]:
    """Damage, in the newest of two checkpoints, what but the last rank needs."""
    name = "damaged"
    task = comparison.new_task(world, "zero1")
    restore(task, folder, f"{comparison.name}-reference", world)
    if world.is_main:
        with CheckpointStore(Storage(folder), name).begin_attempt() as attempt:
            source = comparison.new_task(World(), "plain")
            for step in (1, 2):
                attempt.save(
                    step,
                    tensors=source.state_dict(),
                    state={},
                    metrics={},
                    config={},
                    dataset_id="none",
                )
    dist.barrier()
    store = CheckpointStore(Storage(folder), name)
    needs = task.needed_state()
    newest = store.list_commits()[-1]
    if world.rank == world.world_size - 1:
        damage_own(store.load(newest.number), needs, folder / name)
    dist.barrier()
    try:
        store.load(newest.number).read_parts(needs)
        is_good = True
    except DamagedCheckpointError:
        is_good = False

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("fqgan_dist.training.checkpoint").addHandler(handler)
    found = store.read_newest(lambda loaded: (loaded.step, loaded.read_parts(needs)), world=world)
    assert found is not None
    return {"is_good_here": is_good, "step": found[0], "log": records}


def damage_own(loaded: LoadedCheckpoint, needs: Mapping[str, Needs], root: Path) -> None:
    """Flip a bit of the last moment that this rank needs."""
    part = next(part for part in needs if part.endswith("_optimizer"))
    spans = {name: span for name, span in needs[part].items() if span is not None and span.count}
    name, span = list(spans.items())[-1]
    for file in loaded.manifest.files:
        record = file.tensors.get(name)
        if file.part == part and record is not None:
            assert record.offset is not None
            path = root / checkpoint_folder(loaded.step, loaded.manifest.attempt) / file.file
            data = bytearray(path.read_bytes())
            data[record.offset + 4 * (span.start + span.count) - 1] ^= 1
            path.write_bytes(data)


def write_reference(comparison: Comparison, world: World, folder: Path) -> None:
    """Train a few steps in one plain process; save the state, and its digest by no reader."""
    source = comparison.new_task(world, "plain")
    comparison.run(source, range(1, START + 1))
    save(source, Storage(folder), f"{comparison.name}-reference", world)
    digests = {part: digest_tensors(tensors) for part, tensors in source.state_dict().items()}
    (folder / f"{comparison.name}-digests.json").write_text(json.dumps(digests))


def main() -> None:
    dist.init_process_group("gloo")
    folder, world = Path(sys.argv[1]), World.from_environment()
    checkpoint_files._BLOCK_BYTES = BLOCK_BYTES
    checkpoint_files._MAX_FILE_BYTES = FILE_BYTES
    results: dict[str, Any] = {}
    for comparison in COMPARISONS:
        if world.world_size == 1:
            write_reference(comparison, world, folder)
        for engine in engines(comparison):
            results[f"{comparison.name}-{engine}"] = run_layout(comparison, engine, world, folder)
    if world.world_size == 3:
        results["damage"] = agree_on_damage(COMPARISONS[1], world, folder)
    path = folder / f"world-{world.world_size}-rank-{world.rank}.json"
    path.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

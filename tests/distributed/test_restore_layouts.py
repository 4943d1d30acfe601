"""Any engine at any world size restores one checkpoint to the bit, and reads no more than it needs.

Real DeepSpeed with gloo under torchrun, at 1 to 4 ranks, ZeRO 0 to 2 for the tokenizer and 0 to 3
for the generator, beside the plain engine. What is run is in restore_layouts_worker.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.distributed import finish, start_torchrun
from support.tensor_digests import digest_tensors

from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore, LoadedCheckpoint

WORKER = Path(__file__).with_name("restore_layouts_worker.py")
WORLD_SIZES = (1, 2, 3, 4)
ENGINES = {
    "tokenizer": ("plain", "zero0", "zero1", "zero2"),
    "autoregressive": ("plain", "zero0", "zero1", "zero2", "zero3"),
}
CASES = [
    pytest.param(task, engine, size, id=f"{task}-{engine}-{size}")
    for task, engines in ENGINES.items()
    for engine in engines
    for size in WORLD_SIZES
]

pytestmark = pytest.mark.full("every layout at 1 to 4 ranks; one restores another's in unit tests")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts")
    for size in WORLD_SIZES:  # each loads what the one before saved
        finish(start_torchrun(WORKER, str(path), world_size=size), timeout_s=500)
    return path


def results(folder: Path, world_size: int) -> list[dict[str, Any]]:
    return [
        json.loads((folder / f"world-{world_size}-rank-{rank}.json").read_text())
        for rank in range(world_size)
    ]


def load(folder: Path, name: str) -> LoadedCheckpoint:
    loaded = CheckpointStore(Storage(folder), name).load_latest()
    assert loaded is not None
    return loaded


@pytest.mark.parametrize(("task", "engine", "world_size"), CASES)
def test_what_is_loaded_is_saved_with_the_same_digest(
    folder: Path, task: str, engine: str, world_size: int
) -> None:
    expected = json.loads((folder / f"{task}-digests.json").read_text())
    names = [f"{task}-{engine}-world-{world_size}"]
    names += [f"{names[0]}-again"] if world_size > 1 else []
    for name in names:
        loaded = load(folder, name)
        assert loaded.manifest.world_size == world_size
        assert {
            part: digest_tensors(loaded.read(part)) for part in loaded.manifest.parts
        } == expected


@pytest.mark.parametrize(("task", "engine", "world_size"), CASES)
def test_a_rank_reads_what_it_needs_at_most_once(
    folder: Path, task: str, engine: str, world_size: int
) -> None:
    for ranks in results(folder, world_size):
        for reads in ranks[f"{task}-{engine}"].values():
            assert reads["twice"] == 0
            assert 0 < reads["read"] <= reads["needed"]
            assert reads["reported"] == reads["read"]
            assert 0 < reads["optimizer"] <= reads["optimizer_needed"]


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_with_partitions_a_rank_reads_its_part_of_the_moments(folder: Path, engine: str) -> None:
    """As many ranks as there are share them; the blocks at the edges of pieces come on top."""
    for size in WORLD_SIZES:
        reads = [rank[f"autoregressive-{engine}"] for rank in results(folder, size)]
        ranks = [each["autoregressive-reference"] for each in reads]
        for rank in ranks:
            assert rank["optimizer"] < 1.5 * rank["optimizer_all"] / size


@pytest.mark.parametrize(
    ("task", "world_sizes"), [("tokenizer", (2, 3, 4)), ("autoregressive", (3,))]
)
def test_sizes_that_do_not_divide_are_among_them(
    folder: Path, task: str, world_sizes: tuple[int, ...]
) -> None:
    shapes = load(folder, f"{task}-reference").tensor_shapes(task)
    sizes = [math.prod(shape) for shape in shapes.values()]
    for world_size in world_sizes:
        assert any(size % world_size for size in sizes)


def test_all_ranks_step_past_damage_that_one_has_found(folder: Path) -> None:
    found = [rank["damage"] for rank in results(folder, 3)]
    assert [rank["is_good_here"] for rank in found] == [True, True, False]
    assert [rank["step"] for rank in found] == [1, 1, 1]
    (line,) = found[0]["log"]
    assert "stepping over the damaged checkpoint of step 2" in line
    assert "autoregressive_optimizer.rank-00000" in line
    assert found[1]["log"] == found[2]["log"] == []

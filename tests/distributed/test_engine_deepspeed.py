"""DeepSpeed trains as the plain engine does, and either loads what the other saved.

Real DeepSpeed with gloo, under torchrun and as train workers of Ray, at 1, 2 and 3 ranks, ZeRO 0 to
2 for the tokenizer and 0 to 3 for the generator. What is run is in engine_deepspeed_worker.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.distributed import finish, start_python, start_torchrun
from torch import Tensor

from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore

WORKER = Path(__file__).with_name("engine_deepspeed_worker.py")
WORLD_SIZES = (1, 2, 3)
ENGINES = {
    "tokenizer": ("zero0", "zero1", "zero2"),
    "autoregressive": ("zero0", "zero1", "zero2", "zero3"),
}
CASES = [
    pytest.param(task, engine, size, id=f"{task}-{engine}-{size}")
    for task, engines in ENGINES.items()
    for engine in engines
    for size in WORLD_SIZES
]


LAUNCHERS = (
    pytest.param(
        "ray", marks=[pytest.mark.ray, pytest.mark.full("every ZeRO stage at 1 to 3 ranks")]
    ),
    # The same processes, without Ray.
    pytest.param("torchrun", marks=pytest.mark.full("every ZeRO stage at 1 to 3 ranks")),
)


@pytest.fixture(scope="module", params=LAUNCHERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines")
    if request.param == "ray":
        finish(start_python(WORKER.with_name("engines_on_ray.py"), str(path)), timeout_s=500)
        return path
    finish(start_torchrun(WORKER, str(path), world_size=1))
    processes = [start_torchrun(WORKER, str(path), world_size=size) for size in WORLD_SIZES[1:]]
    for process in processes:
        finish(process, timeout_s=500)
    return path


def results(folder: Path, task: str, engine: str, world_size: int) -> dict[str, Tensor]:
    return load_file(folder / f"{task}-{engine}-world-{world_size}.safetensors")


def distances(
    found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str
) -> dict[str, float]:
    """Relative to the whole vector: single gradients that cancel to zero are noise in any order."""
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    assert names == [name for name in found if name.startswith(prefix)]
    return {
        name: float((found[name].double() - expected[name].double()).norm())
        / float(expected[name].double().norm())
        for name in names
    }


def checkpoint(folder: Path, name: str) -> dict[str, dict[str, Tensor]]:
    loaded = CheckpointStore(Storage(folder), name).load_latest()
    assert loaded is not None
    return {part: loaded.read(part) for part in loaded.manifest.parts}


@pytest.mark.parametrize(("task", "engine", "world_size"), CASES)
def test_one_step_is_the_plain_engine_s(
    folder: Path, task: str, engine: str, world_size: int
) -> None:
    """Weights, their average, the discriminator's weights and both gradient norms, with clipping.

    Seen: at most 4e-9 for weights, 8e-8 for norms.
    """
    found = results(folder, task, engine, world_size)
    expected = results(folder, task, "plain", world_size)
    assert max(distances(found, expected, "one/").values()) < 1e-6


@pytest.mark.parametrize(("task", "engine", "world_size"), CASES)
def test_several_steps_with_an_evaluation_between_are_the_plain_engine_s(
    folder: Path, task: str, engine: str, world_size: int
) -> None:
    found = results(folder, task, engine, world_size)
    expected = results(folder, task, "plain", world_size)
    assert max(distances(found, expected, "several/").values()) < 1e-6


@pytest.mark.parametrize(("task", "engine", "world_size"), CASES)
def test_gradients_are_summed_over_ranks_not_averaged(
    folder: Path, task: str, engine: str, world_size: int
) -> None:
    """Compared with one process: what was before clipping, and the norm. Seen: at most 9e-8."""
    found = results(folder, task, engine, world_size)
    expected = results(folder, task, "plain", 1)
    assert max(distances(found, expected, "unclipped/").values()) < 1e-6


@pytest.mark.parametrize(("task", "engine", "world_size"), CASES)
def test_what_was_loaded_is_saved_again_to_the_bit(
    folder: Path, task: str, engine: str, world_size: int
) -> None:
    """One plain process saved it; so any engine and world loads what any other saved."""
    start = checkpoint(folder, f"{task}-start")
    saved = checkpoint(folder, f"{task}-{engine}-world-{world_size}")
    assert saved.keys() == start.keys()
    for part, tensors in start.items():
        assert saved[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(saved[part][name], tensor), f"{part}: {name}"


@pytest.mark.parametrize(("task", "engine", "world_size"), CASES)
def test_training_continues_to_the_bit_from_a_loaded_state(
    folder: Path, task: str, engine: str, world_size: int
) -> None:
    found = results(folder, task, engine, world_size)
    names = [name.removeprefix("several/") for name in found if name.startswith("several/")]
    assert names
    assert all(torch.equal(found[f"again/{name}"], found[f"several/{name}"]) for name in names)


@pytest.mark.parametrize("task", ENGINES)
def test_every_rank_saves_its_own_partitions(folder: Path, task: str) -> None:
    loaded = CheckpointStore(Storage(folder), f"{task}-zero1-world-3").load_latest()
    assert loaded is not None
    sizes = dict.fromkeys(range(3), 0)
    for file in loaded.manifest.files:
        if file.part == f"{task}_optimizer":
            sizes[int(file.file.split("rank-")[1][:5])] += file.bytes
    assert min(sizes.values()) > 0.8 * max(sizes.values()), sizes

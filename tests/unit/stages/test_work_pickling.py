"""Work on its way to another process: what travels, what does not, what must be the same there."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from threading import Barrier

import pytest
import torch
from support.pool_work import FileWork, open_context

from fqgan_dist.chunks import ProcessLocalCaches, find_pending
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.stages.network_ids import NetworkIds
from fqgan_dist.stages.stage import RunContext


def test_context_takes_the_device_of_the_process_that_unpickles_it(tmp_path: Path) -> None:
    context = open_context(tmp_path)
    elsewhere = RunContext(
        config=context.config,
        storage=context.storage,
        world=context.world,
        device=torch.device("meta"),
    )
    copy = pickle.loads(pickle.dumps(elsewhere))
    assert copy == context
    assert copy.device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_context_that_asks_for_a_gpu_is_refused_where_there_is_none(tmp_path: Path) -> None:
    context = open_context(tmp_path)
    config = context.config.model_copy(update={"device": "cuda"})
    data = pickle.dumps(
        RunContext(
            config=config, storage=context.storage, world=context.world, device=context.device
        )
    )
    with pytest.raises(ConfigError, match=r"torch sees no GPU in this process.*ray\.pools"):
        pickle.loads(data)


class Networks(ProcessLocalCaches):
    def __init__(self) -> None:
        self.name = "networks"

    @functools.cached_property
    def network(self) -> object:
        return object()


def test_what_was_loaded_stays_in_its_process() -> None:
    networks = Networks()
    loaded = networks.network
    copy = pickle.loads(pickle.dumps(networks))
    assert copy.__dict__ == {"name": "networks"}
    assert networks.network is loaded


def test_same_network_is_confirmed_in_another_process() -> None:
    ids = NetworkIds()
    ids.confirm("Inception", "id-a")
    pickle.loads(pickle.dumps(ids)).confirm("Inception", "id-a")


def test_other_network_in_another_process_is_refused() -> None:
    ids = NetworkIds()
    ids.confirm("Inception", "id-a")
    copy = pickle.loads(pickle.dumps(ids))
    with pytest.raises(DataError, match="Inception: the network loaded on this node is 'id-b'"):
        copy.confirm("Inception", "id-b")


def test_pending_chunks_are_those_without_output_in_order(tmp_path: Path) -> None:
    work = FileWork(tmp_path, 100)
    for chunk in (0, 7, 99):
        work.context.storage.write_bytes(f"files/{chunk}", b"")
    assert find_pending(work) == [chunk for chunk in range(100) if chunk not in (0, 7, 99)]


class SlowStorageWork(FileWork):
    """Answers only when several ask at once."""

    barrier = Barrier(4, timeout=30)

    def is_done(self, chunk: int) -> bool:
        self.barrier.wait()
        return False


def test_storage_is_asked_for_many_chunks_at_once(tmp_path: Path) -> None:
    assert find_pending(SlowStorageWork(tmp_path, 8)) == list(range(8))

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.datasets import build_photographs
from support.stage_records import save_stage

from fqgan_dist.config import load_config
from fqgan_dist.data.index import DatasetIndex
from fqgan_dist.errors import DataError
from fqgan_dist.stages.autoregressive import AutoregressiveStage
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.tokenizer import TokenizerStage
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, DatasetIndex]:
    storage = Storage(tmp_path_factory.mktemp("run"))
    index = build_photographs(storage.child("data/photographs/train"), crops=1)
    return storage, index


def open_context(storage: Storage, dataset_id: str) -> RunContext:
    """Open a run whose shards stage made the dataset of this id."""
    config = load_config(TINY, [f"storage.root={storage.root}"], RunConfig)
    context = RunContext(config=config, storage=storage, world=World(), device=torch.device("cpu"))
    save_stage(context, "shards", {"train": dataset_id, "val": dataset_id})
    save_stage(context, "teachers", {"fingerprint": ""})
    save_stage(context, "codes", {"train": "c" * 64, "val": "c" * 64})
    return context


@pytest.mark.parametrize("stage", [TokenizerStage, AutoregressiveStage])
def test_training_loads_the_dataset_of_its_run_or_none(
    dataset: tuple[Storage, DatasetIndex],
    stage: type[TokenizerStage | AutoregressiveStage],
) -> None:
    storage, index = dataset
    assert (
        stage(open_context(storage, index.dataset_id)).build_loader().dataset_id == index.dataset_id
    )
    former = "0" * 64
    with pytest.raises(DataError, match=f"expected {former[:16]}, which this run was started on"):
        stage(open_context(storage, former)).build_loader()

"""Small real datasets: crops of the bundled photographs, sharded by the project's own tool."""

from __future__ import annotations

from fqgan_dist.data.index import DatasetIndex
from fqgan_dist.sharding.building import build_dataset
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.plan import ShardingConfig
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage


def build_photographs(
    folder: Storage, *, crops: int = 2, samples_per_shard: int = 7
) -> DatasetIndex:
    """Write a dataset of `crops` training crops of each photograph, 20 pixels wide."""
    photographs = PhotographsConfig(image_size=16, crops_per_photograph=crops)
    config = ShardingConfig(name="photographs", split="train", samples_per_shard=samples_per_shard)
    with open_source("builtin:photographs", photographs=photographs) as source:
        index, _ = build_dataset(source, folder, config)
    return index

"""Run engine_deepspeed_worker.py as train workers of Ray, at 1, 2 and 3 of them.

python tests/distributed/engines_on_ray.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import engine_deepspeed_worker

from fqgan_dist.orchestration.authentication import require_token
from fqgan_dist.orchestration.config import RayConfig, TrainWorkersConfig
from fqgan_dist.world import World

WORLD_SIZES = (1, 2, 3)


def train(arguments: dict[str, Any]) -> None:
    engine_deepspeed_worker.run_comparisons(World.from_environment(), Path(arguments["folder"]))


def main() -> None:
    require_token()  # ray reads it when it is imported
    from ray import cloudpickle

    from fqgan_dist.orchestration.cluster import connected_cluster
    from fqgan_dist.orchestration.train_launch import run_workers

    # The workers of Ray know the project, not its tests.
    cloudpickle.register_pickle_by_value(engine_deepspeed_worker)
    with connected_cluster(RayConfig(local_cpus=max(WORLD_SIZES))):
        for size in WORLD_SIZES:
            workers = TrainWorkersConfig(num_workers=size)
            run_workers(train, {"folder": sys.argv[1]}, workers, name=f"engines-{size}")


if __name__ == "__main__":
    main()

"""Train a stage of which a step meets a number that is not finite.

    python tests/support/sick_runs.py STEP MICRO_BATCH argument of fqgan_dist.training.run ...

A loss of one micro-batch of that step is infinite: on the rank that has the micro-batch, and there
only, as it is when an image is sick.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fqgan_dist.stages import autoregressive_task
from fqgan_dist.stages.tokenizer_task import TokenizerTask
from fqgan_dist.training.run import main


def break_tokenizer(sick_step: int, sick_micro_batch: int) -> None:
    """Let a teacher feature be infinite."""
    train_step = TokenizerTask.train_step

    def break_and_train(self: Any, batches: Sequence[Any], step: int) -> dict[str, Tensor]:
        for batch in batches:
            if (step, batch.micro_batch) == (sick_step, sick_micro_batch):
                batch.features["clip"][0, 0] = math.inf
        return train_step(self, batches, step)

    TokenizerTask.train_step = break_and_train


def break_autoregressive(sick_step: int, sick_micro_batch: int) -> None:
    """Let a loss be infinite."""
    task = autoregressive_task.AutoregressiveTask
    train_step, losses_of = task.train_step, autoregressive_task.compute_code_losses
    factors: list[float] = []

    def compute_losses(*arguments: Any) -> Tensor:
        return losses_of(*arguments) * factors.pop(0)

    def break_and_train(self: Any, batches: Sequence[Any], step: int) -> dict[str, Tensor]:
        sick = (sick_step, sick_micro_batch)
        factors[:] = [math.inf if (step, each.micro_batch) == sick else 1.0 for each in batches]
        return train_step(self, batches, step)

    autoregressive_task.compute_code_losses = compute_losses
    task.train_step = break_and_train


BREAK: dict[str, Callable[[int, int], None]] = {
    "stage=tokenizer": break_tokenizer,
    "stage=autoregressive": break_autoregressive,
}

if __name__ == "__main__":
    stage = next(each for each in sys.argv if each.startswith("stage="))
    BREAK[stage](int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))

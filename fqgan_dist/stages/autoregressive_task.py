"""Training FAR: next-patch prediction with a factorized head (fqgan.md 2.4 and 2.8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fqgan_dist.autoregressive.config import AutoregressiveConfig
from fqgan_dist.autoregressive.losses import compute_code_losses
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.data.loader import CodeBatch
from fqgan_dist.stages.training_task import TrainingTask
from fqgan_dist.training.anomalies import Evidence
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.engine import Engine, accumulate
from fqgan_dist.training.step_layout import Slot

STAGE = "autoregressive"


class AutoregressiveTask(TrainingTask[FactorizedTransformer, CodeBatch]):
    """Implements `fqgan_dist.training.task.Task` for FAR."""

    def __init__(
        self,
        *,
        engine: Engine,
        training: TrainingConfig,
        codebook_names: Sequence[str],
        evaluate_fn: Callable[[FactorizedTransformer], dict[str, float]],
    ) -> None:
        super().__init__(
            STAGE,
            FactorizedTransformer,
            engine=engine,
            training=training,
            evaluate_fn=evaluate_fn,
        )
        self.codebook_names = list(codebook_names)

    @property
    def architecture(self) -> AutoregressiveConfig:
        return self.model.config

    def train_step(self, micro_batches: Sequence[CodeBatch], step: int) -> dict[str, Tensor]:
        self.model.train()
        device = self.engine.device
        lr = self._lr(step)

        def loss_fn(slot: Slot, batch: CodeBatch) -> tuple[Tensor, Tensor]:
            # Copies that block would make the host wait for the pass before.
            codes = batch.codes.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            with self._training_pass(step, slot):
                losses = compute_code_losses(self.engine.forward(codes, labels), codes)
            # The paper's loss is the mean over codebooks of token-mean cross-entropies.
            return losses.mean(), losses.detach()

        rows = accumulate(self.engine, micro_batches, loss_fn)
        norm = self.engine.step(lr=lr, losses=rows)
        terms = [f"autoregressive/loss/{name}" for name in self.codebook_names]
        self._evidence = [Evidence(terms, rows, "autoregressive/gradient_norm", norm)]
        self._update_average()
        per_codebook = rows.mean(dim=0)
        return {
            "autoregressive/loss/total": per_codebook.mean(),
            **{
                f"autoregressive/loss/{name}": value
                for name, value in zip(self.codebook_names, per_codebook, strict=True)
            },
            "autoregressive/gradient_norm": norm,
            "autoregressive/lr": torch.tensor(lr),
        }

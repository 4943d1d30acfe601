"""Training FAR: next-patch prediction with a factorized head (fqgan.md 2.4 and 2.8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fqgan_dist.autoregressive.config import AutoregressiveConfig
from fqgan_dist.autoregressive.losses import compute_code_losses
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.data.loader import CodeBatch
from fqgan_dist.loss_group import build_loss_group
from fqgan_dist.randomness import keyed_torch_rng
from fqgan_dist.training.autocast import autocast
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.ema import ExponentialMovingAverage
from fqgan_dist.training.engine import Engine, accumulate
from fqgan_dist.training.micro_batches import Slot, assign_slots
from fqgan_dist.training.schedule import compute_lr
from fqgan_dist.training.task import Parts

STAGE = "autoregressive"


class AutoregressiveTask:
    """Implements `fqgan_dist.training.task.Task` for FAR."""

    def __init__(
        self,
        *,
        engine: Engine,
        training: TrainingConfig,
        codebook_names: Sequence[str],
        evaluate_fn: Callable[[FactorizedTransformer], dict[str, float]],
    ) -> None:
        """Put the parts together.

        Args:
            engine: of a `FactorizedTransformer`.
            training: sizes, seed, precision.
            codebook_names: for metric names, in order.
            evaluate_fn: measures a model in evaluation mode on held-out codes.
        """
        self.engine = engine
        self.training = training
        self.codebook_names = list(codebook_names)
        self.evaluate_fn = evaluate_fn
        self.slots = assign_slots(
            training.micro_batches_per_step, engine.world, training.ranks_per_micro_batch
        )
        self.loss_group = build_loss_group(engine.world, training.ranks_per_micro_batch)
        self.ema = (
            ExponentialMovingAverage(engine.local_parameters(), training.ema_decay)
            if training.ema_decay
            else None
        )

    @property
    def model(self) -> FactorizedTransformer:
        """The model, not wrapped by the engine."""
        module = self.engine.module
        assert isinstance(module, FactorizedTransformer), f"engine of {type(module).__name__}"
        return module

    @property
    def architecture(self) -> AutoregressiveConfig:
        """Settings of the model."""
        return self.model.config

    def train_step(self, micro_batches: Sequence[CodeBatch], step: int) -> dict[str, Tensor]:
        """Run one step."""
        self.model.train()
        device = self.engine.device
        lr = compute_lr(self.training.schedule, step, self.training.steps)

        def loss_fn(slot: Slot, batch: CodeBatch) -> tuple[Tensor, Tensor]:
            # Copies that block would make the host wait for the pass before.
            codes = batch.codes.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            key = (self.training.seed, STAGE, step, slot.micro_batch)
            with (
                keyed_torch_rng(*key, device=device, loss_group=self.loss_group),
                autocast(self.training.precision, device),
            ):
                losses = compute_code_losses(self.engine.forward(codes, labels), codes)
            # The paper's loss is the mean over codebooks of token-mean cross-entropies.
            return losses.mean(), losses.detach()

        rows = accumulate(
            self.engine,
            self.slots,
            micro_batches,
            loss_fn,
            num_micro_batches=self.training.micro_batches_per_step,
            ranks_per_micro_batch=self.training.ranks_per_micro_batch,
        )
        norm = self.engine.step(lr=lr, losses=rows)
        if self.ema is not None:
            self.ema.update(self.engine.local_parameters())
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

    def raise_if_not_finite(self) -> None:
        """Raise if a step was refused."""
        self.engine.raise_if_not_finite()

    def evaluate(self, step: int) -> dict[str, float]:  # noqa: ARG002  part of the Task protocol
        """Measure the averaged weights if there are any, else the current ones."""
        averages = self.ema.state_dict() if self.ema is not None else None
        with self.engine.whole_weights(averages) as model:
            assert isinstance(model, FactorizedTransformer), f"engine of {type(model).__name__}"
            model.eval()
            try:
                return self.evaluate_fn(model)
            finally:
                model.train()

    def state_dict(self) -> Parts:
        """Return what this rank saves of the model, its optimizer and the averaged weights."""
        state = self.engine.state_dict()
        parts: Parts = {
            "autoregressive": state["weights"],
            "autoregressive_optimizer": state["optimizer"],
        }
        if self.ema is not None:
            parts["autoregressive_ema"] = self.engine.share(self.ema.state_dict())
        return parts

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what the `state_dict` of all ranks returned."""
        self.engine.load_state_dict(
            {"weights": parts["autoregressive"], "optimizer": parts["autoregressive_optimizer"]}
        )
        if self.ema is not None:
            self.ema.load_state_dict(self.engine.localize(parts["autoregressive_ema"]))

"""Training FQGAN: the tokenizer against its discriminator (fqgan.md 1.9 and 1.10).

One step runs all micro-batches through the tokenizer, moves it, then shows the same reconstructions
(made before the move) to the discriminator and moves that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from einops import rearrange
from torch import Tensor, nn

from fqgan_dist.data.decoding import to_float
from fqgan_dist.data.loader import ImageBatch
from fqgan_dist.loss_group import ALONE, LossGroup, build_loss_group
from fqgan_dist.randomness import keyed_torch_rng
from fqgan_dist.tokenizer.config import TokenizerConfig, TokenizerLossConfig
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.losses import (
    disentanglement_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    info_nce_loss,
)
from fqgan_dist.tokenizer.model import FactorizedTokenizer, TokenizerOutput
from fqgan_dist.tokenizer.usage import CodeUsageWindow
from fqgan_dist.training.autocast import autocast
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.ema import ExponentialMovingAverage
from fqgan_dist.training.engine import Engine, accumulate
from fqgan_dist.training.micro_batches import Slot, assign_slots, gather_in_order
from fqgan_dist.training.named_tensors import copy_named_tensors
from fqgan_dist.training.schedule import compute_lr
from fqgan_dist.training.task import Parts

STAGE = "tokenizer"
TeacherFeatures = Callable[[Tensor], dict[str, Tensor]]
"""Maps images (B, 3, H, W) in [-1, 1] to features (B, F) by teacher name."""


class DiscriminatorPasses(nn.Module):
    """The discriminator's own training pass: real and reconstructed images, one after the other."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(
        self, real: Tensor, fake: Tensor, loss_group: LossGroup = ALONE
    ) -> tuple[Tensor, Tensor]:
        """Return logits of both; separate passes, because BatchNorm sees its own pass only."""
        return self.discriminator(real, loss_group), self.discriminator(fake, loss_group)


class TokenizerTask:
    """Implements `fqgan_dist.training.task.Task` for FQGAN."""

    def __init__(
        self,
        *,
        engine: Engine,
        discriminator_engine: Engine,
        perceptual: nn.Module,
        teachers: TeacherFeatures | None,
        losses: TokenizerLossConfig,
        training: TrainingConfig,
        evaluate_fn: Callable[[FactorizedTokenizer], dict[str, float]],
    ) -> None:
        """Put the parts together.

        Args:
            engine: of a `FactorizedTokenizer`.
            discriminator_engine: of `DiscriminatorPasses`.
            perceptual: frozen LPIPS on the engine's device.
            teachers: computes features that the batches do not bring; None if all are stored.
            losses: weights.
            training: sizes, seed, precision.
            evaluate_fn: measures a tokenizer in evaluation mode on held-out images.
        """
        self.engine = engine
        self.discriminator_engine = discriminator_engine
        self.perceptual = perceptual
        self.teachers = teachers
        self.losses = losses
        self.training = training
        self.evaluate_fn = evaluate_fn
        self.slots = assign_slots(
            training.micro_batches_per_step, engine.world, training.ranks_per_micro_batch
        )
        self.loss_group = build_loss_group(engine.world, training.ranks_per_micro_batch)
        config = self.architecture
        self.usage = CodeUsageWindow(config.num_codebooks, config.codebook_size).to(engine.device)
        self.ema = (
            ExponentialMovingAverage(engine.local_parameters(), training.ema_decay)
            if training.ema_decay
            else None
        )
        self._metric_names: list[str] = []

    @property
    def tokenizer(self) -> FactorizedTokenizer:
        """The model, not wrapped by the engine."""
        module = self.engine.module
        assert isinstance(module, FactorizedTokenizer), f"engine of {type(module).__name__}"
        return module

    @property
    def discriminator(self) -> PatchDiscriminator:
        """The discriminator, not wrapped by the engine."""
        module = self.discriminator_engine.module
        assert isinstance(module, DiscriminatorPasses), f"engine of {type(module).__name__}"
        return module.discriminator

    @property
    def architecture(self) -> TokenizerConfig:
        """Settings of the tokenizer."""
        return self.tokenizer.config

    def train_step(self, micro_batches: Sequence[ImageBatch], step: int) -> dict[str, Tensor]:
        """Run one step of the tokenizer and, once it has started, one of the discriminator."""
        has_discriminator = step >= self.losses.discriminator_start_step
        if step == self.losses.discriminator_start_step:
            self.discriminator_engine.advance(step - 1)
        self.tokenizer.train()
        self.discriminator.train()
        lr = compute_lr(self.training.schedule, step, self.training.steps)
        reconstructions: list[Tensor] = []
        codes: list[Tensor] = []

        def tokenizer_loss(slot: Slot, batch: ImageBatch) -> tuple[Tensor, Tensor]:
            images = self._to_device(batch.images)
            with (
                self._randomness(step, slot),
                autocast(self.training.precision, self.engine.device),
            ):
                output: TokenizerOutput = self.engine.forward(
                    images,
                    compute_entropy=self.losses.entropy_weight > 0,
                    loss_group=self.loss_group,
                )
                terms = self._tokenizer_terms(images, output, batch, has_discriminator)
            reconstructions.append(output.reconstruction.detach())
            codes.append(output.codes.transpose(0, 1).flatten(1).to(torch.int32))
            total = terms["tokenizer/loss/total"]
            self._metric_names = list(terms)
            return total, torch.stack([term.detach().float() for term in terms.values()])

        with self.discriminator_engine.frozen():
            rows = self._accumulate(self.engine, micro_batches, tokenizer_loss)
        metrics = dict(zip(self._metric_names, rows.mean(dim=0), strict=True))
        metrics["tokenizer/gradient_norm"] = self.engine.step(lr=lr, losses=rows)
        self._fold_state(codes, has_discriminator)
        if has_discriminator:
            metrics |= self._discriminator_step(micro_batches, reconstructions, lr)
        for name, value in zip(self._codebook_names, self.usage.compute_usage(), strict=True):
            metrics[f"tokenizer/codebook_usage/{name}"] = value
        metrics["tokenizer/lr"] = torch.tensor(lr)
        return metrics

    def raise_if_not_finite(self) -> None:
        """Raise if a step of either model was refused."""
        self.engine.raise_if_not_finite()
        self.discriminator_engine.raise_if_not_finite()

    def evaluate(self, step: int) -> dict[str, float]:  # noqa: ARG002  part of the Task protocol
        """Measure the averaged weights if there are any, else the current ones."""
        averages = self.ema.state_dict() if self.ema is not None else None
        with self.engine.whole_weights(averages) as tokenizer:
            assert isinstance(tokenizer, FactorizedTokenizer), type(tokenizer).__name__
            tokenizer.eval()
            try:
                return self.evaluate_fn(tokenizer)
            finally:
                tokenizer.train()

    def state_dict(self) -> Parts:
        """Return what this rank saves of models, optimizers, averaged weights and usage window."""
        tokenizer = self.engine.state_dict()
        discriminator = self.discriminator_engine.state_dict()
        parts: Parts = {
            "tokenizer": tokenizer["weights"],
            "tokenizer_optimizer": tokenizer["optimizer"],
            "discriminator": discriminator["weights"],
            "discriminator_optimizer": discriminator["optimizer"],
            "usage": dict(self.usage.state_dict()) if self.engine.world.is_main else {},
        }
        if self.ema is not None:
            parts["tokenizer_ema"] = self.engine.share(self.ema.state_dict())
        return parts

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what the `state_dict` of all ranks returned."""
        for engine, name in (
            (self.engine, "tokenizer"),
            (self.discriminator_engine, "discriminator"),
        ):
            engine.load_state_dict(
                {"weights": parts[name], "optimizer": parts[f"{name}_optimizer"]}
            )
        copy_named_tensors(parts["usage"], self.usage.state_dict(), what="usage window")
        if self.ema is not None:
            self.ema.load_state_dict(self.engine.localize(parts["tokenizer_ema"]))

    @property
    def _codebook_names(self) -> list[str]:
        return [codebook.name for codebook in self.architecture.codebooks]

    def _tokenizer_terms(
        self,
        images: Tensor,
        output: TokenizerOutput,
        batch: ImageBatch,
        has_discriminator: bool,
    ) -> dict[str, Tensor]:
        """Compute every unweighted loss and their weighted sum, the total."""
        weights = self.losses
        reconstruction = output.reconstruction.float()
        mse = nn.functional.mse_loss(reconstruction, images)
        perceptual = self.perceptual(reconstruction, images)
        disentanglement = disentanglement_loss(output.quantized)
        codebook, commitment = output.codebook_loss, output.commitment_loss
        assert codebook is not None, "the tokenizer is not in train mode"
        assert commitment is not None, "the tokenizer is not in train mode"
        total = (
            weights.reconstruction_weight * mse
            + weights.perceptual_weight * perceptual
            + weights.disentanglement_weight * disentanglement
            + weights.codebook_weight * codebook.sum()
            + weights.commitment_weight * commitment.sum()
        )
        terms = {
            "reconstruction": mse,
            "perceptual": perceptual,
            "disentanglement": disentanglement,
        }
        for index, name in enumerate(self._codebook_names):
            terms[f"codebook/{name}"] = codebook[index]
            terms[f"commitment/{name}"] = commitment[index]
            if output.entropy_loss is not None:
                terms[f"entropy/{name}"] = output.entropy_loss[index]
        if output.entropy_loss is not None:
            total = total + weights.entropy_weight * output.entropy_loss.sum()
        features = self._teacher_features(images, batch) if output.class_tokens else {}
        for book in self.architecture.codebooks:
            if book.teacher is not None:
                semantic = info_nce_loss(
                    output.class_tokens[book.teacher], features[book.teacher], self.loss_group
                )
                terms[f"semantic/{book.name}"] = semantic
                total = total + weights.semantic_weight * semantic
        if has_discriminator:
            self.discriminator_engine.require_frozen()
            adversarial = hinge_generator_loss(
                self.discriminator(output.reconstruction, self.loss_group)
            )
            terms["adversarial"] = adversarial
            total = total + weights.adversarial_weight * adversarial
        return {
            "tokenizer/loss/total": total,
            **{f"tokenizer/loss/{name}": term for name, term in terms.items()},
        }

    def _discriminator_step(
        self, micro_batches: Sequence[ImageBatch], reconstructions: Sequence[Tensor], lr: float
    ) -> dict[str, Tensor]:
        fakes = iter(reconstructions)  # one per slot, in order

        def discriminator_loss(_: Slot, batch: ImageBatch) -> tuple[Tensor, Tensor]:
            with autocast(self.training.precision, self.engine.device):
                real, fake = self.discriminator_engine.forward(
                    self._to_device(batch.images), next(fakes), self.loss_group
                )
            loss = hinge_discriminator_loss(real, fake)
            report = torch.stack([loss, real.float().mean(), fake.float().mean()]).detach()
            return self.losses.adversarial_weight * loss, report

        rows = self._accumulate(self.discriminator_engine, micro_batches, discriminator_loss)
        norm = self.discriminator_engine.step(lr=lr, losses=rows)
        self._fold_batch_statistics()
        loss, real, fake = rows.mean(dim=0)
        return {
            "tokenizer/loss/discriminator": loss,
            "tokenizer/discriminator/real_logit": real,
            "tokenizer/discriminator/fake_logit": fake,
            "tokenizer/discriminator/gradient_norm": norm,
        }

    def _fold_state(self, codes: Sequence[Tensor], has_discriminator: bool) -> None:
        """Bring what is stateful across micro-batches up to date, in micro-batch order."""
        # (M, g, K, n): a member's codes are those of consecutive images.
        ordered = self._gather(torch.stack(list(codes)))
        self.usage.update(rearrange(ordered, "M g K n -> K (M g n)"))
        if has_discriminator:
            self._fold_batch_statistics()
        if self.ema is not None:
            self.ema.update(self.engine.local_parameters())

    def _fold_batch_statistics(self) -> None:
        """Fold the BatchNorm statistics of the passes since the last fold."""
        passes = torch.stack(self.discriminator.take_batch_statistics())
        per_slot = passes.unflatten(0, (len(self.slots), -1))
        # Synchronised statistics are the same on all members of a group: they count once.
        ordered = self._gather(per_slot)[:, 0].flatten(0, 1)
        self.discriminator.fold_batch_statistics(list(ordered))

    def _accumulate(
        self,
        engine: Engine,
        micro_batches: Sequence[ImageBatch],
        loss_fn: Callable[[Slot, ImageBatch], tuple[Tensor, Tensor]],
    ) -> Tensor:
        training = self.training
        return accumulate(
            engine,
            self.slots,
            micro_batches,
            loss_fn,
            num_micro_batches=training.micro_batches_per_step,
            ranks_per_micro_batch=training.ranks_per_micro_batch,
        )

    def _gather(self, rows: Tensor) -> Tensor:
        """Collect a row per slot from all ranks, (M, g, ...) in order."""
        training = self.training
        return gather_in_order(
            rows,
            training.micro_batches_per_step,
            self.engine.world,
            training.ranks_per_micro_batch,
        )

    def _teacher_features(self, images: Tensor, batch: ImageBatch) -> dict[str, Tensor]:
        # Copies that block would make the host wait for the pass before.
        stored = {
            name: value.to(images.device, non_blocking=True)
            for name, value in batch.features.items()
        }
        if stored or self.teachers is None:
            return stored
        with torch.no_grad():
            return self.teachers(images)

    def _to_device(self, images: Tensor) -> Tensor:
        """Normalise uint8 images to [-1, 1] on the device."""
        return to_float(images.to(self.engine.device, non_blocking=True))

    def _randomness(self, step: int, slot: Slot) -> AbstractContextManager[None]:
        key = (self.training.seed, STAGE, step, slot.micro_batch)
        return keyed_torch_rng(*key, device=self.engine.device, loss_group=self.loss_group)

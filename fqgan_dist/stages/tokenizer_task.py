"""Training FQGAN: the tokenizer against its discriminator (fqgan.md 1.9 and 1.10).

One step runs all micro-batches through the tokenizer, moves it, then shows the same reconstructions
(made before the move) to the discriminator and moves that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from fqgan_dist.data.decoding import to_float
from fqgan_dist.data.loader import ImageBatch
from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.stages.training_task import TrainingTask
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
from fqgan_dist.training.anomalies import Evidence
from fqgan_dist.training.autocast import autocast
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.engine import Engine, accumulate
from fqgan_dist.training.named_tensors import copy_named_tensors, whole_tensors
from fqgan_dist.training.step_layout import Slot
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
        # Separate passes, because BatchNorm sees its own pass only.
        return self.discriminator(real, loss_group), self.discriminator(fake, loss_group)


class TokenizerTask(TrainingTask[FactorizedTokenizer, ImageBatch]):
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
        """Put the parts together; `perceptual` is frozen and on the engine's device.

        `teachers` computes features that the batches do not bring; None if all are stored.
        """
        super().__init__(
            STAGE, FactorizedTokenizer, engine=engine, training=training, evaluate_fn=evaluate_fn
        )
        self.discriminator_engine = discriminator_engine
        self.engines["discriminator"] = discriminator_engine
        self.perceptual = perceptual
        self.teachers = teachers
        self.losses = losses
        config = self.architecture
        self.usage = CodeUsageWindow(config.num_codebooks, config.codebook_size).to(engine.device)
        self._metric_names: list[str] = []

    @property
    def discriminator(self) -> PatchDiscriminator:
        module = self.discriminator_engine.module
        assert isinstance(module, DiscriminatorPasses), f"engine of {type(module).__name__}"
        return module.discriminator

    @property
    def architecture(self) -> TokenizerConfig:
        return self.model.config

    def train_step(self, micro_batches: Sequence[ImageBatch], step: int) -> dict[str, Tensor]:
        has_discriminator = step >= self.losses.discriminator_start_step
        if step == self.losses.discriminator_start_step:
            self.discriminator_engine.advance(step - 1)
        self.model.train()
        self.discriminator.train()
        lr = self._lr(step)
        reconstructions: list[Tensor] = []
        codes: list[Tensor] = []

        def tokenizer_loss(slot: Slot, batch: ImageBatch) -> tuple[Tensor, Tensor]:
            images = self._to_device(batch.images)
            with self._training_pass(step, slot):
                output: TokenizerOutput = self.engine.forward(
                    images,
                    compute_entropy=self.losses.entropy_weight > 0,
                    loss_group=self.layout.loss_group,
                )
                terms = self._tokenizer_terms(images, output, batch, has_discriminator)
            reconstructions.append(output.reconstruction.detach())
            codes.append(output.codes.transpose(0, 1).flatten(1).to(torch.int32))
            total = terms["tokenizer/loss/total"]
            self._metric_names = list(terms)
            return total, torch.stack([term.detach().float() for term in terms.values()])

        with self.discriminator_engine.frozen():
            rows = accumulate(self.engine, micro_batches, tokenizer_loss)
        metrics = dict(zip(self._metric_names, rows.mean(dim=0), strict=True))
        norm = self.engine.step(lr=lr, losses=rows)
        metrics["tokenizer/gradient_norm"] = norm
        self._evidence = [Evidence(self._metric_names, rows, "tokenizer/gradient_norm", norm)]
        self._fold_state(codes, has_discriminator)
        if has_discriminator:
            metrics |= self._discriminator_step(micro_batches, reconstructions, lr)
        books = self.architecture.codebooks
        for book, value in zip(books, self.usage.compute_usage(), strict=True):
            metrics[f"tokenizer/codebook_usage/{book.name}"] = value
        metrics["tokenizer/lr"] = torch.tensor(lr)
        return metrics

    def state_dict(self) -> Parts:
        usage = dict(self.usage.state_dict()) if self.layout.world.is_main else {}
        return super().state_dict() | {"usage": usage}

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
        super().load_state_dict(parts)
        usage = whole_tensors(parts["usage"], parts["usage"])
        copy_named_tensors(usage, self.usage.state_dict(), what="usage window")

    def _tokenizer_terms(
        self,
        images: Tensor,
        output: TokenizerOutput,
        batch: ImageBatch,
        has_discriminator: bool,
    ) -> dict[str, Tensor]:
        """Compute every unweighted loss and their weighted sum, the total."""
        weights, books = self.losses, self.architecture.codebooks
        loss_group = self.layout.loss_group
        image = output.reconstruction.float()
        zero = image.new_zeros(())
        codebook, commitment = output.codebook_loss, output.commitment_loss
        assert codebook is not None, "the tokenizer is not in train mode"
        assert commitment is not None, "the tokenizer is not in train mode"
        entropy = output.entropy_loss
        reconstruction = nn.functional.mse_loss(image, images)
        perceptual = self.perceptual(image, images)
        disentanglement = disentanglement_loss(output.quantized)
        features = self._teacher_features(images, batch) if output.class_tokens else {}
        semantic = {
            book.name: info_nce_loss(
                output.class_tokens[book.teacher], features[book.teacher], loss_group
            )
            for book in books
            if book.teacher is not None
        }
        adversarial = self._adversarial_loss(output) if has_discriminator else None
        # A loss that takes no part is zero. Left to right, so that the last bit stays what it is.
        total = sum(
            (
                weights.reconstruction_weight * reconstruction,
                weights.perceptual_weight * perceptual,
                weights.disentanglement_weight * disentanglement,
                weights.codebook_weight * codebook.sum(),
                weights.commitment_weight * commitment.sum(),
                weights.entropy_weight * (zero if entropy is None else entropy.sum()),
                *(weights.semantic_weight * loss for loss in semantic.values()),
                weights.adversarial_weight * (zero if adversarial is None else adversarial),
            ),
            start=zero,
        )
        terms = {
            "total": total,
            "reconstruction": reconstruction,
            "perceptual": perceptual,
            "disentanglement": disentanglement,
        }
        for index, book in enumerate(books):
            terms[f"codebook/{book.name}"] = codebook[index]
            terms[f"commitment/{book.name}"] = commitment[index]
            if entropy is not None:
                terms[f"entropy/{book.name}"] = entropy[index]
        terms |= {f"semantic/{name}": loss for name, loss in semantic.items()}
        if adversarial is not None:
            terms["adversarial"] = adversarial
        return {f"tokenizer/loss/{name}": term for name, term in terms.items()}

    def _adversarial_loss(self, output: TokenizerOutput) -> Tensor:
        self.discriminator_engine.require_frozen()
        logits = self.discriminator(output.reconstruction, self.layout.loss_group)
        return hinge_generator_loss(logits)

    def _discriminator_step(
        self, micro_batches: Sequence[ImageBatch], reconstructions: Sequence[Tensor], lr: float
    ) -> dict[str, Tensor]:
        fakes = iter(reconstructions)  # one per slot, in order

        def discriminator_loss(_: Slot, batch: ImageBatch) -> tuple[Tensor, Tensor]:
            with autocast(self.training.precision, self.engine.device):
                real, fake = self.discriminator_engine.forward(
                    self._to_device(batch.images), next(fakes), self.layout.loss_group
                )
            loss = hinge_discriminator_loss(real, fake)
            report = torch.stack([loss, real.float().mean(), fake.float().mean()]).detach()
            return self.losses.adversarial_weight * loss, report

        rows = accumulate(self.discriminator_engine, micro_batches, discriminator_loss)
        # What the tokenizer refused to learn from is nothing for the discriminator either.
        losses = rows.masked_fill(self.engine.refused, torch.nan)
        norm = self.discriminator_engine.step(lr=lr, losses=losses)
        self._evidence.append(
            Evidence(
                [
                    "tokenizer/loss/discriminator",
                    "tokenizer/discriminator/real_logit",
                    "tokenizer/discriminator/fake_logit",
                ],
                rows,
                "tokenizer/discriminator/gradient_norm",
                norm,
            )
        )
        self._fold_batch_statistics(self.discriminator_engine.refused)
        loss, real, fake = rows.mean(dim=0)
        return {
            "tokenizer/loss/discriminator": loss,
            "tokenizer/discriminator/real_logit": real,
            "tokenizer/discriminator/fake_logit": fake,
            "tokenizer/discriminator/gradient_norm": norm,
        }

    def _fold_state(self, codes: Sequence[Tensor], has_discriminator: bool) -> None:
        # (M, g, K, n): a member's codes are those of consecutive images.
        ordered = self.layout.gather_in_order(torch.stack(list(codes)))
        refused = self.engine.refused
        self.usage.update(rearrange(ordered, "M g K n -> K (M g n)"), refused=refused)
        if has_discriminator:
            self._fold_batch_statistics(refused)
        self._update_average()

    def _fold_batch_statistics(self, refused: Tensor) -> None:
        passes = torch.stack(self.discriminator.take_batch_statistics())
        per_slot = passes.unflatten(0, (len(self.layout.slots), -1))
        # Synchronised statistics are the same on all members of a group: they count once.
        ordered = self.layout.gather_in_order(per_slot)[:, 0].flatten(0, 1)
        self.discriminator.fold_batch_statistics(list(ordered), refused=refused)

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

"""What all engines share: freezing, the check for finite values, state by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fqgan_dist.errors import NumericsError
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs
from fqgan_dist.training.config import OptimizerConfig
from fqgan_dist.training.engine_settings import EngineSettings, ParameterGroups
from fqgan_dist.training.named_tensors import (
    copy_named_tensors,
    require_same_layout,
    whole_tensors,
)
from fqgan_dist.training.optimizer_state import (
    load_named_optimizer_state,
    named_optimizer_state,
    needed_optimizer_state,
    reset_optimizer_state,
)
from fqgan_dist.training.parameter_pieces import (
    Pieces,
    needed_spans,
    share_pieces,
    whole_pieces,
)
from fqgan_dist.training.step_layout import Slot


class EngineBase:
    """A module on its device, its optimizer, and what is the same in every engine."""

    def __init__(self, module: nn.Module, settings: EngineSettings) -> None:
        self.module = module.to(settings.device)
        self.layout = settings.layout
        self.world = settings.layout.world
        self.device = settings.device
        self.config = settings.training.optimizer
        self.name = settings.name
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = _build_optimizer(
            settings.parameter_groups or [{"params": self._parameters}], self.config
        )
        self._pieces: Pieces = whole_pieces(self.module, self.optimizer)
        self._has_partitions = False
        # A flag on the device. The fused kernels skip the update on the device while found_inf is
        # 1: no wait, no damage. Where a step is not simply skipped, every later one is refused too
        # until somebody looks.
        self._is_not_finite = torch.zeros((), device=self.device)
        self._refuses_later_steps = settings.training.anomalies.on_not_finite != "skip"
        self.optimizer.found_inf = self._is_not_finite  # pyright: ignore[reportAttributeAccessIssue] GradScaler's contract with fused optimizers

    @contextmanager
    def frozen(self) -> Iterator[None]:
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)

    def require_frozen(self) -> None:
        if any(parameter.requires_grad for parameter in self._parameters):
            raise NumericsError(
                f"{self.name} is trainable while another model's loss flows through it; "
                f"enclose the pass in engine.frozen()"
            )

    def raise_if_not_finite(self) -> None:
        if self._is_not_finite.item():
            raise NumericsError(
                f"{self.name}: a loss or gradient is not finite; no parameter has moved since. "
                "Lower the learning rate, or use precision: fp32"
            )

    @property
    def refused(self) -> Tensor:
        return self._is_not_finite > 0

    def advance(self, num_steps: int) -> None:
        # FQGAN's discriminator takes 20,000 such steps before it starts: its moments stay zero, but
        # Adam's bias correction fades. Skipping them is exact when the count is advanced. Weight
        # decay, if there is any, begins with the first real step.
        reset_optimizer_state(self._pieces, self.optimizer, num_steps=num_steps)

    def state_dict(self) -> dict[str, dict[str, Tensor | Fragment]]:
        # Partitions are saved by their ranks, everything else by the main rank.
        if not (self._has_partitions or self.world.is_main):
            return {"weights": {}, "optimizer": {}}
        values = {name: piece.find(piece.owner.detach()) for name, piece in self._pieces.items()}
        weights = share_pieces(self._pieces, values)
        if self.world.is_main:
            weights |= self._outside_the_optimizer()
        return {
            "weights": weights,
            "optimizer": named_optimizer_state(self._pieces, self.optimizer),
        }

    def needed_state(self) -> dict[str, Needs]:
        # Of weights too the own elements only: engines with partitions gather the others.
        return {
            "weights": {
                **needed_spans(self._pieces),
                **dict.fromkeys(self._outside_the_optimizer()),
            },
            "optimizer": needed_optimizer_state(self._pieces, self.optimizer),
        }

    @torch.no_grad()
    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
        self._is_not_finite.zero_()
        weights = parts["weights"]
        others = self._outside_the_optimizer()
        expected = {
            name: torch.empty(piece.shape, dtype=piece.owner.dtype, device="meta")
            for name, piece in self._pieces.items()
        }
        require_same_layout(weights, expected | others, what=self.name)
        for name, piece in self._pieces.items():
            piece.find(piece.owner).copy_(piece.cut(weights[name]))
        copy_named_tensors(whole_tensors(weights, others), others, what=self.name)
        load_named_optimizer_state(self._pieces, self.optimizer, parts["optimizer"])

    def local_parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def share(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | Fragment]:
        return dict(values) if self.world.is_main else {}

    def needed_parameters(self) -> Needs:
        return dict.fromkeys(self.local_parameters())

    def localize(self, values: Mapping[str, Tensor | Fragment]) -> dict[str, Tensor]:
        return whole_tensors(values, values)

    @contextmanager
    def whole_weights(self, values: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        if values is None:
            yield self.module
            return
        parameters = self.local_parameters()
        own = {name: parameter.clone() for name, parameter in parameters.items()}
        _copy_all(values, parameters)
        try:
            yield self.module
        finally:
            _copy_all(own, parameters)

    def _outside_the_optimizer(self) -> dict[str, Tensor]:
        """Return buffers, and parameters that were never to be trained."""
        state = self.module.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in self._pieces}

    def _weigh(self, loss: Tensor, slot: Slot) -> Tensor:
        return loss * self.layout.weight(slot)

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _begin_step(self) -> None:
        if not self._refuses_later_steps:
            self._is_not_finite.zero_()

    def _note_if_not_finite(self, *values: Tensor) -> None:
        # Without a wait: the step is refused on the device.
        for value in values:
            self._is_not_finite.logical_or_(~torch.isfinite(value).all())

    def _clip(self) -> Tensor:
        return nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_clip, foreach=True)


@torch.no_grad()
def _copy_all(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _build_optimizer(groups: ParameterGroups, config: OptimizerConfig) -> torch.optim.Optimizer:
    # The learning rate is set at every step. `fused` is required: it honours found_inf.
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.kind]
    return kind(
        list(groups),
        lr=0.0,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )

"""The plain engine: torch, with DistributedDataParallel when there are several ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fqgan_dist.errors import NumericsError
from fqgan_dist.training.config import OptimizerConfig
from fqgan_dist.training.micro_batches import Slot
from fqgan_dist.training.named_tensors import copy_named_tensors
from fqgan_dist.training.optimizer_state import load_named_optimizer_state, named_optimizer_state
from fqgan_dist.world import World

ParameterGroups = Sequence[dict[str, Any]]
"""Torch optimizer groups: `params` and, where it differs, `weight_decay`."""


class PlainEngine:
    """Train one module; implements `fqgan_dist.training.engine.Engine`."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        *,
        name: str,
        world: World,
        num_micro_batches: int,
        device: torch.device,
        parameter_groups: ParameterGroups | None = None,
    ) -> None:
        """Move the module to the device and build its optimizer.

        Args:
            module: the model; with several ranks the process group must be initialised.
            config: optimizer settings.
            name: what error messages call the model.
            world: rank geometry.
            num_micro_batches: M.
            device: where the model lives.
            parameter_groups: optimizer groups; all parameters in one group when None.
        """
        self.module = module.to(device)
        self.world = world
        self.device = device
        self.config = config
        self.name = name
        self._slot_weight = 1 / num_micro_batches
        self._wrapped: nn.Module = self.module
        if world.world_size > 1:
            self._wrapped = _wrap(self.module, device)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = _build_optimizer(
            parameter_groups or [{"params": self._parameters}], config
        )
        # A flag on the device: once set, every later step is refused until somebody looks.
        self._is_not_finite = torch.zeros((), device=device)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the model for training."""
        return self._wrapped(*inputs, **options)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Enclose one slot; DDP reduces gradients in the last one only."""
        wrapped = self._wrapped
        if isinstance(wrapped, DistributedDataParallel) and not is_last:
            with wrapped.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor, slot: Slot) -> None:
        """Add the slot's share of the loss's gradient."""
        (loss * (0.0 if slot.is_idle else self._slot_weight)).backward()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Take the parameters out of autograd."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)

    def require_frozen(self) -> None:
        """Check that no parameter would receive a gradient."""
        if any(parameter.requires_grad for parameter in self._parameters):
            raise NumericsError(
                f"{self.name} is trainable while another model's loss flows through it; "
                f"enclose the pass in engine.frozen()"
            )

    def step(self, *, lr: float, losses: Tensor) -> Tensor:
        """Clip, check and apply the gradients, then clear them."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_clip, foreach=True)
        is_finite = torch.isfinite(norm) & torch.isfinite(losses).all()
        self._is_not_finite.logical_or_(~is_finite)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The fused kernels skip the update on the device when found_inf is 1: no wait, no damage.
        self.optimizer.found_inf = self._is_not_finite  # pyright: ignore[reportAttributeAccessIssue] GradScaler's contract with fused optimizers
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cpu":
            self.raise_if_not_finite()
        return norm

    def raise_if_not_finite(self) -> None:
        """Raise if a step was refused."""
        if self._is_not_finite.item():
            raise NumericsError(
                f"{self.name}: a loss or gradient is not finite; no parameter has moved since. "
                f"The last checkpoint is good: lower the learning rate or use precision: fp32"
            )

    def advance(self, num_steps: int) -> None:
        """Put the optimizer where `num_steps` steps of zero gradient would have put it.

        Weight decay, if there is any, begins with the first real step.

        FQGAN's discriminator takes 20,000 such steps before it starts: its moments stay zero, but
        Adam's bias correction fades. Skipping them is exact when the count is advanced.
        """
        load_named_optimizer_state(
            self.module,
            self.optimizer,
            {
                f"{name}.{key}": value
                for name, parameter in self.module.named_parameters()
                for key, value in (
                    ("step", torch.tensor(float(num_steps))),
                    ("exp_avg", torch.zeros_like(parameter)),
                    ("exp_avg_sq", torch.zeros_like(parameter)),
                )
            },
        )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return weights (with buffers) and optimizer state, by parameter name."""
        return {
            "weights": dict(self.module.state_dict()),
            "optimizer": named_optimizer_state(self.module, self.optimizer),
        }

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore weights and optimizer state."""
        copy_named_tensors(parts["weights"], self.module.state_dict(), what=self.name)
        load_named_optimizer_state(self.module, self.optimizer, parts["optimizer"])


def _wrap(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    # The task folds what is stateful, in micro-batch order. torch 2.15 renames the option.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    wrapped = DistributedDataParallel(
        module,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )
    # By itself DDP averages over ranks. The factor that undoes it (N / M of the loss) rounds each
    # micro-batch's gradient differently for every N; a sum leaves nothing but the order of addends.
    # DDP inspects a hook's annotations, and takes no postponed ones: hence the lambda.
    wrapped.register_comm_hook(None, lambda _, bucket: _sum_over_ranks(bucket))
    return wrapped


def _sum_over_ranks(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage] the documented name
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None, "an asynchronous collective returns its work"
    return work.get_future().then(lambda future: future.value()[0])


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

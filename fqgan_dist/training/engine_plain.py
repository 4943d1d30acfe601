"""The plain engine: torch, with DistributedDataParallel when there are several ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fqgan_dist.training.engine_base import EngineBase
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.training.step_layout import Slot


class PlainEngine(EngineBase):
    """Train one module; implements `fqgan_dist.training.engine.Engine`."""

    def __init__(self, module: nn.Module, settings: EngineSettings) -> None:
        super().__init__(module, settings)
        self._wrapped: nn.Module = self.module
        if self.world.world_size > 1:
            self._wrapped = _wrap(self.module, self.device)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self._wrapped(*inputs, **options)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        # DDP reduces gradients in the last one only.
        wrapped = self._wrapped
        if isinstance(wrapped, DistributedDataParallel) and not is_last:
            with wrapped.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor, slot: Slot) -> None:
        self._weigh(loss, slot).backward()

    def step(self, *, lr: float, losses: Tensor) -> Tensor:
        self._begin_step()
        norm = self._clip()
        self._note_if_not_finite(norm, losses)
        self._set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


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

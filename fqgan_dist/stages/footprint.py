"""What a training step keeps in memory for its backward pass, counted without a GPU.

The real task runs one step on the meta device, where tensors have shapes but no data, so a
full-size model takes seconds on a laptop. Two things are not as on a GPU there and are imitated:
autocast, which the meta device lacks, and fused attention, in whose place it would keep the whole
matrix of scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs
from fqgan_dist.training.named_tensors import whole_tensors
from fqgan_dist.training.step_layout import Slot, build_step_layout
from fqgan_dist.world import World

META = torch.device("meta")

# Functions of our models that CUDA's autocast runs in bf16 (PyTorch's list of autocast ops).
_TO_BF16 = {
    functional.conv2d,
    functional.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.einsum,
    torch.bmm,
}
# Functions of our models that it runs in fp32.
_TO_FP32 = {
    functional.group_norm,
    functional.layer_norm,
    functional.mse_loss,
    torch.softmax,
    Tensor.softmax,
}


class SavedBytes:
    """Counts the memory that autograd keeps, each storage once, parameters and buffers not."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._known = {
            tensor.untyped_storage()._cdata
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        # Tensors are held, as a freed storage's address may be another's next.
        self._saved: dict[int, Tensor] = {}

    @property
    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._saved.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, _give_back):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in self._known:
            self._saved.setdefault(address, tensor.detach())
        return tensor


class MeasuringEngine:
    """Runs a task's forward passes and measures them; a `fqgan_dist.training.engine.Engine`.

    There is no backward pass and no optimizer: `backward` notes what is saved at that moment.
    """

    def __init__(self, module: nn.Module, *, others: Sequence[nn.Module] = ()) -> None:
        """Measure a module on the meta device; its passes use the parameters of others too."""
        self.module = module
        self.layout = build_step_layout(1, World())
        self.device = META
        self.saved_bytes = 0
        """Most bytes kept for the backward pass of one micro-batch."""
        self._others = others
        self._counter: SavedBytes | None = None

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:  # noqa: ARG002  part of Engine
        self._counter = SavedBytes([self.module, *self._others])
        with self._counter.counting():
            yield

    def backward(self, loss: Tensor, slot: Slot) -> None:  # noqa: ARG002  part of Engine
        assert self._counter is not None, "backward outside micro_batch"
        self.saved_bytes = max(self.saved_bytes, self._counter.total)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.module.requires_grad_(False)
        try:
            yield
        finally:
            self.module.requires_grad_(True)

    def require_frozen(self) -> None:
        """Nothing can go wrong: no gradient is computed."""

    def step(self, *, lr: float, losses: Tensor) -> Tensor:  # noqa: ARG002  part of Engine
        return losses.new_zeros(())

    def advance(self, num_steps: int) -> None:
        """Move nothing."""

    @property
    def refused(self) -> Tensor:
        return torch.zeros((), dtype=torch.bool, device="meta")

    def raise_if_not_finite(self) -> None:
        """Nothing was computed."""

    def state_dict(self) -> dict[str, dict[str, Tensor | Fragment]]:
        return {"weights": dict(self.module.state_dict()), "optimizer": {}}

    def needed_state(self) -> dict[str, Needs]:
        return {"weights": {}, "optimizer": {}}

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
        """Load nothing: meta tensors have no values."""

    def local_parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def share(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | Fragment]:
        return dict(values)

    def needed_parameters(self) -> Needs:
        return {}

    def localize(self, values: Mapping[str, Tensor | Fragment]) -> dict[str, Tensor]:
        return whole_tensors(values, values)

    @contextmanager
    def whole_weights(self, values: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:  # noqa: ARG002  part of Engine
        yield self.module


@contextmanager
def imitated_gpu(*, bf16: bool) -> Iterator[None]:
    """Let passes on the meta device keep what they would keep on a GPU."""
    with ExitStack() as stack:
        stack.enter_context(_FusedAttention())
        if bf16:
            stack.enter_context(_Autocast())
        yield


class _CallMode(TorchFunctionMode, ABC):
    """Gives every torch function that is called in a block to `call`."""

    @abstractmethod
    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.call(func, *args, **(kwargs or {}))


class _Autocast(_CallMode):
    """CUDA's autocast to bf16, as far as our models use it."""

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # `full_precision` marks its blocks by this flag: no autocast inside.
        if torch.backends.cuda.matmul.fp32_precision == "ieee":
            return func(*args, **kwargs)
        if func in _TO_BF16 or func is functional.scaled_dot_product_attention:
            dtype = torch.bfloat16
        elif func in _TO_FP32:
            dtype = torch.float32
        else:
            return func(*args, **kwargs)
        cast = [_cast(value, dtype) for value in args]
        return func(*cast, **{name: _cast(value, dtype) for name, value in kwargs.items()})


class _FusedAttention(_CallMode):
    """Attention that keeps queries, keys, values, output and one number per row, as kernels do."""

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        is_causal = bool(kwargs.get("is_causal", False))
        fused = torch.ops.aten._scaled_dot_product_flash_attention
        return fused(*args, 0.0, is_causal)[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    # As autocast does: fp32 and bf16 tensors move, fp64 and integers stay.
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16):
        return value.to(dtype)
    return value


def _give_back(tensor: Tensor) -> Tensor:
    return tensor

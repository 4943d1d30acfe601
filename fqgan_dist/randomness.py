"""Randomness keyed by what it is for, never by rank, worker or time.

A step's randomness is keyed by (seed, step, micro-batch), a sample's by (seed, key, view), so that
any layout of processes draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fqgan_dist.loss_group import ALONE, LossGroup

Key = int | str | np.integer[Any]

_SEPARATOR = "\x1f"
_MASK = 2**64 - 1
_PHILOX_ROUNDS = 10
_PHILOX_FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_PHILOX_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def derive_seed(*key: Key) -> int:
    """Hash a key to 63 bits; equal on every machine, Python version and process.

    Raises:
        TypeError: a part is neither an int nor a str.
    """
    text = _SEPARATOR.join(_describe(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(*key: Key) -> np.random.Generator:
    """Build a counter-based NumPy generator for a key."""
    return np.random.Generator(np.random.Philox(key=derive_seed(*key)))


def philox_words(*key: Key) -> tuple[int, int, int, int]:
    """Give the first four 64-bit words of `numpy_generator(*key).bit_generator`.

    Philox 4x64-10 at counter 1 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
    without building a generator: less than half of the time, which counts once per image.
    """
    words, keys = (1, 0, 0, 0), (derive_seed(*key), 0)
    for _ in range(_PHILOX_ROUNDS):
        first, second = words[0] * _PHILOX_FACTORS[0], words[2] * _PHILOX_FACTORS[1]
        words = (
            (second >> 64) ^ words[1] ^ keys[0],
            second & _MASK,
            (first >> 64) ^ words[3] ^ keys[1],
            first & _MASK,
        )
        keys = ((keys[0] + _PHILOX_STEPS[0]) & _MASK, (keys[1] + _PHILOX_STEPS[1]) & _MASK)
    return words


def torch_generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derive_seed(*key))


@contextmanager
def keyed_torch_rng(
    *key: Key, device: torch.device, loss_group: LossGroup = ALONE
) -> Iterator[None]:
    """Seed torch's default generators for a block, for what takes no generator (dropout).

    Their former states come back afterwards. Of the ranks that share the block's micro-batch each
    draws for all of it and uses its own rows: the numbers that a single rank would be given.
    """
    with ExitStack() as stack:
        stack.enter_context(
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        )
        torch.manual_seed(derive_seed(*key))
        if loss_group.size > 1:
            stack.enter_context(_DrawsForWholeMicroBatch(loss_group))
        yield


class _DrawsForWholeMicroBatch(TorchFunctionMode):
    """Replaces what draws numbers along a batch by the member's rows of the whole batch's draw.

    The first axis is the batch, or the batch with others below it in one axis.
    """

    def __init__(self, loss_group: LossGroup) -> None:
        super().__init__()
        self._loss_group = loss_group

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._drop(*args, **kwargs)
        if func is torch.rand:
            return self._draw_uniform(*args, **kwargs)
        # What is drawn unseen would differ between sizes of the group, without a sound.
        assert func not in _NOT_SHARED, f"{func.__name__} is not shared between members yet"
        return func(*args, **kwargs)

    def _drop(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return functional.dropout(input, p, training, inplace)
        assert not inplace, "in-place dropout is not shared between members yet"
        with torch.no_grad():
            drawn = functional.dropout(self._whole_like(input).fill_(1), p)
            is_kept = drawn[self._loss_group.rows(len(input))] != 0
            # As torch rounds the factor: on the CPU to the input's type, on a GPU at least float32.
            is_fused = input.device.type == "cuda"
            precision = torch.promote_types(input.dtype, torch.float32) if is_fused else input.dtype
            scale = torch.ones((), dtype=precision).div_(1 - p).item()
        return torch.where(is_kept, input * scale, 0.0)

    def _whole_like(self, input: Tensor) -> Tensor:
        # Numbers are drawn in the order of memory, which need not be that of the axes: some
        # convolutions give channels last.
        sample = torch.empty_like(input[0])
        shape = (self._loss_group.size * len(input), *sample.shape)
        return input.new_empty_strided(shape, (sample.numel(), *sample.stride()))

    def _draw_uniform(self, *size: Any, **options: Any) -> Tensor:
        shape = size[0] if isinstance(size[0], Sequence) else size
        drawn = torch.rand((self._loss_group.size * shape[0], *shape[1:]), **options)
        return drawn[self._loss_group.rows(shape[0])]


# Other functions that draw numbers; none of our networks uses one in a training pass.
_NOT_SHARED = {
    functional.alpha_dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.feature_alpha_dropout,
    functional.rrelu,
    torch.bernoulli,
    torch.multinomial,
    torch.normal,
    torch.rand_like,
    torch.randint,
    torch.randn,
    torch.randn_like,
    torch.randperm,
    Tensor.bernoulli_,
    Tensor.exponential_,
    Tensor.normal_,
    Tensor.random_,
    Tensor.uniform_,
}


def _describe(part: Key) -> str:
    # The type is part of the text: derive_seed(1) and derive_seed("1") are different streams.
    if isinstance(part, str):
        return f"str:{part.replace(_SEPARATOR, 2 * _SEPARATOR)}"
    if isinstance(part, bool) or not isinstance(part, int | np.integer):
        raise TypeError(f"key part {part!r} is a {type(part).__name__}: expected int or str")
    return f"int:{part}"  # of NumPy's integers too: a row number is the same key from any source

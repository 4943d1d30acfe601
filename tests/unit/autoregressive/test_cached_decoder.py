from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fqgan_dist.autoregressive.decoding import CachedDecoder
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

BuildModel = Callable[..., FactorizedTransformer]


@torch.no_grad()
def decode_given_codes(
    model: FactorizedTransformer, codes: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Logits (B, K, T, V) from the step-by-step decoder, fed the given codes."""
    flat = codes.flatten(2)
    decoder = CachedDecoder(model, len(labels))
    logits = torch.empty(*flat.shape, model.config.codebook_size, dtype=torch.float64)
    inputs = model.class_embedding(labels)
    for position in range(flat.shape[2]):
        decoder.begin_position(position, inputs)
        for codebook in range(flat.shape[1]):
            previous = flat[:, codebook - 1, position] if codebook else None
            features = decoder.features(codebook, previous)
            logits[:, codebook, position] = model.classifiers[codebook](features)
        inputs = model.embed_position(flat[:, :, position])
    return logits


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4])
def test_decoding_equals_the_teacher_forced_pass(
    build_model: BuildModel, kind: str, num_codebooks: int
):
    model = build_model(kind, num_codebooks=num_codebooks)
    torch.manual_seed(0)
    codes = torch.randint(11, (4, num_codebooks, 3, 3))
    labels = torch.tensor([0, 3, 4, 5])
    with torch.no_grad():
        expected = model(codes, labels)
    decoded = decode_given_codes(model, codes, labels)
    assert (decoded - expected).abs().max() < 1e-12 * expected.abs().max()


class _LargestAllocation(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        storages = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and _storage(leaf) not in storages:
                self.elements = max(self.elements, leaf.numel())
        return result


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.no_grad()
def test_no_position_allocates_anything_of_a_caches_size(build_model: BuildModel, kind: str):
    model = build_model(kind, grid_size=12)
    decoder = CachedDecoder(model, batch_size=2)
    cache_elements = 2 * 16 * 144
    inputs = model.class_embedding(torch.tensor([0, 1]))
    for position in (0, 142, 143):
        with _LargestAllocation() as largest:
            decoder.begin_position(position, inputs)
            for codebook in range(3):
                decoder.features(codebook, torch.tensor([1, 2]) if codebook else None)
        # Queries, keys and values of one token, or the attention weights of all of them.
        assert 0 < largest.elements <= cache_elements / 8


def test_training_mode_is_refused(build_model: BuildModel):
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        CachedDecoder(build_model().train(), 1)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_decoding_is_near_the_float32_one(build_model: BuildModel, autocast: bool):
    model = build_model().float()
    inputs = model.class_embedding(torch.tensor([0, 1]))
    expected = CachedDecoder(model, 2)
    expected.begin_position(0, inputs)
    if not autocast:
        model = build_model().bfloat16()
        inputs = inputs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        decoder = CachedDecoder(model, 2)
        decoder.begin_position(0, inputs)
        features = decoder.features(0, None)
    difference = features.float() - expected.features(0, None).float()
    # Eight bits of mantissa through four layers.
    assert difference.abs().max() < 0.05 * features.abs().max()

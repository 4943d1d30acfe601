"""Generate codes with FAR: classifier-free guidance and draws that depend on the sample id only.

Source: FQGAN, arXiv 2411.16681, sampling of FAR; classifier-free guidance, arXiv 2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from fqgan_dist.autoregressive.config import SamplingConfig
from fqgan_dist.autoregressive.decoding import CachedDecoder
from fqgan_dist.autoregressive.filtering import invert_cumulative, keep_top_k, keep_top_p
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.errors import NumericsError
from fqgan_dist.randomness import numpy_generator

# Letters: B batch, K codebooks, h w latent grid, T = h*w, V codebook size, F feature channels.


def draw_uniforms(
    sample_ids: Sequence[int], *, seed: int, num_positions: int, num_codebooks: int
) -> Tensor:
    """Draw the random numbers of samples, each from (seed, sample id) alone.

    Returns:
        (B, T, K) float64 in [0, 1), on the CPU.
    """
    # NumPy's, not the device's generator: a sample is the same on every kind of device, and in
    # every batch that it may fall into.
    uniforms = np.empty((len(sample_ids), num_positions, num_codebooks))
    for row, sample_id in zip(uniforms, sample_ids, strict=True):
        row[:] = numpy_generator(seed, "sample", sample_id).random(row.shape)
    return torch.from_numpy(uniforms)


@torch.no_grad()
def generate_codes(
    model: FactorizedTransformer,
    labels: Tensor,
    uniforms: Tensor,
    config: SamplingConfig,
    *,
    on_position: Callable[[int], None] | None = None,
) -> Tensor:
    """Generate the codes of B images.

    A row of the result depends on its own label and uniforms only, up to the rounding that differs
    between batch sizes. Nothing waits for the device before the end.

    Args:
        model: in evaluation mode; bfloat16 weights or autocast are fine: probabilities are
            computed in at least float32, cumulated in float64.
        labels: (B,) int64 in [0, num_classes], the last being the null class.
        uniforms: (B, T, K) float64 of `draw_uniforms`; not used by greedy decoding.
        config: how to draw.
        on_position: called after each position with the number of positions done.

    Returns:
        (B, K, h, w) int64 on the model's device.

    Raises:
        ValueError: the model is in training mode, or labels, uniforms or top_k do not fit it.
        NumericsError: logits were not finite.
    """
    _check_arguments(model, labels, uniforms, config)
    device = model.class_embedding.weight.device
    labels, uniforms = labels.to(device), uniforms.to(device)
    is_guided = config.guidance_scale != 1
    # With guidance, the second half of the rows runs without the class, on the same codes.
    copies = 2 if is_guided else 1
    rows = torch.cat([labels, torch.full_like(labels, model.config.null_label)][:copies])
    decoder = CachedDecoder(model, len(rows))
    inputs = model.class_embedding(rows)
    codes = torch.empty(uniforms.shape, dtype=torch.int64, device=device)
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    for position in range(model.config.num_positions):
        decoder.begin_position(position, inputs)
        drawn = None
        for codebook in range(model.config.num_codebooks):
            features = decoder.features(codebook, drawn)
            if is_guided:
                features = _guide(features, config.guidance_scale)
            logits = model.classifiers[codebook](features)
            # Collected on the device: reading it here would wait for the device T x K times.
            is_finite &= logits.isfinite().all()
            codes[:, position, codebook] = _select(logits, uniforms[:, position, codebook], config)
            drawn = codes[:, position, codebook].repeat(copies)
        inputs = model.embed_position(codes[:, position]).repeat(copies, 1)
        if on_position is not None:
            on_position(position + 1)
    if not is_finite:
        raise NumericsError(
            "logits are not finite while sampling - expected finite weights and activations - "
            "check the checkpoint, or sample in float32"
        )
    return rearrange(codes, "B (h w) K -> B K h w", h=model.config.grid_size)


def _guide(features: Tensor, scale: float) -> Tensor:
    # The classifiers are linear, so guiding their input is guiding their output, and the largest
    # matrix product of a step and all that follows runs on B rows instead of 2 B.
    # The difference of two close vectors, many times over: in bf16 it would be rounding noise.
    precise = features.to(torch.promote_types(features.dtype, torch.float32))
    conditional, unconditional = precise.chunk(2)
    return torch.lerp(unconditional, conditional, scale).to(features.dtype)


def _select(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> Tensor:
    """Choose codes, (B,) int64, from logits (B, V)."""
    if config.top_k == 1:
        return logits.argmax(-1)
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / config.temperature
    if config.top_k:
        scaled = keep_top_k(scaled, config.top_k)
    if config.top_p < 1:
        scaled = keep_top_p(scaled, config.top_p)
    codes = invert_cumulative(scaled.softmax(-1), uniforms)
    # Logits that are not finite may select no code; the run goes on to its error at the end.
    return codes.clamp(max=logits.shape[-1] - 1)


def _check_arguments(
    model: FactorizedTransformer, labels: Tensor, uniforms: Tensor, config: SamplingConfig
) -> None:
    settings = model.config
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} - expected (B,) int64"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= settings.null_label:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())} - expected 0 to "
            f"{settings.num_classes - 1}, or {settings.null_label} for no class"
        )
    expected = (len(labels), settings.num_positions, settings.num_codebooks)
    if tuple(uniforms.shape) != expected:
        raise ValueError(
            f"uniforms of shape {tuple(uniforms.shape)} - expected (B, T, K) = {expected} - "
            "draw them with draw_uniforms for this model and these labels"
        )
    if config.top_k > settings.codebook_size:
        raise ValueError(
            f"top_k {config.top_k} is more than the {settings.codebook_size} codes of a codebook - "
            "set it to 0 to draw among all"
        )

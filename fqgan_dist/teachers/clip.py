"""CLIP's image tower from open_clip: image -> class token of the last block.

Source: FQGAN reads `hidden_states[-1][:, 0]` of transformers' CLIPVisionModel: the last block's
class token *before* ln_post and projection, of OpenAI's weights, whose activation is QuickGELU.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.teachers.config import ClipArchitecture, ClipTeacherConfig
from fqgan_dist.teachers.random_weights import SHARP_GAIN, fill_positions, fill_random
from fqgan_dist.weights.files import load_safetensors_checked, load_torch_checked
from fqgan_dist.weights.tensors import load_into

HUB_TAG = "openai"
"""open_clip's name of the published weights that FQGAN uses."""
_VISUAL_PREFIX = "visual."


class ClipClassToken(nn.Module):
    """Frozen image tower that returns the class token before ln_post."""

    def __init__(self, sizes: ClipArchitecture) -> None:
        super().__init__()
        # open_clip takes 5 s to import (it brings timm): only who builds a CLIP pays.
        from open_clip.transformer import QuickGELU, VisionTransformer

        self.visual = VisionTransformer(
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            width=sizes.width,
            layers=sizes.num_layers,
            heads=sizes.num_heads,
            mlp_ratio=4.0,
            output_dim=sizes.projection_dim,
            act_layer=QuickGELU,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised pixels (B, 3, S, S) to class tokens (B, E)."""
        output = self.visual.forward_intermediates(
            pixels,
            indices=1,  # the last block alone
            normalize_intermediates=False,  # as FQGAN reads it: before ln_post
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return output["image_intermediates_prefix"][0][:, 0]


def build_clip(config: ClipTeacherConfig, *, weights_path: Path | None) -> ClipClassToken:
    """Build the network and fill it from the configured source.

    Raises:
        ConfigError: the architecture is not usable.
        DataError: the hub cannot be reached, or the weights are of another network.
    """
    sizes = config.sizes
    # The constructor draws numbers that are thrown away: the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        network = ClipClassToken(sizes)
    weights = config.weights
    if weights.is_random:
        fill_random(network.visual, seed=weights.seed, gain_fn=_random_gain)
        fill_positions(network.visual.positional_embedding, seed=weights.seed)
        with torch.no_grad():
            network.visual.class_embedding.zero_()
        return network
    path = (
        download_clip(str(config.architecture))
        if weights.is_hub
        else weights.find_file(weights_path)
    )
    load = load_safetensors_checked if path.suffix == ".safetensors" else load_torch_checked
    load_into(network, _select_visual(load(path, weights.sha256)), source=str(path))
    return network


def download_clip(architecture: str) -> Path:
    """Let open_clip download OpenAI's weights into its cache; return the file.

    Raises:
        ConfigError: there are no such weights.
        DataError: the hub cannot be reached.
    """
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    entry = get_pretrained_cfg(architecture, HUB_TAG)
    if not entry:
        raise ConfigError(
            f"weights.source: 'hub' has no {HUB_TAG!r} weights of {architecture!r} - expected a "
            "published architecture such as 'ViT-B-16-quickgelu' - or name a file"
        )
    try:
        return Path(download_pretrained(entry))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{architecture}: open_clip cannot download the weights ({error}) - expected access to "
            "the hub - run `fqgan weights fetch CONFIG to=DIR` where there is access, and set "
            "weights.source to the file it makes"
        ) from error


def _select_visual(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # A published file holds the text tower too; what has no visual part at all is kept for the
    # message.
    visual = {name: t for name, t in tensors.items() if name.startswith(_VISUAL_PREFIX)}
    return visual or tensors


def _random_gain(name: str) -> float:
    if name.endswith(("in_proj_weight", "c_fc.weight")):
        return SHARP_GAIN
    return 1.0

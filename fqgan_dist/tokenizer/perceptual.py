"""The perceptual loss (LPIPS), with the lpips library's networks and linear weights.

Letters: B images, C channels, H W pixels.
Source: LPIPS, arXiv 1801.03924, version 0.1; reference/fqgan.md, section 1.9.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fqgan_dist.tokenizer.config import PerceptualConfig
from fqgan_dist.tokenizer.precision import full_precision
from fqgan_dist.weights.files import (
    download_torch_file,
    load_safetensors_checked,
    load_torch_checked,
)
from fqgan_dist.weights.tensors import draw_normal, load_into, warn_random_weights

_NORMALIZE_EPS = 1e-10


class PerceptualLoss(nn.Module):
    """Weighted squared distance of channel-normalized features of a frozen network.

    No parameter is trainable. Its state does not belong into checkpoints: the config rebuilds it.
    """

    def __init__(self, network: nn.Module) -> None:
        """Wrap an `lpips.LPIPS` network and freeze it."""
        super().__init__()
        self.network: Any = network.requires_grad_(False)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Compare images; the gradient reaches the reconstruction only.

        Args:
            reconstruction: (B, 3, H, W) float, about [-1, 1].
            target: the real images, of the same shape.

        Returns:
            Mean over images, scalar float32.

        Raises:
            ValueError: shapes differ.
        """
        if reconstruction.shape != target.shape:
            raise ValueError(
                f"reconstruction {tuple(reconstruction.shape)} and target {tuple(target.shape)}: "
                "expected the same shape"
            )
        # Apart from the reconstruction's: one pass of both would keep the targets' activations too.
        with torch.no_grad():
            expected = self._features(target)
        features = self._features(reconstruction)
        with full_precision(reconstruction.device):
            distances = [
                linear((_normalize(one) - _normalize(other)).square()).mean()
                for linear, one, other in zip(self.network.lins, features, expected, strict=True)
            ]
            return torch.stack(distances).sum()

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network.net(self.network.scaling_layer(images))


def build_perceptual_loss(
    config: PerceptualConfig, *, weights_path: Path | None = None
) -> PerceptualLoss:
    """Build the loss on the CPU, in train mode.

    Args:
        config: network and weights.
        weights_path: local copy of the weights' file where that is elsewhere.

    Raises:
        ConfigError: the file is elsewhere and no local copy was made.
        DataError: the weights cannot be downloaded, or their file is missing, damaged or another
            network's.
    """
    network = _build_network(config)
    weights = config.weights
    if weights.is_hub:
        # lpips would load them through torch.hub, which unpickles whatever the file holds.
        path = download_torch_file(
            torchvision_url(config.network), field="perceptual.weights.source"
        )
        _fill(network.net, load_torch_checked(path, weights.sha256), source=str(path))
    elif weights.is_random:
        warn_random_weights("perceptual loss", weights.seed)
        _draw_weights(network.net, weights.seed)
    else:
        path = weights.find_file(weights_path)
        _fill(network.net, load_safetensors_checked(path, weights.sha256), source=str(path))
    # In train mode for ever: the dropout before each linear layer acts in the released training too
    # (fqgan.md 1.9).
    return PerceptualLoss(network).train()


def build_unfilled_perceptual_loss(config: PerceptualConfig) -> PerceptualLoss:
    """Build the loss without the configured weights: for its sizes, never for its values."""
    return PerceptualLoss(_build_network(config)).train()


def copy_backbone_weights(loss: PerceptualLoss) -> dict[str, Tensor]:
    """Return the backbone's weights by torchvision's names, as a weights file holds them."""
    backbone = loss.network.net
    names = _torchvision_names(backbone)
    return {names[name]: tensor.clone() for name, tensor in backbone.state_dict().items()}


def _normalize(features: Tensor) -> Tensor:
    features = features.float()
    # lpips takes a square root, whose gradient is NaN where all channels of a position are 0.
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + _NORMALIZE_EPS)


def _build_network(config: PerceptualConfig) -> Any:
    import lpips  # pulls in torchvision and scipy: more than a second

    with warnings.catch_warnings():
        # lpips asks torchvision with an argument that torchvision has renamed.
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        # The constructor draws weights: no trace of that may stay in torch's generator.
        with torch.random.fork_rng(devices=[]):
            return lpips.LPIPS(
                net=config.network,
                pnet_rand=True,
                use_dropout=config.dropout,
                eval_mode=False,
                verbose=False,
            )


def torchvision_url(network: str) -> str:
    """Name the file of a backbone's ImageNet weights."""
    from torchvision.models import get_model_weights  # as lpips, more than a second

    name = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[network]
    return str(get_model_weights(name)["IMAGENET1K_V1"].url)


def _draw_weights(network: nn.Module, seed: int) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            # Kaiming's scale keeps the features' size through the layers; torch's lets it vanish.
            scale = math.sqrt(2 / module.weight[0].numel())
            drawn = draw_normal(module.weight.shape, seed, "perceptual", name)
            module.weight.data.copy_(scale * drawn)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _fill(network: nn.Module, stored: Mapping[str, Tensor], *, source: str) -> None:
    names = {theirs: ours for ours, theirs in _torchvision_names(network).items()}
    # The classifier of a whole torchvision state dict is not part of the loss.
    kept = {names[name]: tensor for name, tensor in stored.items() if name in names}
    load_into(network, kept, source=source)


def _torchvision_names(network: nn.Module) -> dict[str, str]:
    # lpips cuts torchvision's `features` into slices but keeps the layers' numbers.
    return {name: re.sub(r"^slice\d+\.", "features.", name) for name in network.state_dict()}

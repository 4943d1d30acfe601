"""The perceptual loss (LPIPS), with the lpips library's networks and linear weights.

Letters: B images, C channels, H W pixels.
Source: LPIPS, arXiv 1801.03924, version 0.1; reference/fqgan.md, section 1.9.
"""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fqgan_dist.config import Config
from fqgan_dist.errors import ConfigError
from fqgan_dist.randomness import torch_generator
from fqgan_dist.tokenizer.precision import full_precision

logger = logging.getLogger(__name__)

_NORMALIZE_EPS = 1e-10


class PerceptualConfig(Config):
    """The frozen network whose features are compared."""

    network: Literal["vgg", "alex", "squeeze"] = "vgg"
    """VGG16 (the paper's), AlexNet or SqueezeNet 1.1."""
    weights: str = "torchvision"
    """`torchvision` (ImageNet weights from its cache or download), `random` (seeded; for trials
    without weights, not comparable with published numbers), or a .safetensors file of torchvision's
    state dict."""
    dropout: bool = True
    """Whether half of the differences are dropped in train mode, as in the released training."""


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
    config: PerceptualConfig, *, seed: int, weights_path: Path | None = None
) -> PerceptualLoss:
    """Build the loss on the CPU, in train mode.

    Args:
        config: network and weights.
        seed: of `random` weights; they are equal on every machine.
        weights_path: local copy of `config.weights` where that names a file elsewhere.

    Raises:
        ConfigError: the weights cannot be read or downloaded, or are another network's.
    """
    if config.weights == "torchvision":
        return PerceptualLoss(_build_network(config, pretrained=True)).train()
    network = _build_network(config, pretrained=False)
    if config.weights == "random":
        logger.warning("perceptual loss: random weights: not comparable with published numbers")
        _draw_weights(network.net, seed)
    else:
        _load_weights(network.net, weights_path or Path(config.weights))
    return PerceptualLoss(network).train()


def _normalize(features: Tensor) -> Tensor:
    features = features.float()
    # lpips takes a square root, whose gradient is NaN where all channels of a position are 0.
    norm = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + _NORMALIZE_EPS)


def _build_network(config: PerceptualConfig, *, pretrained: bool) -> Any:
    import lpips  # pulls in torchvision and scipy: more than a second

    with warnings.catch_warnings():
        # lpips asks torchvision with an argument that torchvision has renamed.
        warnings.filterwarnings("ignore", "The parameter 'pretrained' is deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Arguments other than a weight enum", UserWarning)
        try:
            # The constructor draws weights: no trace of that may stay in torch's generator.
            with torch.random.fork_rng(devices=[]):
                return lpips.LPIPS(
                    net=config.network,
                    pnet_rand=not pretrained,
                    use_dropout=config.dropout,
                    eval_mode=False,
                    verbose=False,
                )
        except (URLError, OSError) as error:
            raise ConfigError(
                f"perceptual.weights: {config.weights!r}: cannot get torchvision's weights of "
                f"{config.network} ({error}); give a .safetensors file of them, or "
                "'random' for a trial"
            ) from error


def _draw_weights(network: nn.Module, seed: int) -> None:
    generator = torch_generator(seed, "perceptual")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # Kaiming keeps the features' size through the layers; torch's default lets it vanish.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"perceptual.weights: {str(path)!r}: cannot be read as safetensors ({error}); expected "
            "'torchvision', 'random' or a .safetensors file"
        ) from error
    # lpips cuts torchvision's `features` into slices but keeps the layers' numbers.
    names = {re.sub(r"^slice\d+\.", "features.", name): name for name in network.state_dict()}
    missing = [name for name in names if name not in stored]
    if missing:
        raise ConfigError(
            f"perceptual.weights: {str(path)!r}: has no {missing[0]!r} ({len(missing)} of "
            f"{len(names)} keys missing); expected torchvision's state dict of perceptual.network"
        )
    try:
        network.load_state_dict({names[name]: stored[name] for name in names})
    except RuntimeError as error:
        raise ConfigError(
            f"perceptual.weights: {str(path)!r}: is of another network than perceptual.network "
            f"({error}); change one of the two"
        ) from error

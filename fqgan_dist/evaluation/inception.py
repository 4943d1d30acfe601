"""Inception features and logits for FID, IS, precision and recall: torch-fidelity's InceptionV3.

The network is TensorFlow's of 2015-12-05 as torch-fidelity ports it, its TF1 bilinear resize
included. torch-fidelity unpickles whatever file it is given, so the weights are read and checked
here.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from fqgan_dist.errors import ConfigError
from fqgan_dist.evaluation.config import InceptionConfig
from fqgan_dist.evaluation.random_inception import fill_random_inception
from fqgan_dist.weights.files import (
    download_torch_file,
    load_safetensors_checked,
    load_torch_checked,
)
from fqgan_dist.weights.tensors import hash_tensors, load_into, warn_random_weights

_SHORT_HASH = 16


class _InceptionNetwork(FeatureExtractorInceptionV3):
    """torch-fidelity's network, built without its loader and with a choice of input size."""

    def __init__(self, resolution: int) -> None:
        # The library's constructor reads a weights file by torch.load(weights_only=False), or
        # downloads one. It is given an empty one of our own making; the real weights come
        # afterwards, checked.
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        super().__init__(
            "inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty
        )
        self.INPUT_IMAGE_SIZE = resolution

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load as torch does, but take the constructor's empty file for nothing."""
        if not state_dict:
            return _IncompatibleKeys([], [])
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class InceptionFeatures(nn.Module):
    """Frozen InceptionV3; always in evaluation mode.

    `evaluator_id` names the network, the resolution and the weights; numbers of different ids are
    not comparable.
    """

    def __init__(self, network: _InceptionNetwork, *, evaluator_id: str) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.evaluator_id = evaluator_id

    def train(self, mode: bool = True) -> InceptionFeatures:  # noqa: ARG002
        """Stay in evaluation mode, also when a surrounding module is put into training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features of images of any size.

        Args:
            images: (B, 3, H, W) uint8.

        Returns:
            Features of the last pooling (B, 2048) and logits without bias (B, 1008), float32.

        Raises:
            ValueError: the images are not (B, 3, H, W) uint8.
        """
        # Half precision moves FID by several percent: computed in float32 whatever surrounds it.
        with torch.autocast(images.device.type, enabled=False):
            features, logits = self.network(images)
        return features, logits


def build_inception(
    config: InceptionConfig, *, device: torch.device | str, weights_path: Path | None = None
) -> InceptionFeatures:
    """Build the evaluator's network with the configured weights on a device.

    Args:
        config: settings.
        device: where the network shall be.
        weights_path: local copy of a remote weights file; None when the source is local, hub or
        random.

    Raises:
        ConfigError: a remote file was not staged.
        DataError: the hub cannot be reached, or the weights are damaged or of another network.
    """
    weights = config.weights
    if weights_path is not None and not weights.is_file:
        raise ConfigError(
            f"weights.source: {weights.source!r} takes no file - expected a path or URI - or do "
            f"not stage {str(weights_path)!r}"
        )
    # The constructor draws numbers that are thrown away: the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        network = _InceptionNetwork(config.resolution)
    if weights.is_random:
        fill_random_inception(network, seed=weights.seed)
        warn_random_weights("Inception", weights.seed)
        weights_id = f"random-{weights.seed}"
    else:
        path = download_inception() if weights.is_hub else weights.find_file(weights_path)
        load = load_safetensors_checked if path.suffix == ".safetensors" else load_torch_checked
        load_into(network, load(path, weights.sha256), source=str(path))
        weights_id = hash_tensors(network.state_dict())[:_SHORT_HASH]
    evaluator_id = f"torch-fidelity-inception-v3/{config.resolution}px/{weights_id}"
    return InceptionFeatures(network, evaluator_id=evaluator_id).to(device)


def download_inception() -> Path:
    """Download torch-fidelity's weights into torch.hub's folder; return the file.

    Raises:
        DataError: the address cannot be reached, or the file is not the published one.
    """
    return download_torch_file(URL_INCEPTION_V3, field="weights.source")

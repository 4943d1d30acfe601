"""A frozen teacher: images as the tokenizer sees them -> one feature vector each.

Source: FQGAN, arXiv 2411.16681, representation learning; preprocessing as in the released training
code: x*0.5 + 0.5, *nearest-neighbour* resize without antialiasing, the teacher's own mean and std.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fqgan_dist.errors import ConfigError
from fqgan_dist.teachers.clip import HUB_TAG, build_clip
from fqgan_dist.teachers.config import ClipTeacherConfig, Dinov2TeacherConfig, TeacherConfig
from fqgan_dist.weights.config import WeightsConfig
from fqgan_dist.weights.files import load_safetensors_checked
from fqgan_dist.weights.tensors import hash_tensors, warn_random_weights

_FINGERPRINT_VERSION = 1
"""Raised when the features of equal settings and weights change."""

Statistics = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class TeacherPreprocessing:
    """What happens to an image in [0, 1] before the network sees it."""

    input_size: int
    """Height and width after the nearest-neighbour resize, pixels."""
    mean: Statistics
    """Subtracted per channel."""
    std: Statistics
    """Divided by per channel."""


CLIP_MEAN: Statistics = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Statistics = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Statistics = (0.485, 0.456, 0.406)
IMAGENET_STD: Statistics = (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """Frozen network with its preprocessing; always in evaluation mode.

    `fingerprint` covers the weights, the preprocessing and the architecture: stored features carry
    it and are refused when it differs.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        feature_dim: int,
        preprocessing: TeacherPreprocessing,
        fingerprint: str,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.name = name
        self.feature_dim = feature_dim
        self.preprocessing = preprocessing
        self.fingerprint = fingerprint
        shape = (1, 3, 1, 1)
        self.register_buffer(
            "mean", torch.tensor(preprocessing.mean).reshape(shape), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(preprocessing.std).reshape(shape), persistent=False
        )

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stay in evaluation mode, also when a surrounding module is put into training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of images.

        Args:
            images: (B, 3, H, W), uint8, or float in [-1, 1]; any size.

        Returns:
            (B, feature_dim) float32, also under autocast.

        Raises:
            ValueError: the shape is not (B, 3, H, W), or the dtype is neither uint8 nor float.
        """
        return self.network(self._preprocess(images)).float()

    def _preprocess(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: shape {tuple(images.shape)} - expected (B, 3, H, W)")
        if images.dtype == torch.uint8:
            pixels = images.float() / 255
        elif images.is_floating_point():
            pixels = images.float() * 0.5 + 0.5
        else:
            raise ValueError(f"images: dtype {images.dtype} - expected uint8, or float in [-1, 1]")
        size = (self.preprocessing.input_size, self.preprocessing.input_size)
        # Without antialiasing, as crude as it is: the released models learned from these features.
        return (functional.interpolate(pixels, size=size, mode="nearest") - self.mean) / self.std


def build_teacher(
    config: TeacherConfig, *, device: torch.device | str, weights_path: Path | None = None
) -> Teacher:
    """Build a teacher with the configured weights on a device.

    Args:
        config: settings of either kind.
        device: where the network shall be.
        weights_path: local copy of a remote weights file; None when the source is local, hub or
        random.

    Raises:
        ConfigError: the architecture is unknown, or a remote file was not staged.
        DataError: the hub cannot be reached, or the weights are damaged or of another network.
    """
    if weights_path is not None and not config.weights.is_file:
        raise ConfigError(
            f"weights.source: {config.weights.source!r} takes no file - expected a path or URI - "
            f"or do not stage {str(weights_path)!r}"
        )
    match config:
        case ClipTeacherConfig():
            network = build_clip(config, weights_path=weights_path)
            preprocessing = TeacherPreprocessing(
                input_size=config.sizes.image_size, mean=CLIP_MEAN, std=CLIP_STD
            )
        case Dinov2TeacherConfig():
            # transformers' model classes take a second to import: only who builds a DINOv2 pays.
            from fqgan_dist.teachers.dinov2 import build_dinov2

            network = build_dinov2(config, weights_path=weights_path)
            preprocessing = TeacherPreprocessing(
                input_size=config.input_size, mean=IMAGENET_MEAN, std=IMAGENET_STD
            )
    if config.weights.is_random:
        warn_random_weights(f"teacher {config.name!r}", config.weights.seed)
    fingerprint = _compute_fingerprint(
        {
            "kind": config.kind,
            "sizes": config.sizes.model_dump(),
            "preprocessing": asdict(preprocessing),
        },
        network,
    )
    return Teacher(
        network,
        name=config.name,
        feature_dim=config.feature_dim,
        preprocessing=preprocessing,
        fingerprint=fingerprint,
    ).to(device)


def load_hub_weights(config: TeacherConfig) -> Mapping[str, Tensor]:
    """Download a teacher's weights and check that they are those of the configured network.

    Returns:
        Tensors by the names that a weights file of this kind has.

    Raises:
        ConfigError: the hub has no such network.
        DataError: the hub cannot be reached, or what it has is damaged.
    """
    match config:
        case ClipTeacherConfig():
            return build_clip(config, weights_path=None).state_dict()
        case Dinov2TeacherConfig():
            from fqgan_dist.teachers.dinov2 import build_dinov2, download_dinov2

            path = download_dinov2(str(config.architecture))
            weights = WeightsConfig(source=str(path), sha256=config.weights.sha256)
            build_dinov2(config.model_copy(update={"weights": weights}), weights_path=None)
            # The tensors of the hub's file, not the built network's: transformers renames when it
            # loads, and the names inside change with its version.
            return load_safetensors_checked(path, weights.sha256)


def find_hub_files(config: TeacherConfig) -> tuple[str, list[str]]:
    """Name a teacher's repository on Hugging Face's hub, and the files of which one will do."""
    match config:
        case ClipTeacherConfig():
            from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
            from open_clip.pretrained import get_pretrained_cfg

            entry = get_pretrained_cfg(str(config.architecture), HUB_TAG)
            repository, _, name = entry["hf_hub"].rpartition("/")
            return repository, [name] if name else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        case Dinov2TeacherConfig():
            from transformers.utils import SAFE_WEIGHTS_NAME

            return str(config.architecture), [SAFE_WEIGHTS_NAME]


def _compute_fingerprint(description: dict[str, object], network: nn.Module) -> str:
    content = {
        "version": _FINGERPRINT_VERSION,
        **description,
        "weights": hash_tensors(network.state_dict()),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

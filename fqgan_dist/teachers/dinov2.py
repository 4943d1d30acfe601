"""DINOv2 from transformers: image -> class token after the final norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from fqgan_dist.errors import DataError
from fqgan_dist.teachers.config import Dinov2Architecture, Dinov2TeacherConfig
from fqgan_dist.teachers.random_weights import SHARP_GAIN, fill_positions, fill_random
from fqgan_dist.weights.files import load_safetensors_checked
from fqgan_dist.weights.tensors import check_same_network

_WEIGHTS_FILE = "model.safetensors"


class Dinov2ClassToken(nn.Module):
    """Frozen DINOv2 that returns the class token after the final norm."""

    def __init__(self, network: Dinov2Model) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Map normalised pixels (B, 3, S, S) to class tokens (B, E)."""
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]


def build_dinov2(config: Dinov2TeacherConfig, *, weights_path: Path | None) -> Dinov2ClassToken:
    """Build the network and fill it from the configured source.

    Raises:
        DataError: the hub cannot be reached, or the weights are of another network.
    """
    settings = _to_library_config(config.sizes)
    weights = config.weights
    if weights.is_random:
        return Dinov2ClassToken(_build_random(settings, seed=weights.seed))
    path = (
        download_dinov2(str(config.architecture))
        if weights.is_hub
        else weights.find_file(weights_path)
    )
    tensors = load_safetensors_checked(path, weights.sha256)
    return Dinov2ClassToken(_load(settings, tensors, source=str(path)))


def download_dinov2(architecture: str) -> Path:
    """Let transformers download the weights into its cache; return the file.

    Raises:
        DataError: the hub cannot be reached, or has no such file.
    """
    try:
        path = cached_file(architecture, _WEIGHTS_FILE)
    except OSError as error:
        raise DataError(
            f"{architecture}: transformers cannot download {_WEIGHTS_FILE} ({error}) - expected "
            "access to the hub - run `fqgan weights fetch CONFIG to=DIR` where there is access, "
            "and set weights.source to the file it makes"
        ) from error
    assert path is not None, "cached_file raises for a missing file unless it is told otherwise"
    return Path(path)


def _to_library_config(sizes: Dinov2Architecture) -> Dinov2Config:
    return Dinov2Config(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )


def _build_random(settings: Dinov2Config, *, seed: int) -> Dinov2Model:
    with torch.random.fork_rng(devices=[]):
        network = Dinov2Model(settings)
    fill_random(network, seed=seed, gain_fn=_random_gain)
    fill_positions(network.embeddings.position_embeddings[0], seed=seed)
    with torch.no_grad():
        network.embeddings.cls_token.zero_()
    return network


def _random_gain(name: str) -> float:
    sharp = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")
    return SHARP_GAIN if name.endswith(sharp) else 1.0


def _load(settings: Dinov2Config, tensors: dict[str, Tensor], *, source: str) -> Dinov2Model:
    # from_pretrained, because saved names differ from this version's module names and transformers
    # keeps the renaming; it only warns about what does not fit, so its report is turned into an
    # error here.
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        loaded = Dinov2Model.from_pretrained(
            None,
            config=settings,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # With output_loading_info the library returns a pair, which its annotation leaves out.
    network, report = cast("tuple[Dinov2Model, dict[str, Any]]", loaded)
    check_same_network(
        source=source,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        mismatched=[
            f"{name} is {tuple(found)}, expected {tuple(expected)}"
            for name, found, expected in report["mismatched_keys"]
        ],
    )
    return network


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_progress_bar:
            transformers_logging.enable_progress_bar()

"""Settings of the factorized tokenizer; the defaults are FQGAN's f16 models.

Source: FQGAN, arXiv 2411.16681, sizes from the released code; LlamaGen's VQ-16 (the baseline).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from fqgan_dist.config import Config
from fqgan_dist.weights.config import WeightsConfig

GROUP_NORM_EPS = 1e-6
"""Epsilon of every GroupNorm; torch's default of 1e-5 is not the released models'."""
LAYER_NORM_EPS = 1e-5
"""Epsilon of every LayerNorm in adapters and feature heads."""
TORCH_NAMES = (
    "add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double "
    "dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter "
    "get_submodule half ipu items keys load_state_dict modules mtia named_buffers named_children "
    "named_modules named_parameters parameters pop register_backward_hook register_buffer "
    "register_forward_hook register_forward_pre_hook register_full_backward_hook "
    "register_full_backward_pre_hook register_load_state_dict_post_hook "
    "register_load_state_dict_pre_hook register_module register_parameter "
    "register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state "
    "set_submodule share_memory smart_apply state_dict to to_empty train training type update "
    "values xpu zero_grad"
)
"""What no codebook may be called: an `nn.ModuleDict` keeps these names for itself. Written out, so
that a config is read without importing torch; a test compares it with torch's own.
transformers adds smart_apply."""


class AdapterConfig(Config):
    """The transformer that turns shared encoder features into those of one codebook."""

    num_layers: PositiveInt = 6
    """Transformer blocks."""
    num_heads: PositiveInt = 8
    """Attention heads; divides the channels of the deepest level, the adapter's width."""


class FeatureHeadConfig(Config):
    """The transformer that predicts a teacher's feature from one codebook's quantized map."""

    num_layers: PositiveInt = 3
    """Transformer blocks."""
    num_heads: PositiveInt = 8
    """Attention heads; divides the feature size of every teacher."""


class CodebookConfig(Config):
    """One codebook: its name and, for a semantic one, the teacher whose feature it predicts."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name in metrics, reports and parameter names."""
    teacher: str | None = None
    """Name of the teacher; None for a codebook that learns from reconstruction alone."""
    feature_dim: PositiveInt | None = None
    """Size of the teacher's feature vector, which a run's config knows from the teacher; None
    without a teacher."""

    def find_problems(self) -> Iterator[str]:
        """Find a name that torch needs, and a feature of no teacher."""
        if self.name in TORCH_NAMES.split():
            yield f"name: {self.name!r} is a name that torch keeps for itself; rename it"
        if self.teacher is None and self.feature_dim is not None:
            yield f"feature_dim: {self.feature_dim} has no effect without a teacher; remove it"


class TokenizerConfig(Config):
    """Architecture of the tokenizer: image <-> K grids of codes."""

    image_size: PositiveInt = 256
    """Height and width of images, pixels."""
    base_channels: PositiveInt = 128
    """Channels of the finest level."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    """Channels of each level, finest first, in base_channels; sizes halve between levels."""
    num_res_blocks: PositiveInt = 2
    """Residual blocks per encoder level; the decoder has one more."""
    latent_channels: PositiveInt = 256
    """Channels between the convolutional networks and the 1 x 1 quantization convolutions."""
    num_groups: PositiveInt = 32
    """Groups of every GroupNorm; divides every level's channels."""
    adapter: AdapterConfig | None = AdapterConfig()
    """Feature adapter of each codebook; None is the VQGAN baseline (one codebook, no adapter)."""
    codebooks: Annotated[tuple[CodebookConfig, ...], Field(min_length=1)]
    """Codebooks in the order of codes and of the decoder's input: visual first."""
    codebook_size: Annotated[int, Field(ge=2)] = 16384
    """Codes per codebook, V."""
    code_dim: Annotated[int, Field(ge=2)] = 8
    """Dimensions of a code, D."""
    feature_head: FeatureHeadConfig = FeatureHeadConfig()
    """Feature-prediction head of every codebook with a teacher."""

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks, K."""
        return len(self.codebooks)

    @property
    def downsample(self) -> int:
        """Pixels per latent position along each axis, f."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """Latent positions along each axis, h = w."""
        return self.image_size // self.downsample

    @property
    def num_positions(self) -> int:
        """Latent positions of an image, T = h * w."""
        return self.grid_size**2

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def deepest_channels(self) -> int:
        """Channels of the coarsest level: the width of the adapters."""
        return self.level_channels[-1]

    def find_problems(self) -> list[str]:
        """Find sizes that do not go together and names that are given twice."""
        return [*self._size_problems(), *self._name_problems()]

    def _size_problems(self) -> list[str]:
        problems: list[str] = []
        if self.image_size % self.downsample:
            problems.append(
                f"image_size: {self.image_size} is not a multiple of {self.downsample}, which "
                f"{len(self.channel_multipliers)} levels downsample by; change image_size or "
                "channel_multipliers"
            )
        problems += [
            f"num_groups: {self.num_groups} does not divide the {channels} channels of a level; "
            "change num_groups or base_channels"
            for channels in sorted(set(self.level_channels))
            if channels % self.num_groups
        ]
        if self.adapter is None and self.num_codebooks > 1:
            problems.append(
                f"adapter: none, with {self.num_codebooks} codebooks; they would all see the same "
                "features: give an adapter or a single codebook"
            )
        if self.adapter is not None and self.deepest_channels % self.adapter.num_heads:
            problems.append(
                f"adapter.num_heads: {self.adapter.num_heads} does not divide the "
                f"{self.deepest_channels} channels of the deepest level"
            )
        problems += [
            f"feature_head.num_heads: {self.feature_head.num_heads} does not divide feature_dim "
            f"{codebook.feature_dim} of codebook {codebook.name!r}"
            for codebook in self.codebooks
            if codebook.feature_dim is not None
            and codebook.feature_dim % self.feature_head.num_heads
        ]
        return problems

    def _name_problems(self) -> list[str]:
        names = Counter(codebook.name for codebook in self.codebooks)
        teachers = Counter(codebook.teacher for codebook in self.codebooks if codebook.teacher)
        return [
            f"codebooks: {kind} {name!r} appears {count} times; each may appear once"
            for kind, counts in (("name", names), ("teacher", teachers))
            for name, count in counts.items()
            if count > 1
        ]


class DiscriminatorConfig(Config):
    """Architecture of the patch discriminator."""

    base_channels: PositiveInt = 64
    """Channels of the first convolution; they double per layer, up to 8 times as many."""
    num_layers: Annotated[int, Field(ge=1)] = 3
    """Convolutions with BatchNorm after the first; all but the last halve the size."""


_FORMER_HUB = "torchvision"


class PerceptualConfig(Config):
    """The frozen network whose features are compared."""

    network: Literal["vgg", "alex", "squeeze"] = "vgg"
    """VGG16 (the paper's), AlexNet or SqueezeNet 1.1."""
    weights: WeightsConfig = WeightsConfig(source="hub")
    """`hub` takes torchvision's ImageNet weights; a file is of torchvision's state dict. Read also
    as it was written formerly: `weights: torchvision`, `random` or a file, and `weights_sha256`."""
    dropout: bool = True
    """Whether half of the differences are dropped in train mode, as in the released training."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_spelling(cls, values: Any) -> Any:
        return modernize_perceptual(values)

    def identity(self, training_seed: int) -> dict[str, Any]:
        """Return the settings that decide the loss, as records of stages hold them.

        That is the former spelling, in which random weights took the training's seed.
        """
        weights = self.weights
        identity = {
            "network": self.network,
            "weights": _FORMER_HUB if weights.is_hub else weights.source,
            "weights_sha256": weights.sha256,
            "dropout": self.dropout,
        }
        if weights.is_random and weights.seed != training_seed:
            identity["weights_seed"] = weights.seed
        return identity


def modernize_perceptual(values: Any, *, training_seed: int = 0) -> Any:
    """Rewrite plain settings of the perceptual loss that are spelt as formerly; leave others alone.

    Args:
        values: as they were read.
        training_seed: which random weights were drawn from.
    """
    if not isinstance(values, dict) or isinstance(values.get("weights"), dict | WeightsConfig):
        return values
    source = values.get("weights", _FORMER_HUB)
    weights = {
        "source": "hub" if source == _FORMER_HUB else source,
        "sha256": values.get("weights_sha256"),
        "seed": training_seed if source == "random" else 0,
    }
    others = {name: value for name, value in values.items() if name != "weights_sha256"}
    return others | {"weights": weights}


class TokenizerLossConfig(Config):
    """Weights of the tokenizer's losses; the defaults are the released recipe's."""

    reconstruction_weight: float = Field(default=1.0, ge=0)
    """Mean squared error on [-1, 1] images."""
    perceptual_weight: float = Field(default=1.0, ge=0)
    """LPIPS."""
    adversarial_weight: float = Field(default=0.5, ge=0)
    """Of both sides of the GAN, from `discriminator_start_step` on."""
    discriminator_start_step: int = Field(default=20_000, ge=1)
    """First step in which the discriminator takes part."""
    codebook_weight: float = Field(default=1.0, ge=0)
    """Moves codes towards features."""
    commitment_weight: float = Field(default=0.25, ge=0)
    """Moves features towards codes."""
    entropy_weight: float = Field(default=0.03, ge=0)
    """Sharp assignments, even use; in the released scripts, not in the paper."""
    semantic_weight: float = Field(default=0.5, ge=0)
    """Lambda 2, per semantic codebook."""
    disentanglement_weight: float = Field(default=0.1, ge=0)
    """Lambda 1."""

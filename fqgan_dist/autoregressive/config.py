"""Settings of FAR, the factorized autoregressive model.

Source: FQGAN, arXiv 2411.16681, section on the factorized autoregressive model; the head's
alternatives are those of its Table 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fqgan_dist.config import Config


class AutoregressiveHeadConfig(Config):
    """Predict the K codes of a position one after the other with a small causal transformer."""

    kind: Literal["autoregressive"] = "autoregressive"
    """Which factor head this is."""
    num_layers: int = Field(ge=1)
    """Transformer blocks of the head; 3 in FAR-B, 4 in FAR-L."""


class LinearHeadConfig(Config):
    """Predict the K codes of a position independently, with one linear classifier each."""

    kind: Literal["linear"] = "linear"
    """Which factor head this is."""


class MlpHeadConfig(Config):
    """Predict the K codes of a position independently, with one two-layer MLP each."""

    kind: Literal["mlp"] = "mlp"
    """Which factor head this is."""
    hidden_multiple: int = Field(default=1, ge=1)
    """Width of each MLP's hidden layer, as a multiple of the backbone's width."""


FactorHeadConfig = Annotated[
    AutoregressiveHeadConfig | LinearHeadConfig | MlpHeadConfig, Field(discriminator="kind")
]

Probability = Annotated[float, Field(ge=0, lt=1)]


class AutoregressiveConfig(Config):
    """Architecture of a `FactorizedTransformer`."""

    num_codebooks: int = Field(ge=1)
    """K, codes per position; the order is the tokenizer's. In a run's config it follows from the
    tokenizer, as do the next two."""
    codebook_size: int = Field(ge=2)
    """V, codes per codebook."""
    grid_size: int = Field(ge=1)
    """Side of the square grid of codes; T is its square."""
    num_classes: int = Field(default=1000, ge=1)
    """Classes; the class embedding has one more row, the null class of classifier-free guidance."""
    width: int = Field(ge=4)
    """E, channels of the residual stream."""
    num_layers: int = Field(ge=1)
    """Transformer blocks of the backbone."""
    num_heads: int = Field(ge=1)
    """N, attention heads of the backbone's and the factor head's blocks."""
    factor_head: FactorHeadConfig
    """How a position's hidden state becomes K distributions over codes."""
    token_dropout: Probability = 0.1
    """Dropout on the backbone's input sequence, the class token included."""
    residual_dropout: Probability = 0.1
    """Dropout after each attention's output projection."""
    ffn_dropout: Probability = 0.1
    """Dropout after each feed-forward network."""
    class_dropout: Probability = 0.1
    """Probability with which training replaces a label by the null class."""
    ffn_multiple_of: int = Field(default=256, ge=1)
    """The feed-forward network's hidden width is rounded up to a multiple of this."""
    rope_base: float = Field(default=10000.0, gt=1)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square in every RMSNorm."""

    def find_problems(self) -> Iterator[str]:
        """Find sizes that do not go together."""
        if self.width % (4 * self.num_heads):
            # Of a head's rotation pairs, half turn by row and half by column: four channels.
            yield (
                f"width: {self.width} is not a multiple of 4 x num_heads ({4 * self.num_heads}); "
                f"nearest valid widths are {self._nearest_widths()}"
            )
        if self.num_codebooks > self.num_positions + 1:
            yield (
                f"num_codebooks: {self.num_codebooks} is more than the {self.num_positions + 1} "
                f"rows of the rotary table of grid_size {self.grid_size}; "
                "use a larger grid or fewer codebooks"
            )

    @property
    def num_positions(self) -> int:
        """T, positions of the grid and tokens of the backbone."""
        return self.grid_size**2

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def ffn_width(self) -> int:
        """Hidden channels of the SwiGLU: two thirds of 4 E, rounded up to `ffn_multiple_of`."""
        unrounded = int(2 * (4 * self.width) / 3)
        return -(-unrounded // self.ffn_multiple_of) * self.ffn_multiple_of

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    def _nearest_widths(self) -> str:
        unit = 4 * self.num_heads
        below = self.width // unit * unit
        return f"{below} and {below + unit}" if below else f"{unit}"


class SamplingConfig(Config):
    """How codes are drawn from the model's distributions."""

    guidance_scale: float = Field(default=1.0, ge=0)
    """Logits are null + scale x (class - null): 1 is the class alone, and costs half as much."""
    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int = Field(default=0, ge=0)
    """Draw among this many likeliest codes; 0 is off, 1 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the likeliest codes that make up this probability; 1 is off."""

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, temperature: float) -> float:
        if temperature <= 0:
            raise ValueError(
                f"{temperature!r} cannot divide the logits - expected above 0 - "
                "for greedy decoding set top_k: 1"
            )
        return temperature

    def find_problems(self) -> Iterator[str]:
        """Find what has no effect on greedy decoding."""
        if self.top_k == 1 and (self.temperature != 1 or self.top_p != 1):
            yield (
                f"temperature {self.temperature!r} and top_p {self.top_p!r} have no effect on "
                "greedy decoding (top_k 1) - leave both at 1, or set another top_k"
            )


class SamplesConfig(Config):
    """Images drawn from the generator."""

    count: int = Field(gt=0)
    """Number of samples."""
    chunk_size: int = Field(gt=0)
    """Samples per unit of work; part of the fingerprint."""
    seed: int = 0
    """Key of every sample's random numbers, with its id."""
    labels: Literal["balanced", "random"] = "balanced"
    """`balanced`: sample i has class i mod num_classes; `random`: each class is drawn uniformly by
    (seed, id), as in the paper."""
    sampling: SamplingConfig
    export: Literal["none", "npz", "png", "webdataset"] = "none"
    """Images to write besides the codes, with their labels, under `samples/exports/`; it moves no
    sample, so it may be asked for at any time."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the samples."""
        return self.model_dump(mode="json", exclude={"export"})

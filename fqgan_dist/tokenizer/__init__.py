"""FQGAN, the factorized tokenizer: an image to K grids of codes and back."""

from fqgan_dist.tokenizer.config import (
    AdapterConfig,
    CodebookConfig,
    FeatureHeadConfig,
    TokenizerConfig,
)
from fqgan_dist.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from fqgan_dist.tokenizer.losses import (
    disentanglement_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    info_nce_loss,
)
from fqgan_dist.tokenizer.model import FactorizedTokenizer, TokenizerOutput
from fqgan_dist.tokenizer.perceptual import (
    PerceptualConfig,
    PerceptualLoss,
    build_perceptual_loss,
)
from fqgan_dist.tokenizer.quantizer import nearest_codes

__all__ = [
    "AdapterConfig",
    "CodebookConfig",
    "DiscriminatorConfig",
    "FactorizedTokenizer",
    "FeatureHeadConfig",
    "PatchDiscriminator",
    "PerceptualConfig",
    "PerceptualLoss",
    "TokenizerConfig",
    "TokenizerOutput",
    "build_perceptual_loss",
    "disentanglement_loss",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "info_nce_loss",
    "nearest_codes",
]

"""FAR, the factorized autoregressive model: a class label to K grids of codes."""

from fqgan_dist.autoregressive.config import (
    AutoregressiveConfig,
    AutoregressiveHeadConfig,
    FactorHeadConfig,
    LinearHeadConfig,
    MlpHeadConfig,
)
from fqgan_dist.autoregressive.losses import compute_code_losses
from fqgan_dist.autoregressive.optimization import decay_groups
from fqgan_dist.autoregressive.sampling import SamplingConfig, draw_uniforms, generate_codes
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveHeadConfig",
    "FactorHeadConfig",
    "FactorizedTransformer",
    "LinearHeadConfig",
    "MlpHeadConfig",
    "SamplingConfig",
    "compute_code_losses",
    "decay_groups",
    "draw_uniforms",
    "generate_codes",
]

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from fqgan_dist.config import parse_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.tokenizer.config import TORCH_NAMES, CodebookConfig, TokenizerConfig

CODEBOOKS = [{"name": "visual"}, {"name": "semantic", "teacher": "clip", "feature_dim": 64}]


def parse(**changes: object) -> TokenizerConfig:
    return parse_config({"codebooks": CODEBOOKS, **changes}, TokenizerConfig, source="test")


def test_derived_sizes() -> None:
    config = parse()
    assert (config.num_codebooks, config.downsample, config.grid_size) == (2, 16, 16)
    assert config.level_channels == (128, 128, 256, 256, 512)


def test_eight_fold_downsampling() -> None:
    assert parse(channel_multipliers=[1, 2, 2, 4]).grid_size == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 250}, "image_size: 250 is not a multiple of 16"),
        ({"num_groups": 48}, "num_groups: 48 does not divide the 128 channels"),
        ({"adapter": None}, "adapter: none, with 2 codebooks"),
        ({"adapter": {"num_heads": 7}}, "adapter.num_heads: 7 does not divide the 512 channels"),
        (
            {"feature_head": {"num_heads": 7}},
            "feature_head.num_heads: 7 does not divide feature_dim 64 of codebook 'semantic'",
        ),
        ({"codebooks": [CODEBOOKS[0]] * 2}, "name 'visual' appears 2 times"),
        (
            {"codebooks": [CODEBOOKS[1], {**CODEBOOKS[1], "name": "other"}]},
            "teacher 'clip' appears 2 times",
        ),
        (
            {"codebooks": [{"name": "visual", "feature_dim": 64}]},
            "feature_dim: 64 has no effect without a teacher",
        ),
        ({"codebooks": [{"name": "items"}]}, "'items' is a name that torch keeps"),
        ({"codebooks": [{"name": "Visual.1"}]}, "codebooks.0.name"),
        ({"codebooks": []}, "codebooks"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    assert message in str(caught.value)


def test_baseline_has_one_codebook_and_no_adapter() -> None:
    config = parse(codebooks=[{"name": "visual"}], adapter=None, codebook_size=32768)
    assert config.adapter is None
    assert config.codebooks == (CodebookConfig(name="visual"),)


def test_the_names_that_torch_keeps_are_those_of_the_installed_torch() -> None:
    # In a process of its own: libraries that other tests import add names to torch's modules.
    code = "from torch import nn; print(*dir(nn.ModuleDict()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept = {name for name in done.stdout.split() if re.match(r"[a-z]", name)}
    assert "training" in kept
    # Other releases of torch that the library runs on have lost or not yet got a few of them.
    assert kept - set(TORCH_NAMES.split()) == set()

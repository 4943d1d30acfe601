from __future__ import annotations

from pathlib import Path

import pytest

from fqgan_dist.autoregressive.config import AutoregressiveConfig, LinearHeadConfig, MlpHeadConfig
from fqgan_dist.config import dump_config, load_config, parse_config
from fqgan_dist.errors import ConfigError

VALUES = {
    "num_codebooks": 2,
    "codebook_size": 64,
    "grid_size": 16,
    "width": 64,
    "num_layers": 2,
    "num_heads": 4,
    "factor_head": {"kind": "mlp", "hidden_multiple": 3},
}


def parse(**changes: object) -> AutoregressiveConfig:
    return parse_config(VALUES | changes, AutoregressiveConfig, source="test")


def test_kind_selects_the_head_settings():
    assert parse().factor_head == MlpHeadConfig(hidden_multiple=3)
    assert parse(factor_head={"kind": "linear"}).factor_head == LinearHeadConfig()


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match=r"factor_head.*'autoregressive', 'linear', 'mlp'"):
        parse(factor_head={"kind": "convolutional"})


def test_width_that_heads_cannot_share_is_refused():
    with pytest.raises(
        ConfigError, match=r"72 is not a multiple of 4 x num_heads .* are 64 and 80"
    ):
        parse(width=72)


def test_more_codebooks_than_rotary_rows_are_refused():
    assert parse(num_codebooks=5, grid_size=2).num_positions == 4
    with pytest.raises(ConfigError, match="num_codebooks: 6 is more than the 5 rows"):
        parse(num_codebooks=6, grid_size=2)


@pytest.mark.parametrize("field", ["token_dropout", "class_dropout"])
def test_a_dropout_of_one_is_refused(field: str):
    with pytest.raises(ConfigError, match=field):
        parse(**{field: 1.0})


@pytest.mark.parametrize(
    ("width", "multiple_of", "ffn_width"), [(128, 64, 384), (1024, 256, 2816), (1280, 256, 3584)]
)
def test_ffn_width_is_two_thirds_of_four_widths_rounded_up(
    width: int, multiple_of: int, ffn_width: int
):
    assert parse(width=width, ffn_multiple_of=multiple_of).ffn_width == ffn_width


def test_config_survives_yaml(tmp_path: Path):
    path = tmp_path / "far.yaml"
    path.write_text(dump_config(parse()))
    assert load_config(path, [], AutoregressiveConfig) == parse()

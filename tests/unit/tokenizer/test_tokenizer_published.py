from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from fqgan_dist.errors import CheckpointError, ConfigError
from fqgan_dist.tokenizer.config import (
    AdapterConfig,
    CodebookConfig,
    FeatureHeadConfig,
    TokenizerConfig,
)
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.published import (
    from_published_state_dict,
    map_to_published_key,
    read_published_file,
    to_published_state_dict,
)

CODEBOOKS = (
    CodebookConfig(name="look"),
    CodebookConfig(name="meaning", teacher="clip", feature_dim=8),
)


def small_config(*codebooks: CodebookConfig, **changes: object) -> TokenizerConfig:
    values: dict[str, object] = {
        "image_size": 8,
        "base_channels": 4,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "latent_channels": 4,
        "num_groups": 2,
        "adapter": AdapterConfig(num_layers=1, num_heads=2),
        "codebooks": codebooks or CODEBOOKS,
        "codebook_size": 16,
        "code_dim": 4,
        "feature_head": FeatureHeadConfig(num_layers=1, num_heads=2),
    }
    return TokenizerConfig.model_validate({**values, **changes})


def test_round_trip_keeps_every_tensor() -> None:
    config = small_config()
    state = FactorizedTokenizer(config).state_dict()
    published = to_published_state_dict(state, config)
    assert published["quantize_sem.codebook_used"].shape == (65536,)
    back = from_published_state_dict(published, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_names_go_by_position() -> None:
    config = small_config()
    key = "branches.meaning.adapter.transformer.blocks.0.attention.in_proj.weight"
    assert (
        map_to_published_key(key, config)
        == "encoder.semantic_head.0.transformer.0.attn.in_proj_weight"
    )


def test_baseline_uses_llamagens_names() -> None:
    config = small_config(CodebookConfig(name="visual"), adapter=None)
    published = to_published_state_dict(FactorizedTokenizer(config).state_dict(), config)
    assert {
        "encoder.norm_out.weight",
        "encoder.conv_out.weight",
        "quant_conv.weight",
        "quantize.embedding.weight",
        "quantize.codebook_used",
    } <= published.keys()


def test_feature_heads_can_be_dropped() -> None:
    config = small_config()
    published = to_published_state_dict(FactorizedTokenizer(config).state_dict(), config)
    state = from_published_state_dict(published, config, with_feature_heads=False)
    FactorizedTokenizer(config, with_feature_heads=False).load_state_dict(state)


def test_file_without_feature_heads_is_accepted() -> None:
    config = small_config()
    slim = FactorizedTokenizer(config, with_feature_heads=False)
    published = to_published_state_dict(slim.state_dict(), config)
    slim.load_state_dict(from_published_state_dict(published, config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.conv_out.bias": None}, r"decoder\.conv_out\.bias: missing"),
        ({"feat_pred_head.ln_pre.bias": None}, r"feat_pred_head\.ln_pre\.bias: missing"),
        ({"surprise": torch.zeros(1)}, "surprise: unknown"),
        ({"decoder.conv_out.bias": torch.zeros(4)}, r"shape \(4,\), expected \(3,\)"),
    ],
)
def test_other_architecture_is_refused(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    config = small_config()
    published = to_published_state_dict(FactorizedTokenizer(config).state_dict(), config)
    changed = {**published, **change}
    with pytest.raises(CheckpointError, match=message):
        from_published_state_dict(
            {name: value for name, value in changed.items() if value is not None}, config
        )


def test_four_codebooks_have_no_released_layout() -> None:
    config = small_config(*(CodebookConfig(name=f"code{index}") for index in range(4)))
    with pytest.raises(ConfigError, match="4 codebooks have no released layout"):
        map_to_published_key("decoder.conv_out.bias", config)


def test_teacher_of_the_visual_codebook_has_no_released_layout() -> None:
    config = small_config(*CODEBOOKS[::-1])
    state = FactorizedTokenizer(config).state_dict()
    with pytest.raises(ConfigError, match="no feature head at this codebook's position"):
        to_published_state_dict(state, config)


def test_released_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "released.pt"
    weights = {"decoder.conv_out.bias": torch.arange(3.0)}
    content = {"model": weights, "steps": 5, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, path)
    assert torch.equal(
        read_published_file(path)["decoder.conv_out.bias"], weights["decoder.conv_out.bias"]
    )
    torch.save({**content, "ema": {"decoder.conv_out.bias": torch.ones(3)}}, path)
    assert read_published_file(path)["decoder.conv_out.bias"].tolist() == [1, 1, 1]


class Dangerous:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def test_file_that_would_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile.pt"
    torch.save({"model": {}, "extra": Dangerous()}, path)
    with pytest.raises(CheckpointError, match="cannot be read as a released model"):
        read_published_file(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"weights": {}}, [1, 2], {"model": {"step": 3}}])
def test_file_without_weights_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_published_file(path)

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fqgan_dist.tokenizer.config import (
    AdapterConfig,
    CodebookConfig,
    FeatureHeadConfig,
    TokenizerConfig,
)
from fqgan_dist.tokenizer.model import FactorizedTokenizer

CODEBOOKS = (
    CodebookConfig(name="visual"),
    CodebookConfig(name="semantic_mid", teacher="dinov2", feature_dim=8),
    CodebookConfig(name="semantic_high", teacher="clip", feature_dim=16),
    CodebookConfig(name="extra"),
)


def small_config(num_codebooks: int = 3, **changes: object) -> TokenizerConfig:
    values: dict[str, object] = {
        "image_size": 16,
        "base_channels": 8,
        "channel_multipliers": (1, 2, 4),
        "num_res_blocks": 1,
        "latent_channels": 8,
        "num_groups": 4,
        "adapter": AdapterConfig(num_layers=1, num_heads=2),
        "codebooks": CODEBOOKS[:num_codebooks],
        "codebook_size": 32,
        "code_dim": 4,
        "feature_head": FeatureHeadConfig(num_layers=1, num_heads=2),
    }
    return TokenizerConfig.model_validate({**values, **changes})


def build(config: TokenizerConfig, **options: bool) -> FactorizedTokenizer:
    torch.manual_seed(0)
    return FactorizedTokenizer(config, **options)


def draw_images(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("num_codebooks", [1, 2, 3, 4])
def test_shapes_for_any_number_of_codebooks(num_codebooks: int) -> None:
    model = build(small_config(num_codebooks))
    output = model(draw_images())
    assert output.reconstruction.shape == (2, 3, 16, 16)
    assert output.codes.shape == (2, num_codebooks, 4, 4)
    assert output.codes.dtype == torch.int64
    assert [each.shape for each in output.quantized] == [(2, 4, 4, 4)] * num_codebooks
    assert {name: tuple(each.shape) for name, each in output.class_tokens.items()} == dict(
        [("dinov2", (2, 8)), ("clip", (2, 16))][: max(num_codebooks - 1, 0)]
    )
    for losses in (output.codebook_loss, output.commitment_loss, output.entropy_loss):
        assert losses.shape == (num_codebooks,)


def test_every_parameter_gets_a_gradient() -> None:
    model = build(small_config())
    output = model(draw_images())
    losses = [
        output.reconstruction.square().mean(),
        output.codebook_loss.sum(),
        output.commitment_loss.sum(),
        *(each.square().mean() for each in output.class_tokens.values()),
    ]
    torch.stack(losses).sum().backward()
    idle = [name for name, each in model.named_parameters() if each.grad is None]
    assert idle == []


def test_baseline_without_adapter() -> None:
    model = build(small_config(1, adapter=None))
    assert not any("transformer" in name for name, _ in model.named_parameters())
    images = draw_images()
    output = model.eval()(images)
    assert torch.equal(model.encode_codes(images), output.codes)


@pytest.mark.parametrize("codebook_size", [16384, 32768])
def test_full_size_baseline_is_llamagens_vq_16(codebook_size: int) -> None:
    config = TokenizerConfig(
        codebooks=(CodebookConfig(name="visual"),), adapter=None, codebook_size=codebook_size
    )
    with torch.device("meta"):
        model = FactorizedTokenizer(config)
        assert model.encode_codes(torch.empty(1, 3, 256, 256)).shape == (1, 1, 16, 16)
    count = sum(each.numel() for each in model.parameters())
    # Dual without heads, less two adapters (19.05 M each), one branch's output and one codebook.
    assert count - 8 * codebook_size == pytest.approx(71.8e6, rel=0.01)


def test_encoding_decoding_and_forward_agree() -> None:
    model = build(small_config()).eval()
    images = draw_images()
    with torch.no_grad():
        output = model(images)
        codes = model.encode_codes(images)
        decoded = model.decode_codes(codes)
    assert torch.equal(codes, output.codes)
    torch.testing.assert_close(decoded, output.reconstruction, rtol=0, atol=2e-5)


def test_forced_codes_decide_the_reconstruction() -> None:
    model = build(small_config()).eval()
    codes = torch.randint(0, 32, (2, 3, 4, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        output = model(draw_images(), codes=codes)
        expected = model.decode_codes(codes)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.reconstruction, expected, rtol=0, atol=2e-5)


def test_keep_zeroes_the_other_codebooks() -> None:
    model = build(small_config()).eval()
    codes = torch.randint(0, 32, (1, 3, 4, 4), generator=torch.Generator().manual_seed(3))
    other = codes.clone()
    other[:, [0, 2]] = (other[:, [0, 2]] + 1) % 32
    with torch.no_grad():
        kept = model.decode_codes(codes, keep=[1])
        assert torch.equal(kept, model.decode_codes(other, keep=[1]))
        assert not torch.allclose(kept, model.decode_codes(codes))
        everything = model.decode_codes(codes, keep=[0, 1, 2])
    torch.testing.assert_close(everything, model.decode_codes(codes), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [[3], [], [-1]])
def test_keep_refuses_what_is_no_codebook(keep: list[int]) -> None:
    with pytest.raises(ValueError, match="expected indices of codebooks"):
        build(small_config()).decode_codes(torch.zeros(1, 3, 4, 4, dtype=torch.int64), keep=keep)


@pytest.mark.parametrize(
    "codes", [torch.zeros(1, 2, 4, 4, dtype=torch.int64), torch.zeros(1, 3, 4, 4)]
)
def test_codes_of_other_shape_or_type_are_refused(codes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, 4, 4\) int64"):
        build(small_config()).decode_codes(codes)


def test_images_of_other_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\)"):
        build(small_config())(draw_images(size=32))


def test_eval_mode_has_no_losses() -> None:
    output = build(small_config()).eval()(draw_images())
    assert output.codebook_loss is None
    assert output.commitment_loss is None
    assert output.entropy_loss is None
    assert output.class_tokens.keys() == {"dinov2", "clip"}


def test_entropy_is_left_out_on_request() -> None:
    output = build(small_config())(draw_images(), compute_entropy=False)
    assert output.codebook_loss is not None
    assert output.entropy_loss is None


def test_model_without_heads_is_the_same_otherwise() -> None:
    model = build(small_config()).eval()
    slim = build(small_config(), with_feature_heads=False).eval()
    state = model.state_dict()
    slim.load_state_dict(
        {name: value for name, value in state.items() if not name.startswith("feature_heads.")}
    )
    images = draw_images()
    output = slim(images)
    assert output.class_tokens == {}
    assert torch.equal(output.reconstruction, model(images).reconstruction)


def test_codes_under_autocast_come_from_fp32_lookups() -> None:
    model = build(small_config()).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(draw_images())
        expected = model.encode_codes(draw_images())
    assert torch.equal(output.codes, expected)
    assert all(each.dtype == torch.float32 for each in output.quantized)


def test_output_holds_nothing_but_documented_fields() -> None:
    names = {field.name for field in dataclasses.fields(build(small_config())(draw_images()))}
    assert names == {
        "reconstruction",
        "codes",
        "quantized",
        "class_tokens",
        "codebook_loss",
        "commitment_loss",
        "entropy_loss",
    }


def test_training_lowers_the_reconstruction_loss() -> None:
    model = build(small_config())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images = draw_images(4)
    history: list[float] = []
    for _ in range(25):
        output = model(images)
        loss = (output.reconstruction - images).square().mean()
        total = loss + output.codebook_loss.sum() + 0.25 * output.commitment_loss.sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]

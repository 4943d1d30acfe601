from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fqgan_dist.tokenizer import quantizer as quantizer_module
from fqgan_dist.tokenizer.precision import full_precision
from fqgan_dist.tokenizer.quantizer import VectorQuantizer, nearest_codes


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_quantizer(codebook_size: int = 50, code_dim: int = 4) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(codebook_size, code_dim)


def exact_nearest(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    units = F.normalize(vectors, dim=1).double(), F.normalize(codebook, dim=1).double()
    distances = torch.cdist(*units)
    two = distances.topk(2, dim=1, largest=False).values
    return distances.argmin(dim=1), two[:, 1] - two[:, 0] > 1e-6


@pytest.mark.parametrize("spread", [1.0, 0.15], ids=["uniform", "clustered"])
def test_nearest_codes_are_those_of_float64(spread: float) -> None:
    codebook = draw(1, 8, seed=1) + spread * draw(700, 8, seed=2)
    vectors = draw(1, 8, seed=1) + spread * draw(900, 8, seed=3)
    expected, is_clear = exact_nearest(vectors, codebook)
    assert is_clear.float().mean() > 0.99
    assert torch.equal(nearest_codes(vectors, codebook)[is_clear], expected[is_clear])


@pytest.mark.parametrize("block", [1, 64, 10_000])
def test_nearest_codes_do_not_depend_on_the_block(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, codebook = draw(130, 8, seed=4), draw(70, 8, seed=5)
    expected, _ = exact_nearest(vectors, codebook)
    monkeypatch.setattr(quantizer_module, "rows_per_block", lambda *_: block)
    assert torch.equal(nearest_codes(vectors, codebook), expected)


def test_lowest_code_wins_ties() -> None:
    codebook = draw(5, 4, seed=6).repeat(3, 1)
    # Parallel codes of other lengths are the same code; powers of two round alike.
    codebook[5:] *= 4
    assert nearest_codes(codebook, codebook).tolist() == [0, 1, 2, 3, 4] * 3


def test_lookup_is_fp32_under_autocast_and_reduced_matmul_precision() -> None:
    codebook = draw(1, 8, seed=7) + 0.05 * draw(500, 8, seed=8)
    vectors = draw(1, 8, seed=7) + 0.05 * draw(500, 8, seed=9)
    expected = nearest_codes(vectors, codebook)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(nearest_codes(vectors, codebook), expected)
            # The control: what a plain product would have picked here.
            units = F.normalize(vectors, dim=1), F.normalize(codebook, dim=1)
            assert not torch.equal((units[0] @ units[1].T).argmax(dim=1), expected)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_full_precision_gives_the_flags_back() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_nearest_codes_refuse_other_dimensions() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) and codebook \(5, 8\)"):
        nearest_codes(torch.zeros(3, 4), torch.zeros(5, 8))


def test_initial_codes_are_unit_vectors() -> None:
    codebook = build_quantizer().codebook
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(50))


def test_values_and_gradients_are_the_plain_formula_in_float64() -> None:
    module = build_quantizer().train()
    module.codebook.data.mul_(draw(50, 1, seed=10).abs() + 0.5)
    latents = draw(2, 4, 3, 5, seed=11).requires_grad_()
    output = module(latents, compute_entropy=False)
    weights = draw(2, 4, 3, 5, seed=12)
    loss = 2 * output.codebook_loss + 3 * output.commitment_loss
    (loss + (weights * output.quantized).sum()).backward()

    exact = latents.detach().double().requires_grad_()
    codebook = module.codebook.detach().double().requires_grad_()
    vectors = F.normalize(exact, dim=1)
    selected = F.normalize(codebook, dim=1)[output.codes].permute(0, 3, 1, 2)
    plain = 2 * (selected - vectors.detach()).square().mean()
    plain = plain + 3 * (selected.detach() - vectors).square().mean()
    # Straight through: the value is the code's, the gradient the vector's.
    (plain + (weights * vectors).sum()).backward()
    torch.testing.assert_close(output.quantized.double(), selected, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(latents.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(module.codebook.grad.double(), codebook.grad, rtol=1e-5, atol=1e-7)


def test_forced_codes_are_used() -> None:
    module = build_quantizer().eval()
    codes = torch.arange(12).reshape(1, 3, 4)
    output = module(draw(1, 4, 3, 4, seed=13), codes=codes)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.quantized, module.lookup(codes), rtol=0, atol=1e-6)


def test_codes_of_looked_up_codes_are_the_codes() -> None:
    module = build_quantizer()
    codes = torch.arange(48).reshape(2, 4, 6)
    assert torch.equal(module.encode_codes(module.lookup(codes)), codes)


def test_eval_mode_computes_no_losses() -> None:
    output = build_quantizer().eval()(draw(1, 4, 2, 2, seed=14))
    assert output.codebook_loss is None
    assert output.commitment_loss is None
    assert output.entropy_loss is None


def test_entropy_loss_is_left_out_on_request() -> None:
    output = build_quantizer().train()(draw(1, 4, 2, 2, seed=15), compute_entropy=False)
    assert output.codebook_loss is not None
    assert output.entropy_loss is None


def test_bfloat16_map_is_quantized_in_float32() -> None:
    module = build_quantizer().train()
    latents = draw(1, 4, 6, 6, seed=16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(latents)
    assert output.quantized.dtype == torch.float32
    assert torch.equal(output.codes, module(latents.float()).codes)

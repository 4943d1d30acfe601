from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fqgan_dist.tokenizer.layers import AttentionBlock, Downsample, Upsample
from fqgan_dist.tokenizer.transformer import SelfAttention


def test_attention_block_is_the_plain_formula() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(8, num_groups=2)
    features = torch.randn(2, 8, 3, 5)
    normed = F.group_norm(features, 2, block.norm.weight, block.norm.bias, eps=1e-6)
    query, key, value = (
        projection(normed).flatten(2) for projection in (block.query, block.key, block.value)
    )
    weights = (torch.einsum("bcq,bck->bqk", query, key) * 8**-0.5).softmax(dim=2)
    attended = torch.einsum("bqk,bck->bcq", weights, value).reshape(2, 8, 3, 5)
    torch.testing.assert_close(block(features), features + block.out(attended))


def test_downsampling_pads_right_and_bottom_only() -> None:
    layer = Downsample(1)
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    # The full 3 x 3 window fits at the top left; one row and one column of zeros at the far ends.
    assert layer(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9.0, 6.0], [6.0, 4.0]]


def test_upsampling_repeats_pixels_before_the_convolution() -> None:
    layer = Upsample(1)
    nn.init.zeros_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    with torch.no_grad():
        layer.conv.weight[0, 0, 1, 1] = 1
    result = layer(torch.tensor([[1.0, 2.0]]).reshape(1, 1, 1, 2))
    assert result[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_self_attention_is_torchs_multi_head_attention() -> None:
    torch.manual_seed(0)
    ours = SelfAttention(12, num_heads=3)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    renamed = {
        key.replace("in_proj.", "in_proj_"): value for key, value in ours.state_dict().items()
    }
    theirs.load_state_dict(renamed)
    tokens = torch.randn(2, 5, 12)
    expected = theirs(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(ours(tokens), expected)

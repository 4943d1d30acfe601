from __future__ import annotations

import math

import pytest
import torch

from fqgan_dist.autoregressive.rotary import RotaryTable, rotate

SIDE, HEAD_DIM = 3, 8


@pytest.fixture
def table() -> RotaryTable:
    return RotaryTable(SIDE, HEAD_DIM, base=100.0)


def rotate_slowly(channels: list[float], token: int) -> list[float]:
    """The definition, one pair at a time: first half of the pairs by row, second by column."""
    if token == 0:
        return [0.0] * len(channels)
    indices = divmod(token - 1, SIDE)
    quarter = len(channels) // 4
    rotated = []
    for pair in range(2 * quarter):
        angle = indices[pair // quarter] / 100.0 ** (2 * (pair % quarter) / (2 * quarter))
        even, odd = channels[2 * pair : 2 * pair + 2]
        rotated += [
            even * math.cos(angle) - odd * math.sin(angle),
            odd * math.cos(angle) + even * math.sin(angle),
        ]
    return rotated


def test_rotation_is_the_definition(table: RotaryTable):
    tokens = 1 + SIDE**2
    channels = torch.randn(1, tokens, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    expected = [rotate_slowly(channels[0, token, 0].tolist(), token) for token in range(tokens)]
    rotated = rotate(channels, table(0, tokens))
    torch.testing.assert_close(rotated[0, :, 0], torch.tensor(expected))


def test_class_token_rotates_to_zero_and_first_cell_stays(table: RotaryTable):
    channels = torch.ones(2, 2, 1, HEAD_DIM)
    class_token, first_cell = rotate(channels, table(0, 2)).unbind(1)
    assert not class_token.any()
    assert first_cell.equal(channels[:, 1])


def test_table_is_not_in_the_state_dict(table: RotaryTable):
    assert not table.state_dict()


def test_table_keeps_float32_angles_in_a_bfloat16_model(table: RotaryTable):
    cos, sin = table(0, 10)
    table.bfloat16()
    assert table.cos.dtype == table.sin.dtype == torch.float32
    assert table.cos.equal(cos)
    assert table.sin.equal(sin)


def test_table_is_filled_when_a_meta_model_gets_storage(table: RotaryTable):
    with torch.device("meta"):
        empty = RotaryTable(SIDE, HEAD_DIM, base=100.0)
    assert empty.cos.is_meta
    empty.to_empty(device="cpu")
    assert empty.cos.equal(table.cos)
    assert empty.sin.equal(table.sin)

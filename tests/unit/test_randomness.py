from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fqgan_dist.loss_group import LossGroup
from fqgan_dist.randomness import (
    derive_seed,
    keyed_torch_rng,
    numpy_generator,
    philox_words,
    torch_generator,
)

CPU = torch.device("cpu")
KEYS = st.lists(st.one_of(st.integers(), st.text(max_size=4)), min_size=1, max_size=3)


def test_seeds_are_what_they_were() -> None:
    # Written down: another value would give every stored crop, order and sample another meaning.
    assert derive_seed(0, "view", "n01440764_18", 3) == 3215347122134102854
    assert derive_seed(0) == 3696793467068528757


def test_seeds_do_not_depend_on_the_process() -> None:
    # Python's own hash() of a string differs from process to process.
    code = "from fqgan_dist.randomness import derive_seed; print(derive_seed(7, 'tokenizer', 2))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    assert int(result.stdout) == derive_seed(7, "tokenizer", 2)


@given(first=KEYS, second=KEYS)
def test_different_keys_have_different_seeds(
    first: list[int | str], second: list[int | str]
) -> None:
    same_types = [type(part) for part in first] == [type(part) for part in second]
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second and same_types)


@given(KEYS)
def test_seeds_fit_a_signed_64_bit_integer(key: list[int | str]) -> None:
    assert 0 <= derive_seed(*key) < 2**63


def test_a_number_and_its_text_are_different_keys() -> None:
    assert derive_seed(1) != derive_seed("1")
    assert derive_seed("a", "b") != derive_seed("ab")
    assert derive_seed("a\x1fstr:b") != derive_seed("a", "b")


def test_an_integer_from_numpy_is_the_same_key() -> None:
    assert derive_seed(np.int32(3), np.uint8(4)) == derive_seed(3, 4)


@pytest.mark.parametrize("part", [1.0, None, True, b"x"])
def test_other_keys_are_refused(part: object) -> None:
    with pytest.raises(TypeError, match="expected int or str"):
        derive_seed(part)  # pyright: ignore[reportArgumentType] the point


def test_generators_repeat_their_key_s_numbers() -> None:
    assert np.array_equal(numpy_generator(1, "a").random(5), numpy_generator(1, "a").random(5))
    assert not np.array_equal(numpy_generator(1, "a").random(5), numpy_generator(1, "b").random(5))
    first = torch.rand(5, generator=torch_generator(1, "a"))
    assert torch.equal(first, torch.rand(5, generator=torch_generator(1, "a")))
    assert not torch.equal(first, torch.rand(5, generator=torch_generator(2, "a")))


def test_a_keyed_block_draws_the_same_whatever_was_drawn_before() -> None:
    with keyed_torch_rng(3, "dropout", device=CPU):
        first = torch.rand(4)
    torch.rand(7)
    with keyed_torch_rng(3, "dropout", device=CPU):
        assert torch.equal(torch.rand(4), first)


def test_a_keyed_block_leaves_the_default_generator_as_it_was() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    with keyed_torch_rng(3, device=CPU):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


def test_an_error_in_a_keyed_block_restores_the_generator_too() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    with pytest.raises(RuntimeError, match="inside"), keyed_torch_rng(3, device=CPU):
        raise RuntimeError(f"inside, at {torch.rand(1)}")
    assert torch.equal(torch.rand(3), expected)


DTYPES = [torch.float32, torch.bfloat16, torch.float64]
PROBABILITIES = [0.1, 0.3, 0.5]


def draw_alone_and_together(
    whole: torch.Tensor, probability: float, size: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two dropouts and uniform numbers of one rank, and those of its members put together."""

    def draw(images: torch.Tensor) -> list[torch.Tensor]:
        return [
            functional.dropout(images, probability),
            functional.dropout(images, probability, training=True),
            torch.rand(images.shape[:1], device=whole.device),
            torch.rand(len(images), 2, device=whole.device),
        ]

    with keyed_torch_rng(3, device=whole.device):
        alone = draw(whole)
    parts: list[list[torch.Tensor]] = []
    for member in range(size):
        group = LossGroup(member=member, size=size)
        with keyed_torch_rng(3, device=whole.device, loss_group=group):
            parts.append(draw(whole[group.rows(len(whole) // size)]))
    return alone, [torch.cat(each) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_members_draw_their_rows_of_what_one_rank_draws(
    device: str, dtype: torch.dtype, probability: float
) -> None:
    whole = torch.randn(8, 33, 5, device=device).to(dtype)
    alone, together = draw_alone_and_together(whole, probability, 4)
    for one, several in zip(alone, together, strict=True):
        assert torch.equal(several, one)
    assert not torch.equal(alone[0], alone[1])


def test_members_draw_in_the_order_of_memory_as_one_rank_does() -> None:
    # The squeeze network's 1 x 1 convolutions give channels last.
    whole = torch.randn(4, 8, 5, 3).to(memory_format=torch.channels_last)
    alone, together = draw_alone_and_together(whole, 0.5, 2)
    for one, several in zip(alone, together, strict=True):
        assert torch.equal(several, one)


def test_a_member_s_dropout_has_the_gradient_of_dropout() -> None:
    images = torch.randn(2, 6, requires_grad=True)
    with keyed_torch_rng(3, device=CPU, loss_group=LossGroup(member=1, size=2)):
        dropped = functional.dropout(images, 0.4)
    dropped.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad * images.detach(), dropped.detach())


def test_a_member_drops_nothing_where_nobody_would() -> None:
    images = torch.randn(2, 6)
    with keyed_torch_rng(3, device=CPU, loss_group=LossGroup(member=1, size=2)):
        assert torch.equal(functional.dropout(images, 0.5, training=False), images)
        assert torch.equal(functional.dropout(images, 0.0), images)


def test_draws_that_members_would_not_share_are_refused() -> None:
    group = LossGroup(member=0, size=2)
    with (
        keyed_torch_rng(3, device=CPU, loss_group=group),
        pytest.raises(AssertionError, match="randn is not shared between members"),
    ):
        torch.randn(4)


@given(st.integers(0, 2**63), st.text(max_size=20), st.integers(0, 10**6))
def test_words_are_those_of_numpys_philox(seed: int, key: str, view: int) -> None:
    generator = numpy_generator(seed, "view", key, view)
    assert (
        list(philox_words(seed, "view", key, view))
        == generator.bit_generator.random_raw(4).tolist()
    )

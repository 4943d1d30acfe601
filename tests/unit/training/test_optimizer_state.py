from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fqgan_dist.errors import CheckpointError
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs, Span
from fqgan_dist.training.optimizer_state import (
    load_named_optimizer_state,
    named_optimizer_state,
    needed_optimizer_state,
    reset_optimizer_state,
)
from fqgan_dist.training.parameter_pieces import Piece, whole_pieces

VARIANTS = [
    pytest.param(kind, options, id=f"{kind.__name__}-{'-'.join(options) or 'default'}")
    for kind in (torch.optim.Adam, torch.optim.AdamW)
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True})
]


def _module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4, 2))


def _train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(5, 2, 4, 4, generator=generator)
        module(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def named_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return named_optimizer_state(whole_pieces(module, optimizer), optimizer)


def load_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    load_named_optimizer_state(whole_pieces(module, optimizer), optimizer, tensors)


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_training_continues_bit_for_bit(
    kind: type[torch.optim.Adam], options: dict[str, Any]
) -> None:
    module = _module()
    optimizer = kind(module.parameters(), lr=1e-2, weight_decay=0.1, **options)
    _train(module, optimizer, range(3))
    weights, state = _copy(module.state_dict()), _copy(named_state(module, optimizer))
    _train(module, optimizer, range(3, 6))

    resumed = _module()
    resumed.load_state_dict(weights)
    fresh = kind(resumed.parameters(), lr=1e-2, weight_decay=0.1, **options)
    load_state(resumed, fresh, state)
    _train(resumed, fresh, range(3, 6))

    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True)
    )
    expected = named_state(module, optimizer)
    found = named_state(resumed, fresh)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {found[name].item() for name in found if name.endswith(".step")} == {6.0}


def test_loading_replaces_the_state_of_an_optimizer_that_has_stepped() -> None:
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    _train(module, optimizer, range(2))
    state = _copy(named_state(module, optimizer))
    _train(module, optimizer, range(2, 5))
    load_state(module, optimizer, state)
    found = named_state(module, optimizer)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_names_are_those_of_parameters_also_before_the_first_step() -> None:
    module = nn.Linear(2, 3)
    state = named_state(module, torch.optim.AdamW(module.parameters()))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "weight.step": (),
        "weight.exp_avg": (3, 2),
        "weight.exp_avg_sq": (3, 2),
        "bias.step": (),
        "bias.exp_avg": (3,),
        "bias.exp_avg_sq": (3,),
    }
    assert not any(tensor.any() for tensor in state.values())


def test_loading_an_unstepped_state_trains_as_a_fresh_optimizer() -> None:
    plain, loaded = _module(), _module()
    first = torch.optim.Adam(plain.parameters(), lr=1e-2, fused=True)
    second = torch.optim.Adam(loaded.parameters(), lr=1e-2, fused=True)
    load_state(loaded, second, _copy(named_state(plain, first)))
    _train(plain, first, range(3))
    _train(loaded, second, range(3))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), loaded.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.bias.exp_avg"), r"missing 0\.bias\.exp_avg"),
        (lambda state: state.update({"9.bias.step": torch.tensor(1.0)}), r"unknown 9\.bias\.step"),
        (
            lambda state: state.update({"0.bias.exp_avg": torch.zeros(4)}),
            r"0\.bias\.exp_avg is float32 \(4,\), expected float32 \(3,\)",
        ),
        (
            lambda state: state.update({"0.bias.exp_avg": torch.zeros(3).half()}),
            r"float16 \(3,\), expected float32",
        ),
    ],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(change: Any, message: str) -> None:
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    _train(module, optimizer, range(2))
    before = _copy(named_state(module, optimizer))
    state = {name: tensor + 1 for name, tensor in before.items()}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        load_state(module, optimizer, state)
    after = named_state(module, optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_parameters_outside_the_optimizer_have_no_state() -> None:
    module = _module()
    module[0].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad])
    assert {name.split(".")[0] for name in named_state(module, optimizer)} == {"2"}


def test_a_parameter_of_another_module_is_refused() -> None:
    optimizer = torch.optim.Adam(_module().parameters())
    with pytest.raises(ValueError, match=r"not of Sequential"):
        named_state(_module(), optimizer)


def test_another_optimizer_is_refused() -> None:
    module = _module()
    with pytest.raises(ValueError, match=r"SGD: only torch's Adam and AdamW"):
        named_state(module, torch.optim.SGD(module.parameters(), lr=0.1))


def halves(size: int) -> list[tuple[Tensor, dict[str, Piece]]]:
    """Two ranks' parts of `a` (2, 3) and `b` (2,), laid end to end: 4 elements each."""
    first, second = torch.zeros(size, requires_grad=True), torch.zeros(size, requires_grad=True)
    return [
        (first, {"a": Piece(first, (2, 3), 0, 0, 4), "b": Piece(first, (2,), 0, 0, 0)}),
        (second, {"a": Piece(second, (2, 3), 4, 0, 2), "b": Piece(second, (2,), 0, 2, 2)}),
    ]


def whole_state() -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, shape in (("a", (2, 3)), ("b", (2,))):
        state[f"{name}.step"] = torch.tensor(3.0)
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{name}.{key}"] = torch.rand(shape)
    return state


def test_partitions_load_whole_state_and_share_it_once() -> None:
    state = whole_state()
    merged: dict[str, Tensor] = {}
    for owner, pieces in halves(4):
        optimizer = torch.optim.Adam([owner], fused=True)
        load_named_optimizer_state(pieces, optimizer, state)
        for name, value in named_optimizer_state(pieces, optimizer).items():
            if isinstance(value, Fragment):
                whole = merged.setdefault(name, torch.full((state[name].numel(),), torch.nan))
                assert value.shape == tuple(state[name].shape)
                assert whole[value.start : value.start + len(value.tensor)].isnan().all()
                whole[value.start : value.start + len(value.tensor)] = value.tensor
            else:
                assert name not in merged
                merged[name] = value
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name].view(state[name].shape), state[name]) for name in state)


def cut(tensors: dict[str, Tensor], needs: Needs) -> dict[str, Tensor | Fragment]:
    """Cut whole tensors as a reader gives what is needed of them."""
    found: dict[str, Tensor | Fragment] = {}
    for name, tensor in tensors.items():
        span = needs.get(name, Span(0, 0))
        if span is None:
            found[name] = tensor
        else:
            piece = tensor.reshape(-1)[span.start : span.start + span.count]
            found[name] = Fragment(piece, span.start, tuple(tensor.shape))
    return found


def test_partitions_need_their_own_moments_and_load_them_alone() -> None:
    state = whole_state()
    for owner, pieces in halves(4):
        optimizer, expected = torch.optim.Adam([owner], fused=True), torch.optim.Adam([owner])
        needs = needed_optimizer_state(pieces, optimizer)
        load_named_optimizer_state(pieces, optimizer, cut(state, needs))
        load_named_optimizer_state(pieces, expected, state)
        for key, tensor in expected.state[owner].items():
            assert torch.equal(optimizer.state[owner][key], tensor)
    needs = needed_optimizer_state(pieces, optimizer)
    assert needs["a.exp_avg"] == Span(4, 2)
    assert needs["b.exp_avg_sq"] == Span(0, 2)
    assert {name for name, span in needs.items() if span is None} == {"a.step", "b.step"}


def test_a_partition_without_elements_needs_one_count_of_steps() -> None:
    owner = torch.zeros(2, requires_grad=True)
    pieces = {name: Piece(owner, (2, 3), 6, 0, 0) for name in "ab"}
    optimizer = torch.optim.Adam([owner], fused=True)
    needs = needed_optimizer_state(pieces, optimizer)
    assert [name for name, span in needs.items() if span is None] == ["a.step"]


def test_state_that_was_not_read_is_refused() -> None:
    owner, pieces = halves(4)[1]
    optimizer = torch.optim.Adam([owner], fused=True)
    needs = dict(needed_optimizer_state(pieces, optimizer))
    needs["a.exp_avg"] = Span(0, 2)
    with pytest.raises(ValueError, match=r"2 elements from 4 of a tensor of shape \(2, 3\)"):
        load_named_optimizer_state(pieces, optimizer, cut(whole_state(), needs))
    del needs["a.step"]
    with pytest.raises(ValueError, match=r"a\.step: was not read"):
        load_named_optimizer_state(pieces, optimizer, cut(whole_state(), needs))


def test_the_state_of_a_partition_before_its_first_step_is_made_once() -> None:
    owner, pieces = halves(4)[1]
    named = named_optimizer_state(pieces, torch.optim.Adam([owner], fused=True))
    for key in ("exp_avg", "exp_avg_sq"):
        values = [named[f"{name}.{key}"] for name in pieces]
        assert all(isinstance(value, Fragment) for value in values)
        storages = {value.tensor.untyped_storage().data_ptr() for value in values}  # pyright: ignore[reportAttributeAccessIssue] a fragment, see above
        assert len(storages) == 1


def test_a_partition_refuses_parameters_that_were_stepped_differently_often() -> None:
    owner, pieces = halves(4)[1]
    state = whole_state() | {"b.step": torch.tensor(4.0)}
    with pytest.raises(CheckpointError, match=r"b was stepped 4 times and a 3 times"):
        load_named_optimizer_state(pieces, torch.optim.Adam([owner], fused=True), state)


def test_resetting_sets_the_count_of_steps_and_clears_the_moments() -> None:
    module = _module()
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    _train(module, optimizer, range(2))
    reset_optimizer_state(whole_pieces(module, optimizer), optimizer, num_steps=7)
    for name, tensor in named_state(module, optimizer).items():
        assert torch.equal(tensor, torch.full_like(tensor, 7.0 if name.endswith("step") else 0.0))

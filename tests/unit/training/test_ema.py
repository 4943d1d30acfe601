from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fqgan_dist.errors import CheckpointError
from fqgan_dist.training.ema import ExponentialMovingAverage


def _module(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def _change(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_update_equals_the_reference_formula_to_the_bit() -> None:
    module = _module()
    ema = ExponentialMovingAverage(parameters(module), 0.9)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    for _ in range(5):
        _change(module)
        ema.update(parameters(module))
        for name, parameter in module.named_parameters():
            expected[name].mul_(0.9).add_(parameter.detach(), alpha=1 - 0.9)
    state = ema.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_average_of_bf16_parameters_is_float32() -> None:
    module = _module().to(torch.bfloat16)
    ema = ExponentialMovingAverage(parameters(module), 0.999)
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    _change(module)
    ema.update(parameters(module))
    for name, parameter in module.named_parameters():
        average = ema.state_dict()[name]
        expected = before[name] * 0.999 + parameter.detach().float() * (1 - 0.999)
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)


def test_state_round_trips_into_another_average() -> None:
    module = _module()
    ema = ExponentialMovingAverage(parameters(module), 0.9)
    _change(module)
    ema.update(parameters(module))
    other = ExponentialMovingAverage(parameters(_module(1)), 0.9)
    other.load_state_dict(ema.state_dict())
    for name, tensor in ema.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_state_of_another_model_is_refused() -> None:
    ema = ExponentialMovingAverage(parameters(_module()), 0.9)
    state = ema.state_dict()
    state["other.weight"] = state.pop("0.weight")
    with pytest.raises(CheckpointError, match=r"missing 0.weight; unknown other.weight"):
        ema.load_state_dict(state)


def test_update_from_another_model_is_refused() -> None:
    ema = ExponentialMovingAverage(parameters(_module()), 0.9)
    with pytest.raises(ValueError, match="parameters differ from the averaged ones in"):
        ema.update(parameters(nn.Linear(3, 4)))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 2.0])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ExponentialMovingAverage(parameters(_module()), decay)

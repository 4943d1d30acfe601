from __future__ import annotations

from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fqgan_dist.config import parse_config
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.tokenizer.config import PerceptualConfig
from fqgan_dist.tokenizer.perceptual import PerceptualLoss, build_perceptual_loss
from fqgan_dist.weights.config import WeightsConfig


def make_random(seed: int) -> PerceptualConfig:
    return PerceptualConfig(network="squeeze", weights=WeightsConfig(source="random", seed=seed))


def make_file(path: Path, *, sha256: str | None = None) -> WeightsConfig:
    return WeightsConfig(source=str(path), sha256=sha256)


@pytest.fixture(scope="module")
def random_loss() -> PerceptualLoss:
    return build_perceptual_loss(make_random(1))


def draw_images(seed: int) -> Tensor:
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def torchvision_names(loss: PerceptualLoss) -> dict[str, Tensor]:
    state = loss.network.net.state_dict()
    return {f"features.{name.split('.', 1)[1]}": value for name, value in state.items()}


def test_value_and_gradient_are_those_of_lpips(random_loss: PerceptualLoss) -> None:
    loss = random_loss.eval()
    ours, theirs = draw_images(1).requires_grad_(), draw_images(1).requires_grad_()
    found = loss(ours, draw_images(2))
    expected = loss.network(theirs, draw_images(2)).mean()
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9)


def test_equal_images_have_no_distance(random_loss: PerceptualLoss) -> None:
    assert random_loss.eval()(draw_images(1), draw_images(1)).item() == 0


def test_random_features_tell_images_apart(random_loss: PerceptualLoss) -> None:
    loss, image = random_loss.eval(), draw_images(1)
    near = loss((image + 0.05 * draw_images(2)).clamp(-1, 1), image)
    assert 0 < near.item() < 0.5 * loss(draw_images(3), image).item()


def test_nothing_is_trainable_and_the_target_gets_no_gradient(random_loss: PerceptualLoss) -> None:
    target = draw_images(2).requires_grad_()
    random_loss(draw_images(1).requires_grad_(), target).backward()
    assert target.grad is None
    assert not any(parameter.requires_grad for parameter in random_loss.parameters())


def test_gradient_is_finite_where_all_features_are_zero(random_loss: PerceptualLoss) -> None:
    # The input that the scaling layer maps to 0; without biases all features are then 0.
    blank = random_loss.network.scaling_layer.shift.expand(1, 3, 48, 48).clone().requires_grad_()
    random_loss.eval()(blank, draw_images(2)[:1]).backward()
    assert torch.isfinite(blank.grad).all()


def test_dropout_is_active_in_train_mode_only(random_loss: PerceptualLoss) -> None:
    def draw_twice() -> tuple[float, float]:
        values = [random_loss(draw_images(1), draw_images(2)).item() for _ in range(2)]
        return values[0], values[1]

    random_loss.train()
    assert len(set(draw_twice())) == 2
    random_loss.eval()
    assert len(set(draw_twice())) == 1


def test_dropout_can_be_left_out() -> None:
    loss = build_perceptual_loss(make_random(1).model_copy(update={"dropout": False}))
    assert loss.training
    assert loss(draw_images(1), draw_images(2)) == loss(draw_images(1), draw_images(2))


def test_random_weights_follow_the_seed_and_leave_torchs_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    losses = [build_perceptual_loss(make_random(seed)).eval() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    values = [loss(draw_images(1), draw_images(2)).item() for loss in losses]
    assert values[0] == values[1] != values[2]


def test_random_weights_are_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    build_perceptual_loss(make_random(1))
    assert "not comparable with published numbers" in caplog.text


def test_linear_weights_are_those_of_lpips(random_loss: PerceptualLoss) -> None:
    bundled = Path(lpips.__file__).parent / "weights" / "v0.1" / "squeeze.pth"
    expected = torch.load(bundled, map_location="cpu", weights_only=True)["lin0.model.1.weight"]
    assert torch.equal(random_loss.network.lins[0].model[1].weight, expected)


def test_weights_of_a_file(random_loss: PerceptualLoss, tmp_path: Path) -> None:
    path = tmp_path / "squeezenet.safetensors"
    save_file({**torchvision_names(random_loss), "classifier.1.weight": torch.zeros(3)}, path)
    config = PerceptualConfig(network="squeeze", weights=make_file(path))
    expected = random_loss.eval()(draw_images(1), draw_images(2))
    loaded = build_perceptual_loss(config).eval()
    assert torch.equal(loaded(draw_images(1), draw_images(2)), expected)
    remote = WeightsConfig(source="s3://bucket/squeezenet.safetensors")
    fetched = PerceptualConfig(network="squeeze", weights=remote)
    copied = build_perceptual_loss(fetched, weights_path=path).eval()
    assert torch.equal(copied(draw_images(1), draw_images(2)), expected)


def test_weights_of_another_network_are_refused(
    random_loss: PerceptualLoss, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.safetensors"
    state = torchvision_names(random_loss)
    save_file({**state, "features.0.weight": torch.zeros(2, 3, 3, 3)}, path)
    with pytest.raises(DataError, match="1 tensors have another shape"):
        build_perceptual_loss(PerceptualConfig(network="squeeze", weights=make_file(path)))
    with pytest.raises(DataError, match="tensors are missing"):
        build_perceptual_loss(PerceptualConfig(network="alex", weights=make_file(path)))


def test_missing_file_is_named(tmp_path: Path) -> None:
    config = PerceptualConfig(network="squeeze", weights=make_file(tmp_path / "none.safetensors"))
    with pytest.raises(DataError, match=r"none\.safetensors: weights cannot be read"):
        build_perceptual_loss(config)


def test_other_bytes_than_the_pinned_ones_are_refused(
    random_loss: PerceptualLoss, tmp_path: Path
) -> None:
    path = tmp_path / "squeezenet.safetensors"
    save_file(torchvision_names(random_loss), path)
    config = PerceptualConfig(network="squeeze", weights=make_file(path, sha256="0" * 64))
    with pytest.raises(DataError, match="sha256 is"):
        build_perceptual_loss(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "imagenet"}, "weights.source: 'imagenet' is no weights source"),
        ({"weights": "random", "weights_sha256": "0" * 64}, "random weights have no file to check"),
        ({"weights": {"source": "hub"}, "weights_sha256": "0" * 64}, "weights_sha256: unknown"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, PerceptualConfig, source="test")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("former", "weights"),
    [
        ({}, {"source": "hub"}),
        ({"weights": "torchvision"}, {"source": "hub"}),
        ({"weights": "random"}, {"source": "random"}),
        (
            {"weights": "a/b.safetensors", "weights_sha256": "0" * 64},
            {"source": "a/b.safetensors", "sha256": "0" * 64},
        ),
    ],
)
def test_the_former_spelling_is_read_and_kept_in_records(
    former: dict[str, str], weights: dict[str, str]
) -> None:
    config = parse_config({"network": "alex", **former}, PerceptualConfig, source="test")
    assert config == parse_config(
        {"network": "alex", "weights": weights}, PerceptualConfig, source="test"
    )
    assert config.identity(training_seed=0) == {
        "network": "alex",
        "weights": "torchvision",
        "weights_sha256": None,
        "dropout": True,
        **former,
    }


def test_a_record_holds_the_seed_of_random_weights_if_it_is_not_the_trainings() -> None:
    assert "weights_seed" not in make_random(3).identity(training_seed=3)
    assert make_random(3).identity(training_seed=0)["weights_seed"] == 3


def test_shapes_must_agree(random_loss: PerceptualLoss) -> None:
    with pytest.raises(ValueError, match="expected the same shape"):
        random_loss(draw_images(1), draw_images(2)[:1])

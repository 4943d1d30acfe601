from __future__ import annotations

import logging
import urllib.error
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from support.photograph_crops import draw_crops, draw_noise
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.evaluation.config import InceptionConfig
from fqgan_dist.evaluation.fid import frechet_distance
from fqgan_dist.evaluation.inception import InceptionFeatures, build_inception, download_inception
from fqgan_dist.evaluation.inception_score import compute_inception_score
from fqgan_dist.evaluation.moments import Moments, compute_moments, fold
from fqgan_dist.weights.config import WeightsConfig
from fqgan_dist.weights.files import save_safetensors

RESOLUTION = 75


def make_config(source: str = "random", **weights: object) -> InceptionConfig:
    return InceptionConfig(
        weights=WeightsConfig.model_validate({"source": source, **weights}), resolution=RESOLUTION
    )


@pytest.fixture(scope="module")
def inception() -> InceptionFeatures:
    return build_inception(make_config(), device="cpu")


def compute_features(inception: InceptionFeatures, images: Tensor) -> Tensor:
    return torch.cat([inception(part)[0] for part in images.split(32)])


@pytest.fixture(scope="module")
def photographs(inception: InceptionFeatures) -> Tensor:
    return compute_features(inception, draw_crops(22, 0))


def test_random_features_differ_and_do_not_vanish(photographs: Tensor):
    assert photographs.shape == (264, 2048)
    assert photographs.dtype == torch.float32
    spread = photographs.std(dim=0)
    assert (spread > 0.05).float().mean() > 0.99
    assert spread.max() < 100


@pytest.mark.full("seconds of a large network; other tests would see the same")
def test_fid_can_fail(inception: InceptionFeatures, photographs: Tensor):
    """Noise is far from photographs, other crops of them are near, and worse images are between."""
    reference = compute_moments(photographs)
    crops = draw_crops(22, 1)
    other_crops = compute_moments(compute_features(inception, crops))
    noise = compute_moments(compute_features(inception, draw_noise(128)))
    coarse = torch.nn.functional.avg_pool2d(crops.float(), 4).repeat_interleave(4, 2)
    blurred = compute_moments(
        compute_features(inception, coarse.repeat_interleave(4, 3).to(torch.uint8))
    )
    near = frechet_distance(reference, other_crops)
    assert frechet_distance(reference, noise) > 100 * near
    assert frechet_distance(reference, blurred) > 3 * near


def test_dropping_a_chunk_changes_fid(photographs: Tensor):
    def fold_chunks(features: Tensor, skipped: int | None = None) -> Moments:
        parts = enumerate(features.split(33))
        return fold((i, compute_moments(part)) for i, part in parts if i != skipped)

    reference, samples = photographs[::2], photographs[1::2]
    whole = frechet_distance(fold_chunks(reference), fold_chunks(samples))
    assert frechet_distance(fold_chunks(reference), fold_chunks(samples, skipped=1)) > 1.1 * whole


def test_random_logits_tell_images_apart(inception: InceptionFeatures):
    images = draw_crops(3, 0)
    _, logits = inception(images)
    assert logits.shape == (36, 1008)
    assert compute_inception_score(logits).mean > 1.05


def test_features_do_not_depend_on_the_batch(inception: InceptionFeatures):
    images = draw_crops(1, 0)[:4]
    together, _ = inception(images)
    alone = torch.cat([inception(image[None])[0] for image in images])
    # To float32's rounding: kernels are chosen by the batch, and differ with the processor (1.3e-4
    # on an EPYC of 2021). A batch norm that was left in training refuses a single image.
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
    assert torch.linalg.vector_norm(together - alone) < 1e-4 * torch.linalg.vector_norm(alone)


def test_random_weights_are_a_function_of_the_seed(inception: InceptionFeatures):
    again = build_inception(make_config(), device="cpu")
    other = build_inception(make_config(seed=1), device="cpu")
    for name, tensor in inception.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.evaluator_id == inception.evaluator_id
    assert other.evaluator_id != inception.evaluator_id
    images = draw_crops(1, 0)[:1]
    assert not torch.allclose(other(images)[0], inception(images)[0])


@pytest.mark.full("seconds of a large network; other tests would see the same")
def test_random_weights_do_not_depend_on_the_number_of_threads(inception: InceptionFeatures):
    torch.set_num_threads(2)
    try:
        again = build_inception(make_config(), device="cpu")
    finally:
        torch.set_num_threads(1)
    for name, tensor in inception.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_building_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    build_inception(make_config(), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_are_said_in_the_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        build_inception(make_config(), device="cpu")
    assert "random weights (seed 0): not comparable with published numbers" in caplog.text


def test_a_file_gives_what_torch_fidelity_computes_from_it(
    inception: InceptionFeatures, tmp_path: Path
):
    state = inception.network.state_dict()
    sha256 = save_safetensors(tmp_path / "inception.safetensors", state)
    torch.save(state, tmp_path / "inception.pth")
    ours = build_inception(
        InceptionConfig(
            weights=WeightsConfig(source=str(tmp_path / "inception.safetensors"), sha256=sha256)
        ),
        device="cpu",
    )
    theirs = FeatureExtractorInceptionV3(
        "theirs",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(tmp_path / "inception.pth"),
    )
    images = draw_crops(1, 0)[:1]
    for found, expected in zip(ours(images), theirs(images), strict=True):
        assert torch.equal(found, expected)


def test_evaluator_id_names_resolution_and_weights_whatever_the_file(
    inception: InceptionFeatures, tmp_path: Path
):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_safetensors(path, inception.network.state_dict())
    ids = [build_inception(make_config(str(path)), device="cpu").evaluator_id for path in paths]
    assert ids[0] == ids[1]
    assert "/75px/" in ids[0]
    assert ids[0] != inception.evaluator_id


def test_stays_in_evaluation_mode_without_gradients(inception: InceptionFeatures):
    inception.train()
    assert not any(module.training for module in inception.modules())
    assert not any(parameter.requires_grad for parameter in inception.parameters())


def test_computes_in_float32_under_autocast(inception: InceptionFeatures):
    images = draw_crops(1, 0)[:2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = inception(images)
    assert torch.equal(features, inception(images)[0])
    assert logits.dtype == torch.float32


def test_wrong_images_are_refused(inception: InceptionFeatures):
    with pytest.raises(ValueError, match="uint8"):
        inception(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="Bx3xHxW"):
        inception(torch.zeros(1, 1, 64, 64, dtype=torch.uint8))


def test_wrong_weights_are_named(inception: InceptionFeatures, tmp_path: Path):
    state = inception.network.state_dict()
    state["fc.weight"] = torch.zeros(1000, 2048)
    del state["fc.bias"]
    save_safetensors(tmp_path / "wrong.safetensors", state)
    with pytest.raises(DataError, match=r"fc\.bias.*fc\.weight is \(1000, 2048\)"):
        build_inception(make_config(str(tmp_path / "wrong.safetensors")), device="cpu")


def test_a_remote_file_must_be_staged(inception: InceptionFeatures, tmp_path: Path):
    config = make_config("s3://bucket/inception.safetensors")
    with pytest.raises(ConfigError, match="stage it first"):
        build_inception(config, device="cpu")
    staged = tmp_path / "staged.safetensors"
    save_safetensors(staged, inception.network.state_dict())
    build_inception(config, device="cpu", weights_path=staged)
    with pytest.raises(ConfigError, match="takes no file"):
        build_inception(make_config(), device="cpu", weights_path=staged)


def test_hub_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(
        DataError, match=r"cannot be downloaded.*fqgan weights fetch CONFIG to=DIR`"
    ):
        build_inception(make_config("hub"), device="cpu")


def test_hub_file_is_taken_from_the_cache(
    inception: InceptionFeatures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    torch.save(inception.network.state_dict(), cached)
    assert download_inception() == cached
    images = draw_crops(1, 0)[:1]
    loaded = build_inception(make_config("hub"), device="cpu")
    assert torch.equal(loaded(images)[0], inception(images)[0])


def test_resolution_below_the_smallest_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 75"):
        InceptionConfig(weights=WeightsConfig(source="random"), resolution=64)

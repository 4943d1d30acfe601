from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.photograph_crops import draw_crops
from transformers import Dinov2Config, Dinov2Model
from transformers.utils import logging as transformers_logging

from fqgan_dist.errors import DataError
from fqgan_dist.teachers.config import Dinov2Architecture, Dinov2TeacherConfig
from fqgan_dist.teachers.dinov2 import build_dinov2, download_dinov2
from fqgan_dist.teachers.teacher import build_teacher
from fqgan_dist.weights.config import WeightsConfig
from fqgan_dist.weights.files import load_safetensors_checked, save_safetensors

# Position embeddings of a larger image than the input, as the published networks have.
SIZES = Dinov2Architecture(image_size=96, patch_size=8, width=48, num_layers=2, num_heads=4)


def make_config(path: Path, sizes: Dinov2Architecture = SIZES) -> Dinov2TeacherConfig:
    weights = WeightsConfig(source=str(path))
    return Dinov2TeacherConfig(architecture=sizes, weights=weights, input_size=64)


@pytest.fixture(scope="module")
def published() -> Dinov2Model:
    """A small network of transformers' own class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = Dinov2Config(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            patch_size=8,
            image_size=96,
            initializer_range=0.2,
        )
        return Dinov2Model(settings).eval()


@pytest.fixture(scope="module")
def checkpoint(published: Dinov2Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by transformers itself: its names differ from the module's."""
    folder = tmp_path_factory.mktemp("dinov2")
    published.save_pretrained(folder)
    return folder / "model.safetensors"


def test_feature_is_the_class_token_after_the_final_norm(published: Dinov2Model, checkpoint: Path):
    pixels = draw_crops(1, 0)[:4].float() / 64 - 2
    network = build_dinov2(make_config(checkpoint), weights_path=None).eval()
    with torch.no_grad():
        expected = published(pixel_values=pixels).last_hidden_state[:, 0]
        assert torch.equal(network(pixels), expected)


def test_the_final_norm_is_applied(checkpoint: Path):
    features = build_teacher(make_config(checkpoint), device="cpu")(draw_crops(1, 0))
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(len(features)), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        features.std(dim=1, correction=0), torch.ones(len(features)), rtol=1e-3, atol=0
    )


def test_weights_of_another_network_are_refused(checkpoint: Path, tmp_path: Path):
    deeper = SIZES.model_copy(update={"num_layers": 3})
    with pytest.raises(DataError, match=r"missing \(encoder\.layer\.2"):
        build_teacher(make_config(checkpoint, deeper), device="cpu")
    wider = SIZES.model_copy(update={"width": 64})
    with pytest.raises(DataError, match=r"another shape \(embeddings\.cls_token is"):
        build_teacher(make_config(checkpoint, wider), device="cpu")
    tensors = load_safetensors_checked(checkpoint)
    del tensors["embeddings.cls_token"]
    damaged = tmp_path / "damaged.safetensors"
    save_safetensors(damaged, {**tensors, "head.weight": torch.zeros(2)})
    with pytest.raises(DataError, match=r"cls_token\).*unknown \(head\.weight\)"):
        build_teacher(make_config(damaged), device="cpu")


def test_loading_leaves_the_library_and_the_random_state_as_they_were(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
):
    before = torch.get_rng_state(), transformers_logging.get_verbosity()
    had_progress_bar = transformers_logging.is_progress_bar_enabled()
    build_dinov2(make_config(checkpoint), weights_path=None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert transformers_logging.get_verbosity() == before[1]
    assert transformers_logging.is_progress_bar_enabled() == had_progress_bar
    assert "Loading" not in "".join(capfd.readouterr())


def test_hub_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=r"(?s)transformers cannot download.*fqgan weights fetch CONFIG to=DIR`"
    ):
        download_dinov2("facebook/dinov2-small")


def test_full_size_hub_weights_load_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    repository = tmp_path / "models--facebook--dinov2-small"
    snapshot = repository / "snapshots" / "0123456789"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123456789")
    settings = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    Dinov2Model(settings).save_pretrained(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = Dinov2TeacherConfig(
        architecture="facebook/dinov2-small", weights=WeightsConfig(source="hub")
    )
    teacher = build_teacher(config, device="cpu")
    assert teacher(draw_crops(1, 0)[:1]).shape == (1, 384)

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from support.photograph_crops import draw_crops
from transformers import CLIPVisionConfig, CLIPVisionModel

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.teachers.clip import build_clip, download_clip
from fqgan_dist.teachers.config import PUBLISHED_CLIP, ClipArchitecture, ClipTeacherConfig
from fqgan_dist.teachers.teacher import build_teacher
from fqgan_dist.weights.config import WeightsConfig
from fqgan_dist.weights.files import save_safetensors

SIZES = ClipArchitecture(
    image_size=64, patch_size=8, width=64, num_layers=3, num_heads=1, projection_dim=32
)
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def make_config(path: Path, sizes: ClipArchitecture = SIZES) -> ClipTeacherConfig:
    return ClipTeacherConfig(architecture=sizes, weights=WeightsConfig(source=str(path)))


@pytest.fixture(scope="module")
def published() -> open_clip.CLIP:
    """A small network of open_clip's own class, as its published checkpoints hold."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"image_size": 64, "layers": 3, "width": 64, "patch_size": 8}
        network = open_clip.CLIP(
            embed_dim=32,
            vision_cfg=vision,  # pyright: ignore[reportArgumentType]
            text_cfg=TEXT,  # pyright: ignore[reportArgumentType]
            quick_gelu=True,
        )
    return network.eval()


@pytest.fixture(scope="module")
def checkpoint(published: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    save_safetensors(path, published.state_dict())
    return path


def draw_pixels() -> torch.Tensor:
    return draw_crops(1, 0)[:4].float() / 64 - 2


def test_feature_is_the_last_blocks_class_token_before_ln_post(
    published: open_clip.CLIP, checkpoint: Path
):
    outputs: list[torch.Tensor] = []
    last_block: Any = published.visual.transformer.resblocks[-1]
    handle = last_block.register_forward_hook(lambda *args: outputs.append(args[-1]))
    network = build_clip(make_config(checkpoint), weights_path=None).eval()
    with torch.no_grad():
        published.encode_image(draw_pixels())
        found = network(draw_pixels())
    handle.remove()
    torch.testing.assert_close(found, outputs[0][:, 0], rtol=0, atol=0)


def test_feature_equals_the_hidden_state_that_fqgan_reads(checkpoint: Path):
    """The paper's code takes hidden_states[-1][:, 0] of transformers' network; ours is
    open_clip's."""
    network = build_clip(make_config(checkpoint), weights_path=None).eval()
    settings = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=64,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    theirs = CLIPVisionModel(settings).eval()
    theirs.load_state_dict(to_transformers_names(network.visual.state_dict(), theirs))
    with torch.no_grad():
        expected = theirs(draw_pixels(), output_hidden_states=True).hidden_states[-1][:, 0]
        found = network(draw_pixels())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def to_transformers_names(
    visual: dict[str, torch.Tensor], theirs: CLIPVisionModel
) -> dict[str, torch.Tensor]:
    prefixed = any(name.startswith("vision_model.") for name in theirs.state_dict())
    prefix = "vision_model." if prefixed else ""
    renamed = {
        "embeddings.class_embedding": visual["class_embedding"],
        "embeddings.patch_embedding.weight": visual["conv1.weight"],
        "embeddings.position_embedding.weight": visual["positional_embedding"],
    }
    norms = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
    for block in range(3):
        ours, other = f"transformer.resblocks.{block}", f"encoder.layers.{block}"
        norms |= {f"{other}.layer_norm1": f"{ours}.ln_1", f"{other}.layer_norm2": f"{ours}.ln_2"}
        norms |= {f"{other}.mlp.fc1": f"{ours}.mlp.c_fc", f"{other}.mlp.fc2": f"{ours}.mlp.c_proj"}
        norms[f"{other}.self_attn.out_proj"] = f"{ours}.attn.out_proj"
        for part in ("weight", "bias"):
            split = visual[f"{ours}.attn.in_proj_{part}"].chunk(3)
            for name, tensor in zip("qkv", split, strict=True):
                renamed[f"{other}.self_attn.{name}_proj.{part}"] = tensor
    for name, source in norms.items():
        for part in ("weight", "bias"):
            renamed[f"{name}.{part}"] = visual[f"{source}.{part}"]
    return {prefix + name: tensor for name, tensor in renamed.items()}


def test_fingerprint_does_not_depend_on_the_text_tower(
    published: open_clip.CLIP, checkpoint: Path, tmp_path: Path
):
    visual_only = tmp_path / "visual.safetensors"
    state = published.state_dict()
    save_safetensors(visual_only, {n: t for n, t in state.items() if n.startswith("visual.")})
    whole = build_teacher(make_config(checkpoint), device="cpu")
    part = build_teacher(make_config(visual_only), device="cpu")
    assert whole.fingerprint == part.fingerprint


def test_weights_of_another_network_are_refused(checkpoint: Path, tmp_path: Path):
    wider = SIZES.model_copy(update={"width": 128, "num_heads": 2})
    with pytest.raises(DataError, match=r"another shape \(visual\.class_embedding is \(64,\)"):
        build_teacher(make_config(checkpoint, wider), device="cpu")
    deeper = SIZES.model_copy(update={"num_layers": 4})
    with pytest.raises(DataError, match=r"missing \(visual\.transformer\.resblocks\.3"):
        build_teacher(make_config(checkpoint, deeper), device="cpu")
    foreign = tmp_path / "foreign.safetensors"
    save_safetensors(foreign, {"vision_model.embeddings.class_embedding": torch.zeros(64)})
    with pytest.raises(DataError, match=r"unknown \(vision_model\."):
        build_teacher(make_config(foreign), device="cpu")


def test_wrong_sha256_is_refused(checkpoint: Path):
    weights = WeightsConfig(source=str(checkpoint), sha256="0" * 64)
    with pytest.raises(DataError, match="sha256 is"):
        build_teacher(ClipTeacherConfig(architecture=SIZES, weights=weights), device="cpu")


@pytest.mark.parametrize("name", PUBLISHED_CLIP)
def test_named_sizes_are_open_clips(name: str):
    settings = open_clip.get_model_config(name)
    assert settings["quick_gelu"]
    vision = settings["vision_cfg"]
    assert PUBLISHED_CLIP[name] == ClipArchitecture(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=vision["width"],
        num_layers=vision["layers"],
        num_heads=vision["width"] // vision.get("head_width", 64),
        projection_dim=settings["embed_dim"],
    )
    # Anything else would be another network than the plain vision transformer that we build.
    assert vision.keys() <= {"image_size", "layers", "width", "patch_size", "head_width"}


def test_hub_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=r"open_clip cannot download.*fqgan weights fetch CONFIG to=DIR`"
    ):
        download_clip("ViT-B-16-quickgelu")


def test_an_architecture_without_published_weights_is_refused():
    with pytest.raises(ConfigError, match="no 'openai' weights"):
        download_clip("ViT-H-14-quickgelu")


@pytest.mark.full("builds a network of full size; the loading is proven with a small one")
def test_full_size_hub_weights_load_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    repository = tmp_path / "models--timm--vit_base_patch16_clip_224.openai"
    snapshot = repository / "snapshots" / "0123456789"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789")
    network = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None).eval()
    save_safetensors(snapshot / "open_clip_model.safetensors", network.state_dict())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = ClipTeacherConfig(
        architecture="ViT-B-16-quickgelu", weights=WeightsConfig(source="hub")
    )
    teacher = build_teacher(config, device="cpu")
    assert teacher(draw_crops(1, 0)[:1]).shape == (1, 768)

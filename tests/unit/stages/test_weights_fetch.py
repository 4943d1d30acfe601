"""`fqgan weights fetch`; hub caches hold small networks of the libraries' own classes."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torchvision
from open_clip import pretrained as open_clip_pretrained
from transformers import Dinov2Config, Dinov2Model

from fqgan_dist.cli import DONE, FAILED, main
from fqgan_dist.command_line import WRONG_USAGE
from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.evaluation.inception import build_inception
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.weights_fetch import fetch_weights
from fqgan_dist.teachers.config import (
    PUBLISHED_CLIP,
    PUBLISHED_DINOV2,
    ClipArchitecture,
    Dinov2Architecture,
)
from fqgan_dist.teachers.teacher import build_teacher
from fqgan_dist.tokenizer.config import PerceptualConfig
from fqgan_dist.tokenizer.perceptual import build_perceptual_loss
from fqgan_dist.weights.config import FetchTarget, WeightsConfig
from fqgan_dist.weights.files import save_safetensors

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"

DINOV2_NAME, CLIP_NAME = "tests/dinov2-tiny", "tests-tiny-quickgelu"
DINOV2 = "teachers.networks.0"
CLIP = "teachers.networks.1"
HUB_DINOV2 = [f"{DINOV2}.architecture={DINOV2_NAME}", f"{DINOV2}.weights={{source: hub}}"]
HUB_CLIP = [f"{CLIP}.architecture={CLIP_NAME}", f"{CLIP}.weights={{source: hub}}"]
HUB_PERCEPTUAL = ["tokenizer.perceptual.weights=torchvision"]
HUB_INCEPTION = ["evaluation.inception.weights={source: hub}"]
HUB_TEACHERS = [*HUB_DINOV2, *HUB_CLIP]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty caches of all hubs, none of which can be reached, and two small published networks."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    sizes = {"image_size": 32, "patch_size": 8, "width": 16, "num_layers": 1, "num_heads": 2}
    monkeypatch.setitem(PUBLISHED_DINOV2, DINOV2_NAME, Dinov2Architecture(**sizes))
    clip_sizes = ClipArchitecture(**sizes, projection_dim=8)
    monkeypatch.setitem(PUBLISHED_CLIP, CLIP_NAME, clip_sizes)
    register_clip(monkeypatch, tmp_path)
    return folder


def register_clip(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    settings = {
        "embed_dim": 8,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 16,
            "patch_size": 8,
            "head_width": 8,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
    path = folder / "clip" / f"{CLIP_NAME}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(settings))
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", [path.parent])
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {})
    open_clip.add_model_config(path.parent)
    entry = {"openai": {"hf_hub": "tests/clip-tiny/"}}
    monkeypatch.setitem(open_clip_pretrained._PRETRAINED, CLIP_NAME, entry)


def make_snapshot(hub: Path, repository: str) -> Path:
    """Lay out a repository as the hub's client keeps it."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123456789"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123456789")
    return snapshot


def cache_dinov2(hub: Path, **changes: Any) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = Dinov2Config(**sizes, image_size=32, patch_size=8, **changes)
    Dinov2Model(settings).save_pretrained(make_snapshot(hub, DINOV2_NAME))


def cache_clip(hub: Path) -> None:
    network = open_clip.create_model(CLIP_NAME, pretrained=None)
    path = make_snapshot(hub, "tests/clip-tiny") / "open_clip_model.safetensors"
    save_safetensors(path, network.state_dict())


def cache_torch(hub: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    path = hub / "torch" / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def cache_squeeze(hub: Path) -> None:
    network = torchvision.models.squeezenet1_1(weights=None)
    cache_torch(hub, "squeezenet1_1-b8a52dc0.pth", network.state_dict())


def fetch(
    folder: Path, *overrides: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any], str]:
    """Run the command; return its exit code, what it prints as JSON, and its messages."""
    code = main(["weights", "fetch", str(TINY), f"to={folder}", *overrides, "--json"])
    output = capsys.readouterr()
    return code, json.loads(output.out), output.err


def states(report: dict[str, Any]) -> dict[str, str]:
    return {network["name"]: network["state"] for network in report["networks"]}


def test_fetched_teachers_are_those_of_the_hub(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache_dinov2(hub)
    cache_clip(hub)
    folder = tmp_path / "weights: 1"  # a name that YAML reads as a mapping unless it is quoted
    code, report, _ = fetch(folder, *HUB_TEACHERS, capsys=capsys)
    assert code == DONE
    expected = load_config(TINY, HUB_TEACHERS, RunConfig).teachers.networks
    found = load_config(TINY, [*HUB_TEACHERS, *report["overrides"]], RunConfig).teachers.networks
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.weights.is_file
        path = folder / f"{ours.name}.safetensors"
        assert ours.weights.source == str(path)
        assert ours.weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        fingerprint = build_teacher(theirs, device="cpu").fingerprint
        assert build_teacher(ours, device="cpu").fingerprint == fingerprint


def test_fetched_perceptual_network_is_torchvisions(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache_squeeze(hub)
    code, report, _ = fetch(tmp_path / "weights", *HUB_PERCEPTUAL, capsys=capsys)
    assert code == DONE
    config = load_config(TINY, report["overrides"], RunConfig).tokenizer.perceptual
    assert config.weights.is_file
    assert config.weights.sha256 is not None
    found = build_perceptual_loss(config).state_dict()
    hub_config = PerceptualConfig(network="squeeze")
    for name, tensor in build_perceptual_loss(hub_config).state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_fetched_inception_is_the_hubs(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tiny = load_config(TINY, [], RunConfig).evaluation.inception
    network = build_inception(tiny, device="cpu").network
    cache_torch(hub, "weights-inception-2015-12-05-6726825d.pth", network.state_dict())
    code, report, _ = fetch(tmp_path / "weights", *HUB_INCEPTION, capsys=capsys)
    assert code == DONE
    config = load_config(TINY, report["overrides"], RunConfig).evaluation.inception
    hub_config = config.model_copy(update={"weights": WeightsConfig(source="hub")})
    expected = build_inception(hub_config, device="cpu").evaluator_id
    assert build_inception(config, device="cpu").evaluator_id == expected


def test_a_second_fetch_keeps_the_files(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache_dinov2(hub)
    _, first, _ = fetch(tmp_path / "weights", *HUB_DINOV2, capsys=capsys)
    path = tmp_path / "weights" / "dinov2.safetensors"
    written_ns = path.stat().st_mtime_ns
    code, second, _ = fetch(tmp_path / "weights", *HUB_DINOV2, capsys=capsys)
    assert code == DONE
    assert (states(first)["dinov2"], states(second)["dinov2"]) == ("written", "kept")
    assert first["overrides"] == second["overrides"]
    assert path.stat().st_mtime_ns == written_ns


def test_a_file_with_other_bytes_is_not_overwritten(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache_dinov2(hub)
    path = tmp_path / "dinov2.safetensors"
    path.write_bytes(b"of another run")
    code, report, message = fetch(tmp_path, *HUB_DINOV2, capsys=capsys)
    assert code == FAILED
    assert report["overrides"] == []
    assert f"{path}: is there with other bytes" in message
    assert path.read_bytes() == b"of another run"


def test_files_and_random_weights_need_nothing(hub: Path, tmp_path: Path):
    given = f"{DINOV2}.weights={{source: /elsewhere/dinov2.safetensors}}"
    config = load_config(TINY, [given], RunConfig)
    result = fetch_weights(config, FetchTarget(to=str(tmp_path / "weights")))
    assert [network.state for network in result.networks] == ["not needed"] * 4
    assert "(dinov2): not needed, weights are /elsewhere/dinov2.safetensors" in result.text
    assert not (tmp_path / "weights").exists()


def test_without_access_every_network_is_named_and_the_others_are_fetched(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache_clip(hub)
    settings = [*HUB_TEACHERS, *HUB_PERCEPTUAL, *HUB_INCEPTION]
    code, report, message = fetch(tmp_path / "weights", *settings, capsys=capsys)
    assert code == FAILED
    assert states(report) == {
        "dinov2": "failed",
        "clip": "written",
        "perceptual-squeeze": "failed",
        "inception": "failed",
    }
    assert [text.partition("=")[0] for text in report["overrides"]] == [f"{CLIP}.weights"]
    assert "DataError: 3 of 4 network(s) could not be fetched; repeat the command on" in message
    for network in (
        rf"teachers\.networks\.0 \(dinov2\): {DINOV2_NAME}: transformers cannot download",
        r"tokenizer\.perceptual \(perceptual-squeeze\): .*squeezenet1_1-.*cannot be downloaded",
        r"evaluation\.inception \(inception\): .*cannot be downloaded",
    ):
        assert re.search(network, message)
    assert message.count("`fqgan weights fetch CONFIG to=DIR`") == 3


def damage_dinov2(hub: Path) -> None:
    cache_dinov2(hub, mlp_ratio=2)


def damage_squeeze(hub: Path) -> None:
    cache_squeeze(hub)
    path = hub / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage_fn", "settings", "problem"),
    [
        (damage_dinov2, HUB_DINOV2, "not the weights of the configured network"),
        (damage_squeeze, HUB_PERCEPTUAL, "squeezenet1_1-b8a52dc0.pth: not"),
    ],
)
def test_weights_of_another_network_are_not_written(
    damage_fn: Callable[[Path], None],
    settings: list[str],
    problem: str,
    hub: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    damage_fn(hub)
    code, _, message = fetch(tmp_path / "weights", *settings, capsys=capsys)
    assert code == FAILED
    assert problem in message
    assert not (tmp_path / "weights").exists()


def test_text_gives_settings_that_a_shell_takes(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache_dinov2(hub)
    folder = tmp_path / "my weights"
    assert main(["weights", "fetch", str(TINY), f"to={folder}", *HUB_DINOV2]) == DONE
    text = capsys.readouterr().out
    sha256 = hashlib.sha256((folder / "dinov2.safetensors").read_bytes()).hexdigest()
    group = f"{{source: {folder}/dinov2.safetensors, sha256: {sha256}}}"
    assert f"  '{DINOV2}.weights={group}'\n" in text
    assert "evaluation.inception (inception): not needed, weights are random" in text


@pytest.mark.parametrize("target", [[], ["to="]])
def test_a_directory_is_required(target: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["weights", "fetch", str(TINY), *target]) == WRONG_USAGE
    assert "to: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "problem"), [("inception", "name of two networks"), ("a/b", "cannot be a file's")]
)
def test_names_that_make_no_files_are_refused(name: str, problem: str, hub: Path, tmp_path: Path):
    settings = [*HUB_DINOV2, *HUB_INCEPTION, f"{DINOV2}.name={name}"]
    book = f"tokenizer.model.codebooks.1.teacher={name}"
    config = load_config(TINY, [*settings, book], RunConfig)
    with pytest.raises(ConfigError, match=problem):
        fetch_weights(config, FetchTarget(to=str(tmp_path)))

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
from open_clip import pretrained as open_clip_pretrained

from fqgan_dist.config import load_config
from fqgan_dist.diagnosis.verdict import Verdict
from fqgan_dist.diagnosis.weights import check_file, check_weights
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.frozen_networks import needed_weights
from fqgan_dist.weights.files import save_safetensors

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"
HUB = (
    "teachers.networks.0.architecture=facebook/dinov2-small",
    "teachers.networks.0.weights={source: hub}",
    "teachers.networks.0.input_size=28",
    "teachers.networks.1.architecture=ViT-B-16-quickgelu",
    "teachers.networks.1.weights={source: hub}",
    "tokenizer.perceptual.weights=torchvision",
    "evaluation.inception.weights={source: hub}",
)


def check_all(*overrides: str) -> dict[str, Verdict]:
    config = load_config(TINY, overrides, RunConfig)
    return {needed.field: check_weights(needed) for needed in needed_weights(config)}


@pytest.fixture
def weights_file(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "weights.safetensors"
    return path, save_safetensors(path, {"weight": torch.ones(300)})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty caches of hubs that cannot be reached."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tmp_path


def test_random_weights_are_said_to_be_random() -> None:
    verdicts = check_all()
    assert list(verdicts) == [
        "teachers.networks.0.weights",
        "teachers.networks.1.weights",
        "tokenizer.perceptual.weights",
        "evaluation.inception.weights",
    ]
    for verdict in verdicts.values():
        assert verdict.status == "ok"
        assert "not comparable with published numbers" in verdict.finding


def test_a_hub_that_is_neither_cached_nor_reachable_fails(hub: Path) -> None:
    for verdict in check_all(*HUB).values():
        assert verdict.status == "failed"
        assert "neither cached nor reachable" in verdict.finding
        assert "fqgan weights fetch" in verdict.advice


def test_cached_weights_need_no_hub(hub: Path) -> None:
    clip = open_clip_pretrained.get_pretrained_cfg("ViT-B-16-quickgelu", "openai")["hf_hub"]
    put_in_repository(hub, "facebook/dinov2-small", "model.safetensors")
    put_in_repository(hub, clip.rstrip("/"), "open_clip_model.safetensors")
    checkpoints = hub / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("squeezenet1_1-b8a52dc0.pth", "weights-inception-2015-12-05-6726825d.pth"):
        (checkpoints / name).touch()
    for verdict in check_all(*HUB).values():
        assert verdict.status == "ok", verdict
        assert "in this node's cache" in verdict.finding


def put_in_repository(hub: Path, repository: str, name: str) -> None:
    folder = hub / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / name).touch()


def test_a_file_with_the_given_sha256_is_ok(weights_file: tuple[Path, str]) -> None:
    path, sha256 = weights_file
    assert check_file("x", str(path), sha256).finding.endswith("sha256 as given")
    assert "no sha256 is given" in check_file("x", str(path), None).finding


def test_another_sha256_fails(weights_file: tuple[Path, str]) -> None:
    path, sha256 = weights_file
    verdict = check_file("x", str(path), "0" * 64)
    assert verdict.status == "failed"
    assert f"sha256 is {sha256}, expected {'0' * 64}" in verdict.finding


def test_a_missing_file_fails(tmp_path: Path) -> None:
    verdict = check_file("x", str(tmp_path / "none.safetensors"), None)
    assert verdict.status == "failed"
    assert "no such file on this node" in verdict.finding


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"<html>404 not found</html>", "not a safetensors file"),
        (b"", "not a safetensors file"),
        ((5).to_bytes(8, "little") + b"[1,2]", "not a safetensors file"),
        (safetensors.torch.save({"a": torch.ones(4)})[:-3], "bytes, expected"),
        *(
            (len(text).to_bytes(8, "little") + text, "not a safetensors file")
            for text in (b'{"a":{"data_offsets":[0]}}', b'{"a":{"data_offsets":[0,"9"]}}')
        ),
    ],
)
def test_a_damaged_file_fails(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    verdict = check_file("x", str(path), None)
    assert verdict.status == "failed"
    assert problem in verdict.finding


def test_a_refused_file_fails(
    weights_file: tuple[Path, str], request: pytest.FixtureRequest
) -> None:
    weights_file[0].chmod(0o000)
    request.getfixturevalue("without_root")
    verdict = check_file("x", str(weights_file[0]), None)
    assert verdict.status == "failed"
    assert "access is refused" in verdict.finding

"""The whole pipeline in this process: on bundled photographs, on S3, on real ImageNet images."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.layouts import LAYOUTS
from support.memory_store import open_memory_bucket
from support.radosgw import S3_BUCKET, SECRET_KEY
from support.tiny_shards import damage_samples

from fqgan_dist.config import load_config
from fqgan_dist.data.index import load_index, load_samples
from fqgan_dist.errors import DataError
from fqgan_dist.orchestration.driver import run_pipeline
from fqgan_dist.stages.catalog import stage_names
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage_record import load_record, record_path
from fqgan_dist.stages.summary import Summary
from fqgan_dist.storage.storage import Storage

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"

pytestmark = pytest.mark.filterwarnings(
    # torch's event files are left to the garbage collector by tensorboard's own queue thread.
    "ignore:unclosed file:ResourceWarning"
)


def _run(root: str, *overrides: str) -> Summary:
    config = load_config(TINY, [f"storage.root={root}", *overrides], RunConfig)
    return run_pipeline(config)


def _metrics(summary: Summary) -> dict[str, dict[str, Any]]:
    return {name: stage["metrics"] for name, stage in summary.items()}


@pytest.fixture(scope="module")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    root = tmp_path_factory.mktemp("local") / "run"
    return root, _run(str(root))


def test_every_stage_is_done_and_measured(local_run: tuple[Path, Summary]) -> None:
    root, summary = local_run
    assert list(summary) == [name for name in stage_names() if name != "exports"]  # none is asked
    assert {stage["state"] for stage in summary.values()} == {"done"}
    tokenizer = summary["tokenizer"]["metrics"]
    assert tokenizer["psnr"] > 0
    assert set(tokenizer["perplexity"]) == {"visual", "semantic_mid", "semantic_high"}
    assert set(tokenizer["info_nce"]) == {"semantic_mid", "semantic_high"}
    assert np.isfinite(tokenizer["discriminator_loss"])
    assert tokenizer["ssim"] < tokenizer["ssim_paper"] <= 1
    assert tokenizer["inception_score_class_order"] > 0
    samples = summary["samples"]["metrics"]
    assert np.isfinite(samples["gfid"])
    assert samples["labels"] == "balanced"
    assert json.loads((root / "summary.json").read_text()) == summary
    assert "<html" in (root / "report.html").read_text()


def test_results_name_evaluator_reference_and_weights(local_run: tuple[Path, Summary]) -> None:
    root, _ = local_run
    storage = Storage(root)
    shards = load_record(storage, record_path("shards"))
    tokenizer = load_record(storage, record_path("tokenizer"))
    assert shards is not None
    assert tokenizer is not None
    for name, split in (("reconstruction", "val"), ("samples", "train")):
        (path,) = (root / "evaluation" / "results").glob(f"*/{name}.json")
        document = json.loads(path.read_text())
        assert document["reference"] == f"{split}:{shards.outputs[split]}"
        assert "random" in document["evaluator"]
        assert document["tokenizer_weights"] == tokenizer.outputs["weights"]
        assert document["results"]["images"] > 0


def test_finished_run_is_not_run_again(local_run: tuple[Path, Summary]) -> None:
    root, summary = local_run
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    assert _run(str(root)) == summary
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before


def test_changed_setting_is_refused_before_anything_runs(local_run: tuple[Path, Summary]) -> None:
    root, _ = local_run
    before = (root / "config.yaml").read_bytes()
    with pytest.raises(DataError, match=r"settings\.losses\.entropy_weight: was 0\.03, now 0\.5"):
        _run(str(root), "tokenizer.losses.entropy_weight=0.5")
    assert (root / "config.yaml").read_bytes() == before


def test_run_on_s3_gives_the_bits_of_the_local_run(
    local_run: tuple[Path, Summary], s3_credentials: None
) -> None:
    root = f"s3://{S3_BUCKET}/tiny"
    summary = _run(root)
    assert _metrics(summary) == _metrics(local_run[1])
    storage = Storage(root)
    for name in ("config.yaml", "environment.json", "summary.json", "report.html"):
        assert SECRET_KEY.encode() not in storage.read_bytes(name)


@pytest.mark.full("a whole run; the store keeps the contract of all, unit/storage")
def test_run_on_a_store_that_tests_add_gives_the_bits_of_the_local_run(
    local_run: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody outside the storage room knows which schemes there are.
    bucket = open_memory_bucket(monkeypatch)
    summary = _run(f"{bucket.root}/tiny")
    assert _metrics(summary) == _metrics(local_run[1])
    assert json.loads(bucket.objects["tiny/summary.json"]) == summary


@pytest.mark.full("a second run; each stage is shown a damaged image in unit/stages/test_damage.py")
def test_run_with_a_damaged_image_goes_through_all_stages(
    local_run: tuple[Path, Summary], tmp_path: Path
) -> None:
    _run(str(tmp_path), "stages=[shards]")
    damaged: dict[str, str] = {}
    for split in ("train", "val"):
        folder = Storage(tmp_path).child(f"data/photographs/{split}")
        index = load_index(folder)
        damaged[split] = load_samples(folder, index.shards[0]).keys[1]
        damage_samples(folder, index, [damaged[split]])
    with pytest.raises(DataError, match=f"sample '{damaged['train']}': damaged"):
        _run(str(tmp_path), "stages=[teachers]", "data.on_damage=fail")
    summary = _run(str(tmp_path))
    assert {stage["state"] for stage in summary.values()} == {"done"}
    found, sound = _metrics(summary), _metrics(local_run[1])
    assert found["teachers"]["features"] == sound["teachers"]["features"] - 2
    assert found["teachers"]["damaged_samples"] == 1
    assert found["codes"]["damaged_samples"] == 2
    assert found["codes"]["val_crops"] == sound["codes"]["val_crops"] - 1
    assert found["tokenizer"]["images"] == sound["tokenizer"]["images"] - 1
    assert found["tokenizer"]["damaged_images"] == 1
    assert found["samples"]["reference_images"] == sound["samples"]["reference_images"] - 1
    assert found["samples"]["damaged_reference_images"] == 1
    ledgers = {path.parent.name: path for path in tmp_path.glob("*/damaged_samples.jsonl")}
    assert set(ledgers) == {"teachers", "tokenizer", "codes", "autoregressive", "evaluation"}
    lines = {
        stage: [json.loads(line) for line in path.read_text().splitlines()]
        for stage, path in ledgers.items()
    }
    for stage in ("teachers", "tokenizer", "codes", "autoregressive", "evaluation"):
        assert {line["key"] for line in lines[stage]} <= set(damaged.values())
    # Both trainings have the same order, and so the same stand-ins.
    slots = [
        {line["slot"]: line["replacement_key"] for line in lines[stage]}
        for stage in ("tokenizer", "autoregressive")
    ]
    assert slots[0] == slots[1] != {}
    assert _run(str(tmp_path)) == summary


@pytest.mark.full("every layout goes through shards in unit/stages/test_layouts.py")
def test_run_on_kaggles_layout_goes_to_the_end(tmp_path: Path) -> None:
    classes = ["n01440764", "n01443537", "n01484850"]
    train, val = (
        [(classes[row % 3], _noise(first + row)) for row in range(count)]
        for first, count in ((0, 18), (100, 6))
    )
    layout = LAYOUTS["kaggle"](tmp_path, train, val)
    summary = _run(str(tmp_path / "run"), *layout.settings(tmp_path))
    assert {stage["state"] for stage in summary.values()} == {"done"}
    shards = summary["shards"]["metrics"]
    assert (shards["train_images"], shards["val_images"], shards["classes"]) == (18, 6, 3)
    assert np.isfinite(summary["samples"]["metrics"]["gfid"])
    index = load_index(Storage(next((tmp_path / "run" / "data").glob("*/train"))))
    assert index.class_descriptions[classes[0]] == f"a {classes[0]}, or b"


def _noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 56, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.full("a whole run; photographs of skimage are trained on always")
@pytest.mark.data
def test_run_on_real_imagenet_photographs(test_data_dir: Path, tmp_path: Path) -> None:
    source = test_data_dir / "tiny-imagenet-20"
    for split, per_class in (("train", 3), ("val", 2)):
        _copy_some(source / f"{split}.tar.gz", tmp_path / f"{split}.tar.gz", per_class)
    root = tmp_path / "run"
    summary = _run(str(root), f"data.source={tmp_path / 'train.tar.gz'}")
    assert summary["shards"]["metrics"] == {
        "train_images": 60,
        "train_problems": 0,
        "val_images": 40,
        "val_problems": 0,
        "classes": 20,
    }
    index = load_index(Storage(root).child("data/photographs/train"))
    assert index.classes[0] == "n01443537"
    assert np.isfinite(summary["tokenizer"]["metrics"]["rfid"])


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "val"])
def test_original_imagenet_files_of_every_kind_become_shards(
    split: str, test_data_dir: Path, tmp_path: Path
) -> None:
    # Grayscale files, 68 to 2400 pixels, hundreds of kilobytes each; the splits share no class.
    source = test_data_dir / "imagenet-sample" / f"{split}.tar.gz"
    sources = [f"data.source={source}", f"data.validation_source={source}"]
    summary = _run(str(tmp_path / "run"), *sources, "stages=[shards, teachers]")
    with tarfile.open(source) as tar:
        files = [member for member in tar if member.isfile()]
    found = summary["shards"]["metrics"]
    assert found["train_images"] + found["train_problems"] == len(files)
    assert found["train_problems"] == 0
    assert summary["teachers"]["metrics"]["features"] == 2 * found["train_images"]


def _copy_some(source: Path, target: Path, per_class: int) -> None:
    """Copy the first images of each class into another archive."""
    copied: Counter[str] = Counter()
    with tarfile.open(source) as tar, tarfile.open(target, "w:gz") as out:
        for member in tar:
            name = member.name.split("/")[0]
            if member.isfile() and copied[name] < per_class:
                copied[name] += 1
                out.addfile(member, tar.extractfile(member))

"""Every file in configs/ is a run that fits together, with the published models' sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.footprint import META
from fqgan_dist.stages.plan import plan_run
from fqgan_dist.stages.training_plan import count_parameters
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.model import FactorizedTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.write_configs import CONFIGS, config_files, golden_file, resolve_config

FILES = config_files()
IDS = [str(path.relative_to(CONFIGS)) for path in FILES]

FAR = {
    # Layers 24, width 1024 and 36, 1280; fqgan.md 2.7.
    ("base", 2): (417_104_896, 415_006_720),
    ("large", 2): (901_195_520, 897_917_440),
    ("base", 3): (451_707_904, 448_561_152),
    ("large", 3): (944_776_960, 939_860_480),
}
TOKENIZER = {
    # With and without feature heads; fqgan.md 1.13.
    ("dual", "f16"): (150_410_131, 111_294_355),
    ("triple", "f16"): (159_295_515, 131_657_883),
    ("dual", "f8"): (150_209_427, 110_307_219),
    ("triple", "f8"): (159_586_331, 131_063_963),
}
PUBLISHED = [
    ("triple_f16_far_large", ("triple", "f16"), ("large", 3)),
    ("triple_f16_far_base", ("triple", "f16"), ("base", 3)),
    ("dual_f16_far_large", ("dual", "f16"), ("large", 2)),
    ("dual_f16_far_base", ("dual", "f16"), ("base", 2)),
    ("triple_f8_far_large", ("triple", "f8"), ("large", 3)),
    ("dual_f8_far_large", ("dual", "f8"), ("large", 2)),
]


def load(name: str) -> RunConfig:
    return load_config(CONFIGS / "presets" / f"{name}.yaml", [], RunConfig)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_resolved_values_are_the_recorded_ones(path: Path) -> None:
    recorded = golden_file(path).read_text()
    assert resolve_config(path) == recorded, "run `make golden` and look at the difference"


def test_every_recorded_config_still_exists() -> None:
    recorded = set(golden_file(CONFIGS / "x.yaml").parent.rglob("*.json"))
    assert recorded == {golden_file(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_first_lines_say_command_hardware_hours_and_expected_scores(path: Path) -> None:
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    head = " ".join(comments)
    assert comments[0].startswith(f"# fqgan run {path.relative_to(CONFIGS.parent)}")
    assert "Hardware:" in head
    for words in (("hour", "Hour", "minute"), ("FID", "comparable")):
        assert any(word in head for word in words), words


@pytest.mark.parametrize(("name", "tokenizer", "far"), PUBLISHED)
def test_presets_have_the_published_sizes(
    name: str, tokenizer: tuple[str, str], far: tuple[str, int]
) -> None:
    config = load(name)
    with META:
        model = FactorizedTokenizer(config.tokenizer.model)
        discriminator = PatchDiscriminator(config.tokenizer.discriminator)
        transformer = FactorizedTransformer(config.autoregressive.model)
    total, heads = count_parameters(model), count_parameters(model.feature_heads)
    assert (total, total - heads) == TOKENIZER[tokenizer]
    assert count_parameters(discriminator) == 2_765_633
    total = count_parameters(transformer)
    assert (total, total - count_parameters(transformer.aggregation)) == FAR[far]


@pytest.mark.parametrize(
    ("name", "total"), [("vqgan_16384", 71_883_403), ("vqgan_32768", 72_014_475)]
)
def test_the_baseline_is_llamagens_tokenizer(name: str, total: int) -> None:
    # LlamaGen's VQ-16 is the 72M model; the second codebook size adds 16384 x 8.
    with META:
        model = FactorizedTokenizer(load(name).tokenizer.model)
    assert count_parameters(model) == total
    assert not model.feature_heads


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "presets"])
def test_presets_follow_the_released_recipe(path: Path) -> None:
    config = load_config(path, [], RunConfig)
    tokenizer, far = config.tokenizer.training, config.autoregressive.training
    for training in (tokenizer, far):
        assert training.global_batch_size == 256
        assert training.optimizer.betas == (0.9, 0.95)
        assert training.precision == "bf16"
        assert training.ema_decay is None
    assert tokenizer.micro_batches_per_step == 8
    assert (tokenizer.optimizer.kind, tokenizer.schedule.lr) == ("adam", 2e-4)
    assert (far.optimizer.kind, far.schedule.lr) == ("adamw", 1e-4)
    assert far.optimizer.weight_decay == 0.05
    assert config.tokenizer.losses.discriminator_start_step == 20_000
    assert config.codes.views.crop_ratio == 1.1
    assert config.evaluation.inception.resolution == 299
    assert config.samples.count == 50_000


def test_a_full_size_plan_takes_seconds_and_knows_the_epochs() -> None:
    plan = plan_run(load("triple_f16_far_large"))
    assert plan["tokenizer"]["parameters"]["tokenizer"] == 159_295_515
    assert plan["autoregressive"]["parameters"]["autoregressive_without_aggregation"] == 939_860_480
    training = plan["tokenizer"]["training"]
    assert (training["images_seen"], training["epochs_of_imagenet"]) == (51_200_000, 39.96)
    assert plan["autoregressive"]["training"]["epochs_of_imagenet"] == 299.73
    # fqgan.md 2: 40 views of 384 + 768 float16; ten crops of 3 x 256 uint16.
    assert plan["stored"]["features_bytes"] == 1_281_167 * 40 * 1152 * 2
    assert plan["stored"]["codes_bytes"] == 1_281_167 * 10 * 768 * 2
    # performance.md 3: 15.1 GB of fp32 states, and 12 of the 16 bytes are shared by ZeRO-1's ranks.
    memory = plan["autoregressive"]["memory"]
    assert memory["states_bytes"]["total"] == 16 * 944_776_960
    others = memory["other_engines"]
    assert others["ranks"] == 8
    assert others["states_bytes"]["ZeRO-1"] == (8 * 944_776_960) + 12 * 944_776_960 // 8


def test_a_group_of_another_kind_replaces_the_bases() -> None:
    assert load("dual_f16_far_large_linear").autoregressive.model.factor_head.model_dump() == {
        "kind": "linear"
    }
    assert load("triple_f16_far_base").autoregressive.model.factor_head.model_dump() == {
        "kind": "autoregressive",
        "num_layers": 3,
    }

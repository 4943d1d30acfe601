from __future__ import annotations

from pathlib import Path

from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.frozen_networks import (
    describe_random_weights,
    frozen_networks,
    needed_weights,
)
from fqgan_dist.stages.preflight import find_missing_files
from fqgan_dist.stages.stage import all_stages

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"
FILES = (
    "teachers.networks.0.weights={source: none/a.safetensors}",
    "teachers.networks.1.weights={source: none/b.safetensors}",
    "tokenizer.perceptual.weights={source: none/c.safetensors}",
    "evaluation.inception.weights={source: none/d.safetensors}",
    "tokenizer.init_from={source: none/e.safetensors}",
    "autoregressive.init_from={source: none/f.safetensors}",
)


def load(*overrides: str) -> RunConfig:
    return load_config(TINY, overrides, RunConfig)


def test_each_network_says_which_stages_read_it() -> None:
    assert {network.name: set(network.readers) for network in frozen_networks(load())} == {
        "dinov2": {"teachers", "evaluation"},
        "clip": {"teachers", "evaluation"},
        "perceptual-squeeze": {"tokenizer"},
        "inception": {"evaluation"},
    }


def test_teachers_that_are_not_run_before_are_read_by_the_tokenizer() -> None:
    teacher, *_ = frozen_networks(load("teachers.precompute=false"))
    assert teacher.readers == {"tokenizer", "evaluation"}


def test_what_a_training_starts_from_is_needed_too() -> None:
    assert [needed.field for needed in needed_weights(load())] == [
        network.field for network in frozen_networks(load())
    ]
    *_, tokenizer, generator = needed_weights(load(*FILES))
    assert (tokenizer.field, tokenizer.readers) == ("tokenizer.init_from", {"tokenizer"})
    assert (generator.field, generator.readers) == ("autoregressive.init_from", {"autoregressive"})


def test_every_file_that_is_not_there_is_found_with_its_readers() -> None:
    config = load(*FILES)
    missing = {stage.name: list(find_missing_files(stage, config)) for stage in all_stages()}
    for needed in needed_weights(config):
        problem = f"{needed.field}.source: '{needed.weights.source}': no such file"
        found = {name for name, lines in missing.items() for line in lines if problem in line}
        assert found == needed.readers


def test_random_networks_are_named() -> None:
    (note,) = describe_random_weights(load())
    assert "(teacher dinov2, teacher clip, perceptual loss, Inception)" in note
    assert describe_random_weights(load(*FILES)) == []

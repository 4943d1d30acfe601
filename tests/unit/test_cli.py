"""The `fqgan` command: exit codes, and a clear message for everything that users get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fqgan_dist.cli import DAMAGE_FOUND, DONE, FAILED, main
from fqgan_dist.command_line import WRONG_USAGE

TINY = Path(__file__).resolve().parents[1] / "support" / "tiny.yaml"


@pytest.fixture(scope="module")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose shards and features are done and whose tokenizer is trained."""
    root = tmp_path_factory.mktemp("prepared")
    assert run(root, "stages=[shards, teachers, tokenizer]") == DONE
    return root


@pytest.fixture
def root(prepared_root: Path, tmp_path: Path) -> Path:
    """A copy of the prepared run that a test may change."""
    copy = tmp_path / "run"
    shutil.copytree(prepared_root, copy)
    return copy


def run(root: Path | str, *arguments: str, command: str = "run") -> int:
    return main([command, str(TINY), f"storage.root={root}", *arguments])


def checkpoints(action: str, root: Path, *arguments: str, stage: str = "tokenizer") -> int:
    return main(["checkpoints", action, str(TINY), stage, f"storage.root={root}", *arguments])


def is_marked_done(root: Path, stage: str) -> bool:
    record = root / "manifests" / f"{stage}.json"
    return record.exists() and json.loads(record.read_text())["state"] == "done"


def test_a_run_prints_its_summary_as_json(
    prepared_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prepared_root, "--json", "stages=[shards, teachers, tokenizer]") == DONE
    summary = json.loads(capsys.readouterr().out)
    assert {stage: entry["state"] for stage, entry in summary.items()} == {
        "shards": "done",
        "teachers": "done",
        "tokenizer": "done",
    }


def test_all_problems_of_a_config_come_at_once_with_suggestions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        tmp_path,
        "tokenizer.model.codebok_size=5",
        "tokenizer.training.global_batch_size=7",
        "samples.count=-1",
    )
    message = capsys.readouterr().err
    assert code == WRONG_USAGE
    assert "tokenizer.model.codebok_size: unknown setting; did you mean 'codebook_size'?" in message
    assert "7 is not a multiple of micro_batch_size (4)" in message
    assert "samples.count" in message
    assert not list(tmp_path.iterdir())


def test_sections_that_disagree_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "autoregressive.model.grid_size=8") == WRONG_USAGE
    message = capsys.readouterr().err
    assert "autoregressive.model.grid_size is 8, but tokenizer.model.image_size" in message
    assert "gives 4; remove grid_size" in message


def test_sizes_that_do_not_divide_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "tokenizer.model.image_size=33") == WRONG_USAGE
    assert "image_size: 33 is not a multiple of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["run", str(TINY), "storage.root"], "expected key.sub=value"),
        (["run", str(TINY), "execution=fast"], "execution"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == WRONG_USAGE
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run", str(TINY), "--fast"]])
def test_an_unknown_command_or_flag_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == WRONG_USAGE


def test_a_dry_run_writes_nothing_and_takes_settings_after_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    assert run(root, "--dry-run", "--json", "name=trial") == DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["name"] == "trial"
    assert plan["tokenizer"]["training"]["images_seen"] == 48
    assert not root.exists()


def test_a_dry_run_is_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--dry-run") == DONE
    text = capsys.readouterr().out
    for words in (
        "other engines x2",
        "ZeRO-1",
        "saved activations",
        "epochs of ImageNet's",
        "not comparable",
    ):
        assert words in text


def test_a_dry_run_finds_a_teacher_of_another_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(tmp_path, "--dry-run", "tokenizer.model.codebooks.1.feature_dim=18")
    assert code == WRONG_USAGE
    message = "codebooks.1.feature_dim is 18, but teachers.networks.0 (dinov2) gives 16; remove"
    assert message in capsys.readouterr().err


def test_a_mistyped_data_path_is_named_and_can_be_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "nowhere"
    assert run(tmp_path / "run", f"data.source={missing}", command="shards") == WRONG_USAGE
    assert f"data.source: '{missing}': no such file or folder" in capsys.readouterr().err
    assert run(tmp_path / "run", command="shards") == DONE


def test_a_folder_without_images_is_refused_and_can_be_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    (empty / "class").mkdir(parents=True)
    (empty / "class" / "notes.txt").write_text("no image")
    assert run(tmp_path / "run", f"data.source={empty}", command="shards") == FAILED
    message = capsys.readouterr().err
    assert str(empty) in message
    assert "image" in message
    assert not is_marked_done(tmp_path / "run", "shards")
    assert run(tmp_path / "run", command="shards") == DONE


def test_a_root_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "run", command="shards") == FAILED
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


def test_a_root_without_permission_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    tmp_path.chmod(0o500)
    request.getfixturevalue("without_root")
    assert run(tmp_path / "run", command="shards") == FAILED
    assert str(tmp_path) in capsys.readouterr().err


def test_an_earlier_stage_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, command="teachers") == FAILED
    assert "stage 'shards' has not finished; run it first" in capsys.readouterr().err


def test_every_missing_weights_file_is_named_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        tmp_path,
        f"teachers.networks.1.weights={{source: {tmp_path}/clip.safetensors}}",
        f"evaluation.inception.weights={{source: {tmp_path}/inception.safetensors}}",
    )
    message = capsys.readouterr().err
    assert code == WRONG_USAGE
    assert "teachers.networks.1.weights.source" in message
    assert "evaluation.inception.weights.source" in message
    assert not (tmp_path / "data").exists()


def test_weights_of_another_network_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "features")
    (root / "manifests" / "teachers.json").unlink()
    path = tmp_path / "clip.safetensors"
    safetensors.torch.save_file({"visual.something": torch.zeros(3)}, path)
    code = run(root, f"teachers.networks.1.weights={{source: {path}}}", command="teachers")
    assert code == FAILED
    assert str(path) in capsys.readouterr().err
    assert not is_marked_done(root, "teachers")
    assert run(root, command="teachers") == DONE


def test_a_finished_stage_refuses_other_inputs(
    prepared_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(prepared_root, "stages=[tokenizer]", "tokenizer.losses.entropy_weight=1") == FAILED
    message = capsys.readouterr().err
    assert "settings.losses.entropy_weight: was 0.03, now 1" in message
    assert "Use another storage.root, or the former settings" in message


def test_settings_of_finished_stages_bind_also_when_others_run(
    prepared_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (prepared_root / "config.yaml").read_bytes()
    assert run(prepared_root, "tokenizer.training.micro_batch_size=8", command="codes") == FAILED
    assert "settings.training.micro_batch_size: was 4, now 8" in capsys.readouterr().err
    assert (prepared_root / "config.yaml").read_bytes() == before


def test_stages_of_a_command_that_names_its_own_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "stages=[codes]", command="shards") == WRONG_USAGE
    assert "stages: has no effect on `fqgan shards`" in capsys.readouterr().err


def test_validation_settings_without_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "data.validation_source=DIR") == WRONG_USAGE
    assert "validation_source: 'DIR' has no effect" in capsys.readouterr().err
    both = ("data.source=A", "data.validation_source=B", "data.validation_fraction=0.2")
    assert run(tmp_path, *both) == WRONG_USAGE
    assert "validation_fraction: 0.2 has no effect" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "manifests" / "tokenizer.json").unlink()
    assert run(root, "stages=[tokenizer]", "tokenizer.model.base_channels=16") == FAILED
    message = capsys.readouterr().err
    assert "trained with another architecture (base_channels differ)" in message
    assert not is_marked_done(root, "tokenizer")


def test_checkpoints_are_listed_and_verified(
    prepared_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints("list", prepared_root, "--json") == DONE
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["step"] for entry in listed] == [4, 6]
    assert checkpoints("verify", prepared_root) == DONE
    assert "every byte of steps 4, 6" in capsys.readouterr().out


def test_damage_exits_with_3_and_names_the_file(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = root.glob("tokenizer/checkpoints/step-00000006/*/tokenizer.rank-*.safetensors")
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    assert checkpoints("verify", root) == DAMAGE_FOUND
    assert part.name in capsys.readouterr().out
    assert checkpoints("verify", root, "step=4") == DONE


def test_nothing_to_look_after_is_said(
    prepared_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("list", "verify", "prune"):
        assert checkpoints(action, prepared_root, stage="autoregressive") == FAILED
        assert "no checkpoints of stage 'autoregressive'" in capsys.readouterr().err


def test_an_option_without_effect_is_refused(
    prepared_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints("list", prepared_root, "to=x.safetensors") == WRONG_USAGE
    assert "to: has no effect on `checkpoints list`" in capsys.readouterr().err

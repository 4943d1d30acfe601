"""cluster/submit against a `ray` program that plays a cluster: joins, retries, gives up."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import fake_ray

SUBMIT = Path(__file__).resolve().parents[3] / "cluster" / "submit"
COMMAND = ["fqgan", "run", "configs/x.yaml", "name=a b"]
OPTIONS = ["run=imagenet", "poll_s=0", "head_wait_s=30"]


@dataclass
class Cluster:
    """A played cluster and what was asked of it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def plan(self, *plans: dict[str, Any]) -> None:
        (self.folder / "state.json").write_text(json.dumps({"jobs": {}, "plans": list(plans)}))

    def arguments(self, *options: str, command: list[str] = COMMAND) -> list[str]:
        return [sys.executable, str(SUBMIT), *OPTIONS, *options, "--", *command]

    def submit(self, *options: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*options, **kwargs),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def calls(self, action: str) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for line in lines if (call := json.loads(line))["arguments"][1] == action]

    def submitted_ids(self) -> list[str]:
        texts = [text for call in self.calls("submit") for text in call["arguments"]]
        return [text.partition("=")[2] for text in texts if text.startswith("--submission-id=")]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    program = tmp_path / "bin" / "ray"
    program.parent.mkdir()
    python = shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nexec {python} -S {shlex.quote(fake_ray.__file__)} "$@"\n')
    program.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if "RAY" not in name}
    path = f"{program.parent}:{os.environ['PATH']}"
    return Cluster(tmp_path, environment | {"PATH": path, "FAKE_RAY_DIR": str(tmp_path)})


def job(*moments: str, **plan: Any) -> dict[str, Any]:
    return {"moments": list(moments), "log": ["step 1", "step 2"], **plan}


def test_a_job_that_succeeds_is_submitted_once_and_its_log_printed(cluster: Cluster) -> None:
    cluster.plan(job("running", "running", "succeeded"))
    result = cluster.submit("address=http://head:8265", "working_dir=.")
    assert (result.returncode, result.stdout) == (0, "step 1\nstep 2\n")
    (call,) = cluster.calls("submit")
    assert call["arguments"][-5:] == ["--", *COMMAND]
    assert "--working-dir=." in call["arguments"]
    assert "--no-wait" in call["arguments"]
    assert call["address"] == "http://head:8265"
    assert cluster.submitted_ids()[0].startswith("imagenet-")


def test_every_question_uses_token_authentication_unless_the_shell_says_otherwise(
    cluster: Cluster,
) -> None:
    cluster.plan(job("succeeded"), job("succeeded"))
    cluster.submit()
    assert {call["auth_mode"] for call in cluster.calls("status")} == {"token"}
    cluster.environment["RAY_AUTH_MODE"] = "disabled"
    cluster.submit(command=["fqgan", "run", "other.yaml"])
    assert cluster.calls("submit")[-1]["auth_mode"] == "disabled"


@pytest.mark.parametrize("code", [1, 2, 3, 127])
def test_a_command_that_failed_is_not_retried_and_its_code_returned(
    cluster: Cluster, code: int
) -> None:
    log = [
        "ConfigError: x",
        "AuthenticationError",
        "Job entrypoint command failed with exit code -9",
    ]
    cluster.plan(job("running", f"exit {code}", log=log))
    result = cluster.submit()
    assert result.returncode == code
    assert len(cluster.submitted_ids()) == 1
    assert f"failed with exit code {code}" in result.stderr
    assert result.stdout.splitlines() == log


@pytest.mark.parametrize("end", ["exit -9", "exit 137", "supervisor"])
def test_a_killed_driver_or_node_is_submitted_again_with_the_same_command(
    cluster: Cluster, end: str
) -> None:
    cluster.plan(job("running", end), job("running", "succeeded", log=["resumed"]))
    result = cluster.submit()
    assert result.returncode == 0
    first, second = cluster.submitted_ids()
    assert first.removesuffix("-1") == second.removesuffix("-2")
    commands = [call["arguments"][-5:] for call in cluster.calls("submit")]
    assert commands == [["--", *COMMAND]] * 2
    assert result.stdout == "step 1\nstep 2\nresumed\n"


def test_a_lost_head_is_waited_for_and_the_run_submitted_again(cluster: Cluster) -> None:
    cluster.plan(job("running", "running", "down", "down", "down", "gone"), job("succeeded"))
    result = cluster.submit()
    assert result.returncode == 0
    assert len(cluster.submitted_ids()) == 2
    assert "Failed to connect to Ray" in result.stderr
    assert "the head answers again" in result.stderr


def test_a_head_that_was_only_out_of_reach_keeps_its_job(cluster: Cluster) -> None:
    cluster.plan(job("running", "running", "down", "down", "running", "succeeded"))
    result = cluster.submit()
    assert result.returncode == 0
    assert len(cluster.submitted_ids()) == 1
    assert result.stdout == "step 1\nstep 2\n"


def test_a_head_that_stays_away_ends_it_with_advice(cluster: Cluster) -> None:
    cluster.plan(job("running", "down"))
    result = cluster.submit("head_wait_s=0.1")
    assert result.returncode == 1
    assert "the head did not answer for 0.1 s" in result.stderr


def test_losses_are_counted_and_end_it(cluster: Cluster) -> None:
    cluster.plan(*(job("exit -9") for _ in range(4)))
    result = cluster.submit("max_losses=2")
    assert result.returncode == 1
    assert len(cluster.submitted_ids()) == 3
    assert "max_losses=2" in result.stderr


def test_lines_of_a_log_whose_stream_breaks_are_printed_once(cluster: Cluster) -> None:
    cluster.plan(job(*["running"] * 12, "succeeded", log=list("abcdef"), cuts=[2, 1, 4]))
    assert cluster.submit().stdout == "a\nb\nc\nd\ne\nf\n"


def test_a_second_call_joins_the_running_job(cluster: Cluster) -> None:
    cluster.plan(job(*["running"] * 400, "succeeded"), job("succeeded"))
    with subprocess.Popen(
        cluster.arguments(),
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Tests that run in the background of a shell inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as first:
        while not cluster.calls("logs"):
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors.decode()
    assert b"the same command joins it again" in errors
    state = json.loads((cluster.folder / "state.json").read_text())
    (running,) = state["jobs"].values()
    running["moments"] = ["running"] * 3 + ["succeeded"]
    (cluster.folder / "state.json").write_text(json.dumps(state))
    result = cluster.submit()
    assert result.returncode == 0
    assert "joining" in result.stderr
    assert len(cluster.submitted_ids()) == 1


def test_the_same_run_is_submitted_again_after_its_end_so_that_the_driver_can_say_so(
    cluster: Cluster,
) -> None:
    cluster.plan(job("succeeded"), job("succeeded"), job("succeeded"))
    for number in (1, 2):
        assert cluster.submit().returncode == 0
        assert cluster.submitted_ids()[-1].endswith(f"-{number}")
    cluster.submit(command=[*COMMAND, "seed=2"])
    assert cluster.submitted_ids()[-1].endswith("-1"), "another command has its own numbers"


def test_a_stopped_job_is_not_submitted_again(cluster: Cluster) -> None:
    cluster.plan(job("running", "stopped"))
    result = cluster.submit()
    assert (result.returncode, len(cluster.submitted_ids())) == (1, 1)


def test_a_refused_token_ends_it_at_once(cluster: Cluster) -> None:
    cluster.plan({"refused": True, "moments": []})
    result = cluster.submit()
    assert result.returncode == 2
    assert "Invalid authentication token" in result.stderr


def test_only_named_variables_travel(cluster: Cluster) -> None:
    cluster.plan(job("succeeded"))
    cluster.environment |= {"AWS_ENDPOINT_URL": "http://s3:9000", "AWS_SECRET_ACCESS_KEY": "hidden"}
    cluster.submit("env=AWS_ENDPOINT_URL")
    (call,) = cluster.calls("submit")
    (text,) = [text for text in call["arguments"] if text.startswith("--runtime-env-json=")]
    assert json.loads(text.partition("=")[2]) == {
        "env_vars": {"AWS_ENDPOINT_URL": "http://s3:9000"}
    }


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"]
)
def test_credentials_do_not_travel(cluster: Cluster, name: str) -> None:
    cluster.plan(job("succeeded"))
    cluster.environment[name] = "hidden"
    result = cluster.submit(f"env={name}")
    assert result.returncode == 2
    assert "looks like a credential" in result.stderr
    assert not cluster.submitted_ids()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run=a"], "no command"),
        (["run=a", "--"], "no command"),
        (["--", "true"], "names no run"),
        (["run=../a", "--", "true"], "names no run"),
        (["run=a", "colour=red", "--", "true"], "expected one of run=..., address=..."),
        (["run=a", "poll_s=soon", "--", "true"], "poll_s: 'soon' is not a number"),
        (["run=a", "max_losses=-1", "--", "true"], "expected 0 or more"),
        (["run=a", "env=NOT_SET_HERE", "--", "true"], "is not set in this shell"),
    ],
)
def test_wrong_usage_is_explained(arguments: list[str], words: str) -> None:
    result = subprocess.run(
        [sys.executable, str(SUBMIT), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert words in result.stderr


def test_without_a_ray_program_it_says_what_to_install(cluster: Cluster) -> None:
    cluster.environment["PATH"] = str(cluster.folder)
    result = cluster.submit()
    assert result.returncode == 2
    assert "no `ray` program" in result.stderr

"""cluster/submit against a head that plays Ray's: joins, retries, gives up."""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.ray_head import RayHead, run_ray_head
from support.waiting import wait_until

from cluster import submission
from cluster.command import main
from cluster.job_log import LogCopier
from cluster.ray_jobs import Phase, RayJobs

SUBMIT = Path(__file__).resolve().parents[3] / "cluster" / "submit"
COMMAND = ["fqgan", "run", "configs/x.yaml", "name=a b"]
OPTIONS = ["run=imagenet", "poll_s=0.01", "head_wait_s=30"]

pytestmark = [
    # Ray 2.60 passes it to aiohttp for each connection to a log.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
    # And leaves the websocket that is cancelled to the garbage collector.
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def collect_websockets() -> Iterator[None]:
    """Let them go in this module, whose tests expect it."""
    yield
    gc.collect()


@dataclass(frozen=True)
class Result:
    code: int
    output: str
    messages: str


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHead]:
    for name in os.environ:
        if "RAY" in name:
            monkeypatch.delenv(name)
    with run_ray_head() as head:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
        yield head


class Submit:
    """Runs `cluster/submit` in this process, where Ray is imported already."""

    def __init__(
        self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        self._capsys = capsys
        self._caplog = caplog
        caplog.set_level("INFO", "cluster")

    def __call__(self, *options: str, command: list[str] = COMMAND) -> Result:
        self._caplog.clear()
        code = main([*OPTIONS, *options, "--", *command])
        return Result(code, self._capsys.readouterr().out, self._caplog.text)


@pytest.fixture
def submit(
    head: RayHead, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Submit:
    return Submit(capsys, caplog)


def start_program(*options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SUBMIT), *OPTIONS, *options, "--", *COMMAND],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_program(*options: str, **environment: str) -> Result:
    with start_program(*options, **environment) as program:
        output, errors = program.communicate(timeout=120)
    return Result(program.returncode, output, errors)


def test_a_job_that_succeeds_is_submitted_once_and_its_log_printed(
    head: RayHead, submit: Submit, tmp_path: Path
) -> None:
    head.plan("running", "running", "succeeded")
    (tmp_path / "config.yaml").touch()
    result = submit(f"working_dir={tmp_path}")
    assert (result.code, result.output) == (0, "step 1\nstep 2\n")
    (request,) = head.submissions
    assert shlex.split(request["entrypoint"]) == COMMAND
    (package,) = head.packages
    assert request["runtime_env"]["working_dir"] == f"gcs://{package}"
    assert request["submission_id"].startswith("imagenet-")


def test_the_program_prints_the_log_and_goes_to_the_address_that_is_given(head: RayHead) -> None:
    head.plan("running", "succeeded")
    elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    result = run_program(f"address={head.address}", **elsewhere)
    assert (result.code, result.output) == (0, "step 1\nstep 2\n")
    assert result.messages.splitlines()[-1] == f"submit: {head.submitted_ids()[0]} is done"


def test_every_question_uses_token_authentication_unless_the_shell_says_otherwise(
    head: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    head.token = "a" * 64
    head.plan("succeeded")
    assert run_program(RAY_AUTH_TOKEN=head.token).code == 0
    assert set(head.authorizations) == {f"Bearer {head.token}"}
    head.token = None
    head.authorizations.clear()
    head.plan("succeeded")
    assert run_program(RAY_AUTH_MODE="disabled").code == 0
    assert set(head.authorizations) == {None}


@pytest.mark.parametrize("code", [1, 2, 3, 127])
def test_a_command_that_failed_is_not_retried_and_its_code_returned(
    head: RayHead, submit: Submit, code: int
) -> None:
    log = "ConfigError: x\nAuthenticationError\nJob entrypoint command failed with exit code -9\n"
    head.plan("running", f"exit {code}", log=log)
    result = submit()
    assert result.code == code
    assert len(head.submitted_ids()) == 1
    assert f"failed with exit code {code}" in result.messages
    assert result.output == log


@pytest.mark.parametrize("end", ["exit -9", "exit 137", "supervisor"])
def test_a_killed_driver_or_node_is_submitted_again_with_the_same_command(
    head: RayHead, submit: Submit, end: str
) -> None:
    head.plan("running", end)
    head.plan("running", "succeeded", log="resumed\n")
    result = submit()
    assert result.code == 0
    first, second = head.submitted_ids()
    assert first.removesuffix("-1") == second.removesuffix("-2")
    commands = [shlex.split(request["entrypoint"]) for request in head.submissions]
    assert commands == [COMMAND] * 2
    assert result.output == "step 1\nstep 2\nresumed\n"


def test_a_lost_head_is_waited_for_and_the_run_submitted_again(
    head: RayHead, submit: Submit
) -> None:
    head.plan("running", "running", "down", "down", "down", "gone")
    head.plan("succeeded")
    result = submit()
    assert result.code == 0
    assert len(head.submitted_ids()) == 2
    assert "the head does not answer (ConnectionError: " in result.messages
    assert "the head answers again" in result.messages


def test_a_head_that_was_only_out_of_reach_keeps_its_job(head: RayHead, submit: Submit) -> None:
    head.plan("running", "running", "down", "down", "running", "succeeded")
    result = submit()
    assert result.code == 0
    assert len(head.submitted_ids()) == 1
    assert result.output == "step 1\nstep 2\n"


def test_a_head_that_stays_away_ends_it_with_advice(head: RayHead, submit: Submit) -> None:
    head.plan("running", "down")
    result = submit("head_wait_s=0.1")
    assert result.code == 1
    assert "the head did not answer for 0.1 s" in result.messages


def test_no_head_at_all_is_waited_for_too(submit: Submit) -> None:
    result = submit("address=http://127.0.0.1:1", "head_wait_s=0.1")
    assert result.code == 1
    assert "Failed to connect to Ray at address: http://127.0.0.1:1" in result.messages


def test_a_head_that_never_answers_is_out_of_reach(head: RayHead) -> None:
    head.is_silent = True
    assert RayJobs(timeout_s=0.1).status("imagenet-1").phase is Phase.UNREACHABLE


def test_another_program_at_the_address_is_no_head_without_jobs(
    head: RayHead, submit: Submit
) -> None:
    result = submit(f"address={head.address}/elsewhere", "head_wait_s=0.1")
    assert result.code == 1
    assert "the head did not answer" in result.messages
    assert not head.submitted_ids()


def test_a_log_that_is_lost_with_its_node_does_not_keep_the_run_from_its_end(
    head: RayHead, submit: Submit
) -> None:
    head.plan("supervisor", is_log_lost=True)
    head.plan("succeeded")
    result = submit()
    assert result.code == 0
    assert "cannot be read (RuntimeError: ConnectionError: no agent" in result.messages


def test_losses_are_counted_and_end_it(head: RayHead, submit: Submit) -> None:
    for _ in range(4):
        head.plan("exit -9")
    result = submit("max_losses=2")
    assert result.code == 1
    assert len(head.submitted_ids()) == 3
    assert "max_losses=2" in result.messages


def test_a_job_that_lasted_refills_the_losses(
    head: RayHead, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_WORKED_S", 0.0)
    for _ in range(4):
        head.plan("running", "exit -9")
    head.plan("succeeded")
    result = submit("max_losses=1")
    assert result.code == 0
    assert len(head.submitted_ids()) == 5


def test_a_run_whose_command_says_try_again_is_submitted_again_and_that_is_no_loss(
    head: RayHead, submit: Submit
) -> None:
    for _ in range(3):
        head.plan("exit 75")
    head.plan("succeeded")
    result = submit("max_losses=0")
    assert result.code == 0
    assert len(head.submitted_ids()) == 4
    assert "what it waits for may come yet" in result.messages


def test_patience_with_a_run_that_says_try_again_has_an_end(head: RayHead, submit: Submit) -> None:
    for _ in range(50):
        head.plan("exit 75")
    result = submit("patience_s=0.05")
    assert result.code == 1
    assert "patience_s=0.05" in result.messages
    assert len(head.submitted_ids()) < 50


def test_a_submission_that_never_reached_the_head_is_no_loss(head: RayHead, submit: Submit) -> None:
    head.refusals = 3
    head.plan("succeeded")
    result = submit("max_losses=0")
    assert result.code == 0
    assert len(head.submitted_ids()) == 1
    assert result.messages.count("did not reach the head") == 3


def test_a_log_whose_stream_breaks_is_printed_once(head: RayHead, submit: Submit) -> None:
    log = "first\nsecond\nthird\n"
    head.plan(*["running"] * 12, "succeeded", log=log, cuts=[8, 3, 14])
    assert submit().output == log
    assert head.num_log_connections >= 4


def test_a_log_is_printed_while_its_job_runs_and_a_silent_connection_is_left(
    head: RayHead, capsys: pytest.CaptureFixture[str]
) -> None:
    head.plan("running", hangs=2)
    jobs = RayJobs()
    jobs.submit("imagenet-1", ["true"], {})
    copier = LogCopier(jobs, "imagenet-1", silence_s=0.05)
    printed = []

    def is_printed() -> bool:
        copier.copy(0.05)
        printed.append(capsys.readouterr().out)
        return "".join(printed) == "step 1\nstep 2\n"

    wait_until(is_printed)
    copier.close()
    assert head.num_log_connections == 3


@pytest.mark.parametrize("interruption", [signal.SIGINT, signal.SIGTERM])
def test_a_second_call_joins_the_running_job(
    head: RayHead, submit: Submit, interruption: signal.Signals
) -> None:
    head.plan("running")
    with start_program() as first:
        wait_until(lambda: head.num_log_connections > 0)
        first.send_signal(interruption)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert "the same command joins it again" in errors
    (running,) = head.jobs.values()
    running.moments = ["running", "running", "running", "succeeded"]
    result = submit()
    assert result.code == 0
    assert "joining" in result.messages
    assert len(head.submitted_ids()) == 1


def test_the_same_run_is_submitted_again_after_its_end_so_that_the_driver_can_say_so(
    head: RayHead, submit: Submit
) -> None:
    for number in (1, 2):
        head.plan("succeeded")
        assert submit().code == 0
        assert head.submitted_ids()[-1].endswith(f"-{number}")
    head.plan("succeeded")
    submit(command=[*COMMAND, "seed=2"])
    assert head.submitted_ids()[-1].endswith("-1"), "another command has its own numbers"


def test_a_stopped_job_is_not_submitted_again(head: RayHead, submit: Submit) -> None:
    head.plan("running", "stopped")
    assert submit().code == 1
    assert len(head.submitted_ids()) == 1


@pytest.mark.parametrize(
    ("token", "words"),
    [("b" * 64, "Invalid authentication token"), ("", "Missing authentication token")],
)
def test_a_refused_token_ends_it_at_once(
    head: RayHead, monkeypatch: pytest.MonkeyPatch, token: str, words: str
) -> None:
    head.token = "a" * 64
    if token:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
    result = run_program(RAY_AUTH_TOKEN=token)
    assert result.code == 2
    assert words in result.messages


def test_headers_for_a_proxy_are_sent_along(
    head: RayHead, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.token = "a" * 64
    monkeypatch.setenv("RAY_JOB_HEADERS", json.dumps({"Authorization": f"Bearer {head.token}"}))
    head.plan("running", "succeeded")
    assert submit().code == 0


def test_only_named_variables_travel(
    head: RayHead, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.plan("succeeded")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    submit("env=AWS_ENDPOINT_URL")
    (request,) = head.submissions
    assert request["runtime_env"] == {"env_vars": {"AWS_ENDPOINT_URL": "http://s3:9000"}}


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"]
)
def test_credentials_do_not_travel(
    head: RayHead, submit: Submit, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    head.plan("succeeded")
    monkeypatch.setenv(name, "hidden")
    result = submit(f"env={name}")
    assert result.code == 2
    assert "looks like a credential" in result.messages
    assert not head.submitted_ids()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run=a"], "no command"),
        (["run=a", "--"], "no command"),
        (["--", "true"], "run: required, but not given"),
        (["run=../a", "--", "true"], "run: '../a'"),
        (["run=a", "colour=red", "--", "true"], "colour: unknown setting; known: address, env"),
        (["run=a", "poll_s=soon", "--", "true"], "poll_s: 'soon': Input should be a valid number"),
        (["run=a", "max_losses=-1", "--", "true"], "max_losses: '-1': Input should be greater"),
        (["run=a", "env=NOT_SET_HERE", "--", "true"], "'NOT_SET_HERE' is not set in this shell"),
        (["run=a", "working_dir=/no/such", "--", "true"], "no folder '/no/such'"),
    ],
)
def test_wrong_usage_is_explained(
    arguments: list[str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments) == 2
    assert words in caplog.text


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2)])
def test_its_options_are_explained(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert "head_wait_s   seconds to wait" in capsys.readouterr().out


def test_without_ray_it_says_what_to_install(head: RayHead, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('hidden')\n")
    result = run_program(PYTHONPATH=str(tmp_path))
    assert result.code == 2
    assert "cannot import Ray" in result.messages
    assert "pip install fqgan-dist" in result.messages

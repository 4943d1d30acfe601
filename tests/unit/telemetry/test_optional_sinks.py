from __future__ import annotations

import logging
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.sessions import resumed_at

from fqgan_dist.config import parse_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry import config as telemetry_config
from fqgan_dist.telemetry.config import TelemetryConfig
from fqgan_dist.telemetry.metric_sink import MetricSink, TrackedRun
from fqgan_dist.telemetry.optional_sinks import build_sinks, find_sinks
from fqgan_dist.telemetry.sessions import Session


class ToySink:
    """All that a new sink needs, in a module of its own with `build_sink`."""

    def __init__(self, run: TrackedRun, fails_at: str) -> None:
        self.run = run
        self.fails_at = fails_at
        self.calls: list[str] = []

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call.startswith(self.fails_at):
            raise RuntimeError("http://user:hunter2@tracking: refused for key-of-sixteen-01")

    def open(self, session: Session) -> None:
        self._note(f"open after {session.resumed_step}")

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        self._note(f"write {step} {dict(numbers)} {images_seen}")

    def flush(self) -> None:
        self._note("flush")

    def close(self) -> None:
        self._note("close")


class Toy:
    """The toy's module, and what it has built."""

    def __init__(self) -> None:
        self.built: list[ToySink] = []
        self.fails_at = "nowhere"

    def build_sink(self, run: TrackedRun) -> MetricSink:
        self.built.append(ToySink(run, self.fails_at))
        return self.built[-1]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()
    name = "fqgan_dist.telemetry.sinks.toy"
    module = types.ModuleType(name)
    module.build_sink = toy.build_sink  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, name, module)
    return toy


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    return TrackedRun(storage=Storage(tmp_path), stage="tokenizer", name="trial")


def use(sink: MetricSink) -> None:
    sink.open(resumed_at(2))
    sink.write(3, {"tokenizer/loss/total": 0.5}, images_seen=24)
    sink.flush()
    sink.write(4, {"tokenizer/loss/total": 0.25}, images_seen=32)
    sink.close()


ALL = [
    "open after 2",
    "write 3 {'tokenizer/loss/total': 0.5} 24",
    "flush",
    "write 4 {'tokenizer/loss/total': 0.25} 32",
    "close",
]


def test_a_module_is_all_that_a_new_sink_needs(toy: Toy, run: TrackedRun) -> None:
    (sink,) = build_sinks(["toy"], run)
    use(sink)
    (built,) = toy.built
    assert built.run is run
    assert built.calls == ALL


@pytest.mark.parametrize(("moment", "calls"), [("open", 1), ("write", 2), ("flush", 3)])
def test_a_sink_that_fails_is_named_once_and_left_alone(
    toy: Toy, run: TrackedRun, caplog: pytest.LogCaptureFixture, moment: str, calls: int
) -> None:
    toy.fails_at = moment
    with caplog.at_level(logging.WARNING):
        for sink in build_sinks(["toy"], run):
            use(sink)
    assert toy.built[0].calls == ALL[:calls]
    (message,) = caplog.messages
    assert message.startswith("telemetry.sinks: 'toy' has failed and is left out")
    assert "RuntimeError" in message


def test_a_sink_that_fails_at_the_end_harms_nothing(
    toy: Toy, run: TrackedRun, caplog: pytest.LogCaptureFixture
) -> None:
    toy.fails_at = "close"
    (sink,) = build_sinks(["toy"], run)
    use(sink)
    assert len(caplog.messages) == 1


def test_no_credentials_get_into_the_log(
    toy: Toy,
    run: TrackedRun,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy.fails_at = "open"
    monkeypatch.setenv("TOY_API_KEY", "key-of-sixteen-01")
    for sink in build_sinks(["toy"], run):
        use(sink)
    assert "http://[removed]tracking: refused for [removed]" in caplog.text


@pytest.mark.parametrize(
    ("name", "modules"), [("wandb", ["wandb"]), ("mlflow", ["mlflow", "mlflow.entities"])]
)
def test_a_missing_package_is_an_error_that_names_the_extra(
    name: str, modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"fqgan_dist.telemetry.sinks.{name}", raising=False)
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # imports of it fail
    message = rf"telemetry\.sinks: '{name}' needs the package '{name}'.*'fqgan-dist\[{name}\]'"
    with pytest.raises(ConfigError, match=message):
        find_sinks(["tensorboard", name])


def test_every_session_has_the_same_id_and_every_training_its_own(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    first = TrackedRun(storage=storage, stage="tokenizer", name="trial").load_id()
    again = TrackedRun(storage=storage, stage="tokenizer", name="renamed").load_id()
    other = TrackedRun(storage=storage, stage="autoregressive", name="trial").load_id()
    assert first == again != other


def test_a_module_in_the_folder_may_be_named_in_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TelemetryConfig(sinks=("mlflow", "wandb")).sinks == ("mlflow", "wandb")
    known = r"sinks: 'toyy' is no sink; known: mlflow, tensorboard, wandb"
    with pytest.raises(ConfigError, match=known):
        parse_config({"sinks": ["toyy"]}, TelemetryConfig, source="test")
    (tmp_path / "sinks").mkdir()
    (tmp_path / "sinks" / "toy.py").write_text("")
    monkeypatch.setattr(telemetry_config, "__file__", str(tmp_path / "config.py"))
    assert TelemetryConfig(sinks=("toy",)).sinks == ("toy",)
    with pytest.raises(ConfigError, match=r"sinks: 'toyy' is no sink; did you mean 'toy'\?"):
        parse_config({"sinks": ["toyy"]}, TelemetryConfig, source="test")

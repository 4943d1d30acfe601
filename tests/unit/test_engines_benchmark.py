from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.tiny_tasks import TINY_CONFIG

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "engines.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engines_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("stage", "engine"), [("tokenizer", 2), ("autoregressive", 3)])
def test_a_case_trains_saves_and_restores(benchmark: ModuleType, stage: str, engine: int) -> None:
    case = benchmark.Case(
        stage, engine, str(TINY_CONFIG), (f"{stage}.training.precision=bf16",), warmup=0, steps=1
    )
    row = benchmark.run_case(case)
    assert row.is_restored_to_the_bit
    assert (row.backend, row.precision, row.engine) == ("gloo", "bf16", f"ZeRO-{engine}")
    assert row.images_per_step == 8
    assert min(row.loss, row.gradient_norm, row.step_ms, row.checkpoint_gib) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_report_says_that_there_is_no_gpu_and_what_failed(benchmark: ModuleType) -> None:
    row = benchmark.Row("tokenizer", "ZeRO-1", is_restored_to_the_bit=True)
    failed = replace(row, is_restored_to_the_bit=False, error="RuntimeError: out of memory\n")
    table = benchmark.to_table([row, failed], "tiny.yaml")
    assert "NO GPU: torch sees none" in table
    assert "FAILED: RuntimeError: out of memory" in table
    report = json.loads(benchmark.to_json([row], "tiny.yaml"))
    assert report["warning"].startswith("NO GPU")
    assert report["rows"][0]["engine"] == "ZeRO-1"

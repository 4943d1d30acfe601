"""Python and packages against what this project asks for, and DeepSpeed, which is run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fqgan_dist.data.jpeg_regions import explain_absence
from fqgan_dist.diagnosis.programs import import_path, run_programs
from fqgan_dist.diagnosis.verdict import Verdict, failed, judge, ok

DISTRIBUTION = "fqgan-dist"
PYTHON, PACKAGES, DEEPSPEED = "Python", "packages", "DeepSpeed"
DECODER = "image decoder"
_SHOWN = ("torch", "ray", "deepspeed")
_INSTALL = "install the project with its dependencies: pip install -c constraints.txt ."

# In a process of its own: importing takes seconds, may compile or crash, and changes the process
# that does it. The library itself imports deepspeed in one module only.
_DEEPSPEED_PROGRAM = """
import json, deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
print(json.dumps({
    "version": deepspeed.__version__,
    "device": get_accelerator().device_name(),
    "backend": get_accelerator().communication_backend_name(),
    "operators": sorted(name for name, is_built in installed_ops.items() if is_built),
}))
"""
DEEPSPEED_TIME_LIMIT_S = 120.0


def check_python() -> Verdict:
    """Compare the interpreter with what the project asks for."""
    version = platform.python_version()
    required = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    finding = f"{version} ({sys.executable})"
    if SpecifierSet(required).contains(version, prereleases=True):
        return ok(PYTHON, finding)
    return failed(PYTHON, f"{finding}, expected {required}", f"use a Python {required}")


def check_packages() -> Verdict:
    """Compare the installed packages with the project's requirements."""
    requirements = [
        requirement
        for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    problems = [text for text in map(_find_problem, requirements) if text]
    if problems:
        return failed(PACKAGES, "; ".join(problems), _INSTALL)
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _SHOWN)
    return ok(PACKAGES, f"{len(requirements)} as required ({shown})")


def _find_problem(requirement: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}, expected {requirement.specifier}"


def check_decoder() -> Verdict:
    """See whether the compiled part of image loading is there."""
    finding = "crops of JPEGs are decoded alone"
    absence = explain_absence()
    if absence is not None:
        finding = "JPEGs are decoded whole: the same pixels, for more CPU time"
    return judge(DECODER, finding, failures=[], warnings=[absence] if absence else [])


def check_deepspeed() -> Verdict:
    """Import DeepSpeed in another process."""
    command = [sys.executable, "-c", _DEEPSPEED_PROGRAM]
    (finished,) = run_programs(
        [command], time_limit_s=DEEPSPEED_TIME_LIMIT_S, environments=[import_path()]
    )
    if not finished.has_succeeded:
        return failed(DEEPSPEED, f"cannot be imported: {finished.reason}", _INSTALL)
    # DeepSpeed logs to standard output; ours is the last line.
    facts = json.loads(finished.output.splitlines()[-1])
    operators = ", ".join(facts["operators"]) or "none"
    warnings = []
    if torch.cuda.is_available() and facts["device"] != "cuda":
        warnings.append("it does not use this node's GPUs: remove DS_ACCELERATOR")
    return judge(
        DEEPSPEED,
        f"{facts['version']}, device {facts['device']}, backend {facts['backend']}; operators "
        f"compiled beforehand: {operators} (the engines need none)",
        failures=[],
        warnings=warnings,
    )

"""The wheel is built everywhere: with the compiled part where it can be, without it elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full("builds wheels; the compiled part itself is tested always")
@pytest.mark.parametrize("compiler", ["cc", "/bin/false"])
def test_wheel_is_built_with_and_without_a_compiler(compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fqgan_dist", "data_tools"):
        shutil.copytree(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source],
        env={**os.environ, "CC": compiler},
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    compiled = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert compiled == (["_fqgan_jpeg_regions.abi3.so"] if compiler == "cc" else [])

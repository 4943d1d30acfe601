"""Write the resolved values of every file in configs/ to tests/golden/configs/ (`make golden`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
GOLDEN = Path(__file__).resolve().parent / "configs"


def config_files() -> list[Path]:
    return sorted(CONFIGS.rglob("*.yaml"))


def golden_file(config: Path) -> Path:
    return GOLDEN / config.relative_to(CONFIGS).with_suffix(".json")


def resolve_config(config: Path) -> str:
    values = load_config(config, [], RunConfig).model_dump(mode="json")
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def main() -> None:
    wanted = {golden_file(config): resolve_config(config) for config in config_files()}
    for path in set(GOLDEN.rglob("*.json")) - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())

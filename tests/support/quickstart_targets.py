"""Check a quickstart's summary against what it must reach.

python tests/support/quickstart_targets.py runs/quickstart/summary.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def find_misses(summary: dict[str, Any]) -> list[str]:
    """List the targets that a summary misses."""
    tokenizer = summary["tokenizer"]["metrics"]
    generator = summary["autoregressive"]["metrics"]
    checks = [
        ("PSNR >= 20 dB", tokenizer["psnr"] >= 20),
        (
            "PSNR >= 5 dB above the mean image",
            tokenizer["psnr"] >= tokenizer["psnr_mean_image"] + 5,
        ),
        (
            "FAR's validation loss <= 0.9 x unigram entropy",
            generator["validation_loss"] <= 0.9 * generator["unigram_entropy"],
        ),
        ("discriminator has started, finite", _is_finite(tokenizer["discriminator_loss"])),
        ("gFID is finite", math.isfinite(summary["samples"]["metrics"]["gfid"])),
    ]
    checks += [
        (f"perplexity of {name} >= 25 % of its size", value >= 0.25 * tokenizer["codebook_size"])
        for name, value in tokenizer["perplexity"].items()
    ]
    checks += [
        (f"InfoNCE of {name} <= chance - 0.05", value <= tokenizer["info_nce_chance"] - 0.05)
        for name, value in tokenizer["info_nce"].items()
    ]
    checks += [
        (f"stage {name} is done", stage["state"] == "done") for name, stage in summary.items()
    ]
    return [what for what, holds in checks if not holds]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def main() -> int:
    summary = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    misses = find_misses(summary)
    print("\n".join(f"MISSED: {miss}" for miss in misses) or "every quickstart target is met")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())

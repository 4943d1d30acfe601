"""Every reader of files that somebody else may have written: a valid file, its damage, the reading.

What a reader checks by a hash that stands elsewhere is made to fit the damaged bytes, since whoever
wrote them wrote the hash too.
"""

from __future__ import annotations

from support import fuzz_datasets, fuzz_runs, fuzz_sources
from support.fuzzing import Target

TARGETS: tuple[Target, ...] = (
    *fuzz_datasets.TARGETS,
    *fuzz_runs.TARGETS,
    *fuzz_sources.TARGETS,
)
"""What `test_fuzzing` and `fuzzing.py` feed."""

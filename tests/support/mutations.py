"""Safeguards that are taken out of the source one at a time: a named test must go red each time.

    python tests/support/mutations.py [NAME ...]

A test that stays green without what it guards proves nothing. The working tree (what git knows or
would add) is copied to a temporary folder; there, after the tests were green once, each mutation is
made alone and its test is run. Exit code 1: a test stayed green, could not be run, or was red
before; or the text to be replaced is not in its file exactly once. Two minutes on one core.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300
_GREEN, _RED = 0, 1
"""Exit codes of pytest: all passed, some failed. Others are neither: nothing was collected, say."""

Result = Literal["red", "green", "not run"]


@dataclass(frozen=True)
class Mutation:
    """One change of the source, and the test that must see it."""

    name: str
    file: str
    """Below the root of the checkout."""
    old: str
    """Is in the file exactly once."""
    new: str
    test: str
    """Path and name; all its parameters are run."""

    def find_fault(self, root: Path) -> str | None:
        """Say why it cannot be made in a checkout, or its test not be run; None: all is well."""
        path = root / self.file
        count = path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0
        if count != 1:
            return f"{self.file}: holds the text to be replaced {count} times, expected once"
        file, _, name = self.test.partition("::")
        test_path = root / file
        if not test_path.is_file() or name not in _list_functions(test_path):
            return f"{self.test}: there is no such test"
        return None


_FREEZE = "tests/unit/stages/test_tokenizer_task.py::"
_LOG = "tests/unit/training/test_commit_log.py::"
_SESSIONS = "tests/unit/telemetry/test_sessions.py::"
_READING = "tests/unit/training/test_checkpoint_reading.py::"

MUTATIONS = (
    Mutation(
        "freeze of the discriminator",
        "fqgan_dist/training/engine_base.py",
        "parameter.requires_grad_(False)",
        "pass",
        _FREEZE + "test_the_discriminator_is_frozen_while_the_tokenizer_s_loss_flows_through",
    ),
    Mutation(
        "guard of the freeze",
        "fqgan_dist/stages/tokenizer_task.py",
        "self.discriminator_engine.require_frozen()",
        "pass",
        _FREEZE + "test_a_discriminator_that_is_not_frozen_is_noticed",
    ),
    Mutation(
        "fence of commits",
        "fqgan_dist/training/commit_log.py",
        "if winner.attempt not in (None, self.attempt):",
        "if False:",
        _LOG + "test_an_older_attempt_stops_for_good_and_names_the_newer",
    ),
    Mutation(
        "fence of commits, before the upload",
        "fqgan_dist/training/checkpoint_attempt.py",
        "self._log_writer.raise_if_superseded()\n        folder",
        "pass\n        folder",
        "tests/unit/training/test_checkpoint_attempt.py::"
        "test_a_superseded_attempt_does_not_upload_first",
    ),
    Mutation(
        "fence of side files: a look for newer sessions",
        "fqgan_dist/telemetry/sessions.py",
        "return any(each.number > own for each in self._list_sessions())",
        "return False",
        _SESSIONS + "test_one_that_was_believed_dead_changes_nothing",
    ),
    Mutation(
        "fence of side files: a file of one's own",
        "fqgan_dist/telemetry/sessions.py",
        'return f"{self.number:010d}-from-{self.resumed_step:08d}-{self.attempt}"',
        'return f"{0:010d}-from-{0:08d}-0"',
        _SESSIONS + "test_one_that_was_believed_dead_changes_nothing",
    ),
    Mutation(
        "fence of side files: made only where there was none",
        "fqgan_dist/telemetry/sessions.py",
        "self._storage.create_bytes(self._path, data)",
        "self._storage.write_bytes(self._path, data)",
        _SESSIONS + "test_a_sleeper_that_wakes_between_two_calls_changes_nothing",
    ),
    Mutation(
        "fence of side files: replaced only if it is what it was",
        "fqgan_dist/telemetry/sessions.py",
        "self._storage.replace_bytes(self._path, data, former=opened.published)",
        "self._storage.write_bytes(self._path, data)",
        _SESSIONS + "test_a_sleeper_that_wakes_between_two_calls_changes_nothing",
    ),
    Mutation(
        "fence of derived files",
        "fqgan_dist/storage/derived.py",
        "storage.replace_bytes(path, data, former=former)",
        "storage.write_bytes(path, data)",
        "tests/unit/storage/test_derived.py::test_a_state_that_is_over_never_comes_back",
    ),
    Mutation(
        "hash of a block",
        "fqgan_dist/training/checkpoint_reading.py",
        "if hashlib.sha256(block).hexdigest() != blocks.of(number):",
        "if False:",
        _READING + "test_damage_matters_where_it_is_needed",
    ),
    Mutation(
        "hash of a file without blocks",
        "fqgan_dist/training/checkpoint_reading.py",
        "if hashlib.sha256(data).hexdigest() != file.sha256:",
        "if False:",
        _READING + "test_files_without_hashes_of_blocks_are_read_and_verified_whole",
    ),
    Mutation(
        "hash of a manifest",
        "fqgan_dist/training/checkpoint.py",
        "if sha256_hex(data) != record.manifest_sha256:",
        "if False:",
        "tests/unit/training/test_checkpoint.py::"
        "test_a_manifest_that_was_changed_and_reads_well_is_never_loaded",
    ),
    Mutation(
        "hash of a record of the log",
        "fqgan_dist/training/commit_log.py",
        "is_whole = sha256_hex(canonical_json(content)) == digest",
        "is_whole = True",
        _LOG + "test_a_flipped_bit_in_a_record_is_found",
    ),
    Mutation(
        "entry of the ledger",
        "fqgan_dist/training/checkpoint_attempt.py",
        "consumed=consumed,\n                written_at",
        "consumed=None,\n                written_at",
        "tests/unit/training/test_trainer.py::"
        "test_the_log_proves_what_was_trained_on_though_a_run_was_killed",
    ),
    Mutation(
        "counting what the loaders gave",
        "fqgan_dist/training/hooks.py",
        "if len(self._consumed) != 1 or whole is None or (whole.start, whole.end) != (start, end):",
        "if whole is None:",
        "tests/unit/training/test_trainer.py::"
        "test_a_loader_that_gives_other_positions_commits_nothing",
    ),
    Mutation(
        "retry of a request",
        "fqgan_dist/storage/retries.py",
        "if not error.is_passing or left_s <= 0:",
        "if True:",
        "tests/unit/storage/test_storage_retries.py::test_passing_fault_is_not_noticed",
    ),
    Mutation(
        "retry of a training after an outage",
        "fqgan_dist/orchestration/failures.py",
        'return "storage"',
        'return "permanent"',
        "tests/unit/orchestration/test_failures.py::test_what_would_come_again_is_permanent",
    ),
    Mutation(
        "no retry of what would come again",
        "fqgan_dist/orchestration/failures.py",
        'return "permanent" if is_permanent else "unknown"',
        'return "unknown"',
        "tests/unit/orchestration/test_failures.py::test_what_would_come_again_is_permanent",
    ),
)


def find_faults(root: Path = ROOT) -> list[str]:
    """List the mutations that can no longer be made, each with the reason."""
    faults = ((each.name, each.find_fault(root)) for each in MUTATIONS)
    return [f"{name}: {fault}" for name, fault in faults if fault]


def run_all(mutations: Sequence[Mutation]) -> int:
    """Make each mutation in a copy of the tree, and print what became of its test."""
    is_good = True
    with _copied_tree() as root:
        before = _run_tests(root, sorted({each.test for each in mutations}))
        _print(f"without mutations: {before}")
        if before != "green":
            return 1
        for each in mutations:
            result = _try(root, each)
            is_good &= result == "red"
            _print(f"{result:8}{each.name}\n        {each.file}\n        {each.test}")
    return 0 if is_good else 1


def _try(root: Path, mutation: Mutation) -> str:
    if fault := mutation.find_fault(root):
        return f"not run ({fault})"
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return _run_tests(root, [mutation.test])
    finally:
        path.write_text(text, encoding="utf-8")


@contextmanager
def _copied_tree() -> Iterator[Path]:
    """Copy what git knows or would add to a folder that is removed at the end."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder)
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name)
        yield root


def _run_tests(root: Path, tests: Sequence[str]) -> Result:
    # No bytecode: a file that is changed twice within a second would be taken for the former.
    environment = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=root,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "not run"
    if done.returncode not in (_GREEN, _RED):
        _print(done.stdout + done.stderr)
        return "not run"
    return "green" if done.returncode == _GREEN else "red"


def _list_functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    chosen = [each for each in MUTATIONS if each.name in sys.argv[1:] or not sys.argv[1:]]
    sys.exit(run_all(chosen) if chosen else 2)

"""One thread per test process, and the folder of real images, named loudly where it is missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch or numpy is imported: their thread pools are sized then.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# A busy machine is no failure; CI repeats the same examples, so that a red run can be repeated.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")

_TESTS_DIR = Path(__file__).resolve().parent
if str(_TESTS_DIR) not in sys.path:
    sys.path.insert(0, str(_TESTS_DIR))  # for `support`, under any import mode

from support.tiers import parse_part, split  # noqa: E402  found by the path above

pytest.register_assert_rewrite("support.storage_contract")  # its tests say what differs, as others

_DATA_VARIABLE = "FQGAN_TEST_DATA"
_MISSING_DATA = f"no real images: set {_DATA_VARIABLE} to the folder of test data"


def _find_data_dir() -> Path | None:
    named = os.environ.get(_DATA_VARIABLE)
    if named is not None:
        return Path(named)
    beside = _TESTS_DIR.parents[1] / "shared" / "data"
    return beside if beside.is_dir() else None


@pytest.fixture(scope="session")
def test_data_dir() -> Path:
    """The folder that holds `imagenet-sample/` and `tiny-imagenet-20/`."""
    folder = _find_data_dir()
    if folder is None:
        pytest.skip(_MISSING_DATA)
    if not folder.is_dir():
        pytest.fail(f"{_DATA_VARIABLE}={folder}: no such folder")
    return folder


@pytest.fixture
def without_root() -> Iterator[None]:
    """Root may read and write everything: be somebody else from here to the end of the test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="of the files, in parts of one length: K/N")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Name what stays together in `make test-full`: a file; all that start clusters.

    Two clusters on two cores starve each other.
    """
    group = "ray" if item.get_closest_marker("ray") else f"{item.path.parent.name}/{item.path.stem}"
    item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(trylast=True)  # of what the markers have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of one part of the files."""
    number, count = parse_part(config.getoption("--part"))
    if count == 1:
        return
    files = {item: item.path.relative_to(_TESTS_DIR).as_posix() for item in items}
    part = split(sorted(set(files.values())), count)[number]
    config.hook.pytest_deselected(items=[item for item in items if files[item] not in part])
    items[:] = [item for item in items if files[item] in part]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With FQGAN_FORBID_SKIPS, as in CI, a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FQGAN_FORBID_SKIPS") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _find_summary(report: pytest.TestReport) -> list[object]:
    return [value for name, value in report.user_properties if name == "summary"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not tested for want of something that this machine lacks, and what was measured.

    A test records `summary` as a property.
    """
    reports = [each for each in terminalreporter.stats.get("passed", []) if each.when == "call"]
    if summary := [str(value) for each in reports for value in _find_summary(each)]:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(summary))
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("NOT TESTED on this machine", sep="!", yellow=True, bold=True)
        for reason, count in sorted(reasons.items()):
            terminalreporter.write_line(f"{count} test(s): {reason}", yellow=True)

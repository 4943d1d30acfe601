"""The layout holds: import directions, optional heavy packages, and configs that load."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("fqgan_dist", "data_tools")
PACKAGES = (*LIBRARY, "cluster", "benchmarks")

BASE, SETTINGS, STORAGE, WEIGHTS, SIBLING, WORK, USER, STAGES, REPORT, TOP = range(10)

LEVELS = {
    "fqgan_dist": BASE,
    "activity": BASE,
    "config": BASE,
    "credentials": BASE,
    "devices": BASE,
    "ec2_notice": BASE,
    "errors": BASE,
    "fingerprint": BASE,
    "loss_group": BASE,
    "notice": BASE,
    "randomness": BASE,
    "process_identity": BASE,
    "recovery": BASE,
    "stopped_processes": BASE,
    "terminal": BASE,
    "termination": BASE,
    "waiting": BASE,
    "world": BASE,
    "yaml_text": BASE,
    "cluster": STORAGE,
    "storage": STORAGE,
    "command_line": WEIGHTS,
    "weights": WEIGHTS,
    "autoregressive": SIBLING,
    "data": SIBLING,
    "teachers": SIBLING,
    "telemetry": SIBLING,
    "tokenizer": SIBLING,
    "chunks": WORK,
    "evaluation": USER,
    "sharding": USER,
    "training": USER,
    "stages": STAGES,
    "report": REPORT,
    "data_tools": REPORT,
    "diagnosis": REPORT,
    "benchmarks": TOP,
    "cli": TOP,
    "orchestration": TOP,
}
"""design.md, section 2. A part may import lower levels and itself, never its own level.

`report`, `diagnosis` and `data_tools` are top, but know nothing of `cli` and `orchestration`, which
call them.
`chunks` tells an observer of `telemetry` how far work is, and all that has work needs `chunks`.
Base and top modules may import each other within their level, and so may the settings: the
`config` module of each package, which knows base and settings only, not even its own package.
`cluster` submits from a laptop: of the library it takes base and settings only. `benchmarks`
measure all of it. Nothing imports these two.
"""

LIGHT_MODULES = {
    "fqgan_dist.stages.catalog",
    "fqgan_dist.storage.names",
    "fqgan_dist.storage.uri",
}
"""What settings are made of besides the packages' `config` modules: they count as settings too."""

ENTRY_POINTS = {"fqgan_dist.training.run", "data_tools.workers"}
"""Commands, and what starts their processes: they count as top wherever they lie."""

HOMES = {
    "ray": ("fqgan_dist.orchestration", "cluster", "benchmarks.fault_campaign.injection"),
    "deepspeed": ("fqgan_dist.training.engine_deepspeed",),
    "cluster": ("cluster",),
    "benchmarks": ("benchmarks",),
    "s3fs": ("fqgan_dist.storage.s3_connection",),
    "fsspec": ("fqgan_dist.storage.s3_connection",),
    "boto3": ("fqgan_dist.storage.s3_connection",),
    # The benchmark's control is plain connections to addresses that botocore signs.
    "botocore": ("fqgan_dist.storage.s3_connection", "benchmarks.data_loading.bandwidth"),
    "aiobotocore": ("fqgan_dist.storage.s3_connection",),
    "wandb": ("fqgan_dist.telemetry.sinks.wandb",),
    "mlflow": ("fqgan_dist.telemetry.sinks.mlflow",),
}
"""Package -> the only modules (and their submodules) that may import it."""


SCHEME_HOME = "fqgan_dist.storage"
"""The only package that may ask for the scheme of a URI; its `names` answer everybody else."""

TEXT_TESTS = {
    "startswith", "endswith", "removeprefix", "removesuffix", "split", "rsplit", "partition",
    "rpartition", "find", "rfind", "index", "rindex", "count", "replace",
    "match", "fullmatch", "search",
}  # fmt: skip
"""Not `compile` and `sub`: patterns that hide passwords in any text look for what follows `://`."""


@dataclass(frozen=True)
class Import:
    module: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.imported}"


def find_modules() -> dict[str, Path]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {module_name(path): path for path in paths}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = find_modules()


def find_imports(module: str, source: str, *, is_package: bool = False) -> Iterator[Import]:
    """Find every import of a module, at any depth, those for type checking included."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield Import(module, name.name, node.lineno)
            case ast.ImportFrom(module=origin, names=names, level=level):
                parent = resolve(module, origin, level, is_package)
                for name in names:
                    # "from fqgan_dist import data" imports a part, not only the package.
                    inner = f"{parent}.{name.name}"
                    is_module = parent in PACKAGES or inner in MODULES
                    yield Import(module, inner if is_module else parent, node.lineno)
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(module, name, node.lineno)


def resolve(module: str, origin: str | None, level: int, is_package: bool) -> str:
    if level == 0:
        assert origin is not None
        return origin
    parts = module.split(".")
    kept = parts[: len(parts) - level + is_package]
    return ".".join([*kept, *([origin] if origin else [])])


def part_of(module: str) -> str:
    root, _, rest = module.partition(".")
    return rest.partition(".")[0] if root == "fqgan_dist" and rest else root


def is_settings(module: str) -> bool:
    return module in LIGHT_MODULES or re.fullmatch(r"fqgan_dist\.\w+\.config", module) is not None


def level_of(module: str) -> int:
    if module in ENTRY_POINTS:
        return TOP
    if is_settings(module):
        return SETTINGS
    part = part_of(module)
    assert part in LEVELS, (
        f"{module}: {part!r} is not in the layout; add it to design.md and LEVELS"
    )
    return LEVELS[part]


def is_allowed(found: Import) -> bool:
    root = found.imported.partition(".")[0]
    if root in HOMES:
        return any(is_inside(found.module, home) for home in HOMES[root])
    if root not in PACKAGES:
        return True
    if part_of(found.imported) == part_of(found.module) and not is_settings(found.module):
        return True
    # "from fqgan_dist import __version__" names no part: the package itself is base.
    imported = found.imported if part_of(found.imported) in LEVELS else root
    level, imported_level = level_of(found.module), level_of(imported)
    return imported_level < level or (level == imported_level and level in (BASE, SETTINGS, TOP))


def is_inside(module: str, home: str) -> bool:
    return module == home or module.startswith(home + ".")


def all_imports() -> list[Import]:
    return [
        found
        for module, path in MODULES.items()
        for found in find_imports(
            module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py"
        )
    ]


def test_imports_follow_the_table() -> None:
    violations = [str(found) for found in all_imports() if not is_allowed(found)]
    assert not violations, "\n".join(violations)


def test_every_module_has_a_place_in_the_layout() -> None:
    for module in MODULES:
        level_of(module)


def find_circle(imports: Iterable[Import]) -> list[str]:
    """Give modules each of which imports the next, the last one being the first; else nothing."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        graph.setdefault(found.module, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]  # it names who is imported first
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    # Late imports count: a circle that they hide is one part in two files all the same.
    assert " -> ".join(find_circle(all_imports())) == ""


def test_the_search_finds_a_circle_through_a_late_import() -> None:
    sources = {
        "fqgan_dist.a": "from fqgan_dist.b import x",
        "fqgan_dist.b": "from fqgan_dist.c import y",
        "fqgan_dist.c": "def run():\n    from fqgan_dist.a import z",
    }
    found = [one for module, text in sources.items() for one in find_imports(module, text)]
    circle = find_circle(found)
    assert circle[0] == circle[-1]
    assert set(circle) == set(sources)
    assert set(pairwise(circle)) == {(one.module, one.imported) for one in found}
    assert find_circle(found[:2]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fqgan_dist.tokenizer.losses", "import ray"),
        ("fqgan_dist.stages.codes", "def run():\n    from ray.data import Dataset"),
        ("fqgan_dist.training.trainer", "import deepspeed.comm as dist"),
        ("fqgan_dist.data.loader", "import s3fs"),
        ("fqgan_dist.telemetry.metrics", "import wandb"),
        ("fqgan_dist.evaluation.fid", "from fsspec import open"),
        ("fqgan_dist.tokenizer.model", "from fqgan_dist.teachers.clip import build"),
        ("fqgan_dist.tokenizer.model", "from fqgan_dist import teachers"),
        ("fqgan_dist.tokenizer.model", "from ..teachers import clip"),
        ("fqgan_dist.telemetry", "if TYPE_CHECKING:\n    from fqgan_dist.data import order"),
        ("fqgan_dist.training.trainer", "from fqgan_dist.evaluation.fid import frechet_distance"),
        ("fqgan_dist.training.trainer", "import fqgan_dist.stages.codes"),
        ("fqgan_dist.stages.codes", "from fqgan_dist.orchestration import driver"),
        ("fqgan_dist.stages.codes", "importlib.import_module('data_tools.cli')"),
        ("fqgan_dist.report.page", "from fqgan_dist.cli import main"),
        ("fqgan_dist.config", "from fqgan_dist.telemetry import metrics"),
        ("fqgan_dist.config", "from fqgan_dist.storage.storage import Storage"),
        ("fqgan_dist.config", "from fqgan_dist.data.config import DataConfig"),
        ("fqgan_dist.storage.storage", "from fqgan_dist.data.index import DatasetIndex"),
        ("fqgan_dist.storage.storage", "from fqgan_dist.weights.staging import resolve_weights"),
        ("fqgan_dist.data.config", "from fqgan_dist.data.views import num_views"),
        ("fqgan_dist.stages.config", "from fqgan_dist.stages.stage import Stage"),
        ("fqgan_dist.teachers.config", "from fqgan_dist.weights.files import save_safetensors"),
        ("fqgan_dist.telemetry.observer", "from fqgan_dist.chunks import ChunkWork"),
        ("fqgan_dist.chunks", "from fqgan_dist.sharding.tasks import ShardWork"),
        ("fqgan_dist.stages.codes", "from fqgan_dist.training import run"),
        ("fqgan_dist.storage.names", "from fqgan_dist.weights.files import save_safetensors"),
        ("cluster.submission", "from fqgan_dist.storage.storage import Storage"),
        ("cluster.submission", "from fqgan_dist.orchestration import driver"),
        ("benchmarks.engines", "import ray"),
        ("fqgan_dist.orchestration.driver", "from cluster.ray_jobs import RayJobs"),
        ("fqgan_dist.cli", "import benchmarks.paired"),
    ],
)
def test_the_table_forbids(module: str, source: str) -> None:
    assert not all(map(is_allowed, find_imports(module, source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fqgan_dist.orchestration.driver", "import ray.train"),
        ("fqgan_dist.training.engine_deepspeed", "import deepspeed"),
        ("fqgan_dist.storage.s3_connection", "import s3fs"),
        ("fqgan_dist.training.run", "from fqgan_dist.stages import codes"),
        ("fqgan_dist.training.trainer", "from fqgan_dist.tokenizer.model import X\nimport raylib"),
        ("fqgan_dist.data.loader", "from fqgan_dist.data.order import SampleOrder"),
        ("fqgan_dist.telemetry.log_files", "from fqgan_dist.storage.storage import Storage"),
        ("fqgan_dist.weights.staging", "from fqgan_dist.storage.storage import Storage"),
        ("fqgan_dist.teachers.clip", "from fqgan_dist.weights.files import load_torch_checked"),
        ("fqgan_dist.teachers.config", "from fqgan_dist.weights.config import WeightsConfig"),
        ("fqgan_dist.stages.config", "from fqgan_dist.orchestration.config import RayConfig"),
        ("fqgan_dist.stages.placement", "from fqgan_dist.orchestration.config import PoolConfig"),
        ("fqgan_dist.chunks", "from fqgan_dist.telemetry.observer import Observer"),
        ("fqgan_dist.sharding.tasks", "from fqgan_dist.chunks import ProcessLocalCaches"),
        ("fqgan_dist.weights.config", "from fqgan_dist.storage.names import is_remote"),
        ("fqgan_dist.cli", "from fqgan_dist.orchestration import driver"),
        ("fqgan_dist.world", "from fqgan_dist import __version__"),
        ("cluster.ray_jobs", "import ray\nfrom fqgan_dist.errors import ClusterError"),
        ("benchmarks.engines", "from fqgan_dist.orchestration import driver"),
    ],
)
def test_the_table_allows(module: str, source: str) -> None:
    found = list(find_imports(module, source))
    assert found
    assert all(map(is_allowed, found))


def find_scheme_tests(module: str, source: str) -> Iterator[str]:
    """Find comparisons, patterns and calls of string methods that name the scheme of a URI."""
    if is_inside(module, SCHEME_HOME):
        return
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        match node:
            case ast.Compare(left=left, comparators=others):
                asked = [left, *others]
            case ast.Call(func=ast.Attribute(attr=method), args=args) if method in TEXT_TESTS:
                asked = args
            case ast.MatchValue(value=value):
                asked = [value]
        for text in (text for each in asked for text in find_texts(each)):
            if "://" in text or text.rstrip(":/") in BACKENDS:
                yield f"{module}:{getattr(node, 'lineno', 0)} looks at a URI's scheme: {text!r}"


def find_texts(node: ast.expr) -> Iterator[str]:
    """Find the texts that an expression stands for, those in tuples and f-strings included."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            yield from (text for part in parts for text in find_texts(part))
        case ast.JoinedStr(values=parts):
            yield from (text for part in parts for text in find_texts(part))


def test_only_the_storage_room_asks_for_schemes() -> None:
    found = [
        each
        for module, path in find_modules().items()
        for each in find_scheme_tests(module, path.read_text(encoding="utf-8"))
    ]
    assert not found, "ask fqgan_dist.storage.names instead:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "is_remote = '://' in source",
        "if root.startswith('s3://'): pass",
        "if root.startswith(('/', 's3://')): pass",
        "scheme, _, rest = uri.partition('://')",
        "bucket = uri.removeprefix(f's3://{owner}/')",
        "if folder in ('s3:', 's3:/'): pass",
        "if urlsplit(uri).scheme == 's3': pass",
        "if re.match('[a-z]+://', uri): pass",
        "match urlsplit(uri).scheme:\n    case 's3': pass",
    ],
)
def test_the_search_finds_questions_for_schemes(source: str) -> None:
    assert list(find_scheme_tests("fqgan_dist.stages.codes", source))
    assert not list(find_scheme_tests("fqgan_dist.storage.names", source))


@pytest.mark.parametrize(
    "source",
    [
        "raise ConfigError(f'{root}: expected a path or s3://bucket/prefix')",
        "storage = Storage(f's3://{bucket}')",
        "if reference.startswith('adm:') or '/' in name: pass",
        "is_remote = names.is_remote(source)",
        "hidden = re.compile('(?<=://)[^@]+@').sub('***@', line)",
    ],
)
def test_the_search_leaves_other_texts_alone(source: str) -> None:
    assert not list(find_scheme_tests("fqgan_dist.stages.codes", source))


IMPORT_ALL = """
import importlib, sys, traceback

HIDDEN = {"ray", "deepspeed", "wandb", "mlflow"}

class Hiding:
    '''A finder that does not find the hidden packages, as if they were not installed.'''

    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
failed = False
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError:
        failed = True
        print(f"cannot import {module}", file=sys.stderr)
        traceback.print_exc()
sys.exit(failed)
"""


def import_without_optional_packages(modules: list[str], folder: Path) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    return result.returncode, result.stderr


def test_the_library_imports_without_optional_packages_or_a_gpu() -> None:
    heavy = [home for package in ("ray", "deepspeed", "wandb", "mlflow") for home in HOMES[package]]
    modules = [
        name
        for name in MODULES
        if name.startswith(LIBRARY) and not any(is_inside(name, home) for home in heavy)
    ]
    status, errors = import_without_optional_packages(modules, ROOT)
    assert status == 0, errors


@pytest.mark.parametrize("package", ["ray", "deepspeed.comm", "wandb", "mlflow.entities"])
def test_the_import_test_hides_packages(package: str, tmp_path: Path) -> None:
    (tmp_path / "user_module.py").write_text(f"import {package}\n")
    status, errors = import_without_optional_packages(["user_module"], tmp_path)
    assert status == 1
    assert "cannot import user_module" in errors


def config_files() -> list[Path]:
    return sorted(path for path in (ROOT / "configs").rglob("*.y*ml"))


@pytest.mark.parametrize("path", config_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_loads(path: Path) -> None:
    load_config(path, [], RunConfig)


def test_source_files_stay_small() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    too_long = {name: length for name, length in lengths.items() if length > 500}
    assert not too_long, textwrap.shorten(f"split these files: {too_long}", 500)


SHORT_BODY = 5
"""Lines of a public function whose name and signature may say it all (house_style.md)."""


def test_public_functions_that_are_not_short_have_docstrings() -> None:
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    # What implements a method or overrides one is documented where that is declared.
    declared = {
        function.name
        for tree in trees.values()
        for owner in find_public_classes(tree)
        for function in find_public_functions(owner)
        if is_declaration(owner, function)
    }
    undocumented = [
        f"{module}:{function.lineno} {function.name}"
        for module, tree in trees.items()
        for owner in (tree, *find_public_classes(tree))
        for function in find_public_functions(owner)
        if ast.get_docstring(function) is None
        and count_body_lines(function) > SHORT_BODY
        and not (isinstance(owner, ast.ClassDef) and function.name in declared)
    ]
    assert not undocumented, "give these a docstring:\n" + "\n".join(undocumented)


def find_public_classes(tree: ast.Module) -> list[ast.ClassDef]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [node for node in found if not node.name.startswith("_")]


def find_public_functions(owner: ast.Module | ast.ClassDef) -> list[ast.FunctionDef]:
    found = [node for node in owner.body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if not node.name.startswith("_")]


def is_declaration(owner: ast.ClassDef, function: ast.FunctionDef) -> bool:
    """Whether a method is one of a protocol, abstract, or made to be overridden by a hook."""
    bases = {ast.unparse(base).partition("[")[0] for base in owner.bases}
    is_abstract = any(ast.unparse(each) == "abstractmethod" for each in function.decorator_list)
    is_base = bool(bases & {"Protocol", "ABC", "BaseModel"}) or owner.name == "TrainerHook"
    return ast.get_docstring(function) is not None and (is_base or is_abstract)


def count_body_lines(function: ast.FunctionDef) -> int:
    first = function.body[0]
    assert function.end_lineno is not None
    return function.end_lineno - first.lineno + 1

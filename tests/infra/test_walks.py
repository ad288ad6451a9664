"""The commands of README.md and infra/README.md, run as they stand there.

Each command of these pages is in the table below: a test here or elsewhere runs it, or the table
says why it cannot be run and what is checked instead. The walks change nothing outside their
folders: /opt, /etc and /var/lib become folders of the test's own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from support.command import arriero
from support.namespace import namespace, why_not

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, ROOT, blocks, commands

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
INFRA = ROOT / "infra"
RUN = {
    "arriero models import": "test_the_readmes_use",
    "arriero up --model": "test_the_readmes_use",
    "arriero chat": "test_the_readmes_use",
    "curl": "test_the_readmes_use",
    "arriero down": "test_the_readmes_use",
    "arriero plan": "test_commands.py",
    "infra/kubernetes/secrets.sh": "test_kubernetes.py",
    "arriero keys add": "test_a_key_for_a_client",
    "infra/tls/make-certs.sh": "test_commands.py",
    "FILE=link infra/tls": "test_commands.py",
    "FILE=admin infra/tls": "test_commands.py",
    "git clone": "test_the_machines_install",
    "python3 -m venv": "test_the_machines_install",
    "/opt/arriero/bin/pip": "test_the_machines_install",
    "cp": "test_the_machines_install",
    "mkdir": "test_the_machines_install",
    "echo": "test_the_machines_install",
    "tr": "test_the_machines_install",
    "arriero status": "test_runbook.py",
    "arriero why": "test_runbook.py",
    "arriero logs": "test_runbook.py",
    "arriero doctor": "test_runbook.py",
    "arriero up arriero.yaml --address": "test_live.py",
    "export ARRIERO_ADMIN": "test_live.py",
}
"""Beginnings of commands, and the test that runs them."""
NOT_RUN = {
    "make": "`make` would test itself; `make --dry-run` reads every target",
    "kubectl create": "no cluster; tests build every overlay with `kubectl kustomize`",
    "kubectl apply": "no cluster; tests build every overlay with `kubectl kustomize`",
    "kubectl -n arriero": "no cluster; test_commands.py checks names and the command behind `--`",
    "useradd": "it would change this machine",
    "install -d": "it gives a folder to the user that `useradd` makes",
    "systemctl": "no systemd; test_metal.py checks the units and runs their scripts",
    "sudo": "no such user here; test_live.py has the same environment",
    "infra/": "a name of a folder or file, not a command",
    "docker build": "no daemon; test_the_image_can_be_built runs the steps that need none",
}
"""Beginnings of commands that are not run, with what stands in the way and what is checked."""
IMAGE_NOT_RUN = {
    "apt-get": "it would change this machine",
    "python -m venv": "the test makes the environment, with the test's own packages below it",
}
"""Steps of the Dockerfile that are not run, and why. FROM, ENV, USER and CMD are no steps."""


def begins(words: list[str], table: dict[str, str]) -> bool:
    """Whether a command is in a table."""
    return shlex.join(words).replace("'", "").startswith(tuple(table))


WALKED = [page for page in PAGES if page == ROOT / "README.md" or INFRA in page.parents]


@pytest.mark.parametrize("page", WALKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_is_run_or_has_a_reason(page: Path) -> None:
    if page.name == "runbook.md":
        pytest.skip("test_runbook.py runs each of its commands")
    left = [words for words in commands(page) if not begins(words, RUN | NOT_RUN)]
    assert not left, "add the command to RUN or NOT_RUN"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_make_reads_every_target(page: Path) -> None:
    for words in commands(page):
        if words[0] == "make":
            subprocess.run(
                ["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True,
                timeout=60,
            )  # fmt: skip


# ---- README.md ----


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder")
def test_the_readmes_use(tmp_path: Path) -> None:
    """The block under "Use", in a namespace where the default ports are free."""
    (block,) = [text for text in blocks(ROOT / "README.md") if "arriero up" in text]
    cache = tmp_path / ".cache" / "arriero"
    cache.mkdir(parents=True)
    (cache / Path(MODEL).name).symlink_to(os.path.abspath(MODEL))
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "arriero").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m arriero.cluster.cli "$@"\n'
    )
    (binaries / "arriero").chmod(0o755)
    environment = os.environ | {
        "HOME": str(tmp_path), "PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "ARRIERO_STATE": str(tmp_path / "state"),
    }  # fmt: skip
    environment.pop("ARRIERO_CACHE", None)
    with contextlib.ExitStack() as stack:
        command = ["bash", "-e", "-x"]
        if not why_not():
            command = stack.enter_context(namespace()).command(*command)
        done = subprocess.run(
            command, input=block, env=environment, cwd=tmp_path, text=True, timeout=800,
            capture_output=True,
        )  # fmt: skip
        if done.returncode:
            arriero("down", folder=tmp_path / "state", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Paris") == 2, "the command line and curl"
    assert "serving at 127.0.0.1:50051 (gRPC) and http://127.0.0.1:8000 (HTTP)" in done.stdout
    assert "console at http://127.0.0.1:8000/console" in done.stdout


# ---- infra/README.md ----


def test_a_key_for_a_client(tmp_path: Path) -> None:
    (words,) = [
        words for words in commands(INFRA / "README.md") if words[:3] == ["arriero", "keys", "add"]
    ]
    (tmp_path / "arriero-secrets").mkdir()
    args = [word.replace("~", str(tmp_path)) for word in words[1:]]
    assert arriero(*args, folder=tmp_path).stdout.startswith("arr-")


@pytest.fixture
def environment_with_dependencies(tmp_path: Path) -> Iterator[Path]:
    """A fresh virtual environment that finds this one's packages, but not this arriero."""
    folder = tmp_path / "opt" / "arriero"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
    (site,) = folder.glob("lib/python*/site-packages")
    # a path alone: pip then takes the packages as installed, and the editable arriero is not found
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(here + "\n")
    yield folder


def check_installed(folder: Path) -> None:
    """The command works, and its package is the one of the new environment."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(
        [str(folder / "bin" / "arriero"), "--help"],
        env=outside, cwd=folder, capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip
    assert "Usage: arriero" in said
    code = (
        "import arriero.cluster.cli as cli, arriero.kernels.cpu as cpu, pathlib;"
        "print(cli.__file__); print(cpu.__file__);"
        "print(*pathlib.Path(cpu.__file__).parents[2].rglob('*.proto'), sep='\\n')"
    )
    files = subprocess.run(
        [str(folder / "bin" / "python"), "-c", code],
        env=outside, cwd=folder, capture_output=True, text=True, check=True, timeout=120,
    ).stdout.split()  # fmt: skip
    assert len(files) > 2 and all(file.startswith(str(folder)) for file in files), files


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_machines_install(environment_with_dependencies: Path, tmp_path: Path) -> None:
    """The steps for a machine, as written, but for those of `NOT_RUN`."""
    (block,) = [text for text in blocks(INFRA / "README.md") if "useradd" in text]
    block = block.replace(" && python3 -m venv /opt/arriero", "")  # it is there
    block = block.replace(" && install -d -o arriero -m 700 /var/lib/arriero", "")
    block = block.replace("REPOSITORY", str(ROOT))
    lines = [line for line in block.splitlines() if not line.startswith(("useradd", "systemctl"))]
    for folder in ("/opt", "/etc", "/var/lib"):
        lines = [re.sub(rf"(?<![\w.]){folder}\b", f"{tmp_path}{folder}", line) for line in lines]
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    done = subprocess.run(
        ["bash", "-e", "-x"], input="\n".join(lines), text=True, timeout=1700, cwd=tmp_path,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_installed(environment_with_dependencies)
    units = {path.name for path in (tmp_path / "etc/systemd/system").iterdir()}
    assert units == {path.name for path in (INFRA / "metal").glob("*.service")}
    for name, settings in (("head.env", {"NODE_IP"}), ("worker.env", {"HEAD", "NODE_IP", "IFACE"})):
        text = (tmp_path / "etc" / "arriero" / name).read_text()
        assert set(re.findall(r"^(\w+)=", text, re.MULTILINE)) == settings
    script = environment_with_dependencies / "infra" / "metal" / "head.sh"
    assert os.access(script, os.X_OK)


# ---- the image ----


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: name and text, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [
        (name, rest) for line in lines if line.strip() for name, _, rest in [line.partition(" ")]
    ]


def context(folder: Path) -> Path:
    """The files that `docker build` would send: the tree without what .dockerignore names."""
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]  # fmt: skip
    assert not [line for line in patterns if line.startswith("!")], "this reader knows no `!`"
    anywhere = tuple(line.removeprefix("**/") for line in patterns if line.startswith("**/"))
    at_root = tuple(line for line in patterns if not line.startswith("**/"))

    def ignored(parent: str, names: list[str]) -> set[str]:
        is_root = Path(parent) == ROOT
        return set(shutil.ignore_patterns(*anywhere, *(at_root if is_root else ()))(parent, names))

    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    return folder


def test_the_image_copies_what_exists(tmp_path: Path) -> None:
    there = context(tmp_path / "context")
    names = {path.name for path in there.iterdir()}
    assert not names & {".git", ".venv", "models", "tests", "docs", "build"}
    secrets = [path for end in ("key", "pem", "token") for path in there.rglob(f"*.{end}")]
    assert not secrets
    stages = {rest.split()[-1] for name, rest in instructions() if name == "FROM"}
    copies = [rest.split() for name, rest in instructions() if name == "COPY"]
    assert len(copies) == 3
    for words in copies:
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        else:
            assert all((there / source).exists() for source in words[:-1]), words
    for room in ("cluster", "router", "shards", "kernels"):
        assert (there / "src" / "arriero" / room / "..").resolve() == there, "a link inside"


def test_the_constraints_fit_what_is_declared() -> None:
    """`infra/constraints.txt` has a version for each dependency, and a fitting one."""
    pinned = {
        line.partition("==")[0].strip().lower().replace("_", "-"): line.partition("==")[2].strip()
        for line in (INFRA / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        need = Requirement(text)
        name = need.name.lower().replace("_", "-")
        assert name in pinned, f"{name} has no version in infra/constraints.txt"
        version = pinned[name].partition(";")[0].strip()
        assert need.specifier.contains(Version(version), prereleases=True), f"{text}: {version}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_image_can_be_built(environment_with_dependencies: Path, tmp_path: Path) -> None:
    """The RUN steps of the build stage, but for those of `IMAGE_NOT_RUN`, in the copied context."""
    there = context(tmp_path / "src")
    steps = []
    for name, rest in instructions():
        if name == "FROM" and rest.endswith(" AS cpu"):
            break
        if name == "RUN" and not rest.startswith(tuple(IMAGE_NOT_RUN)):
            steps.append(rest)
    assert len(steps) == 2 and all(step.startswith("pip install") for step in steps)
    binaries = environment_with_dependencies / "bin"
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "TORCH_INDEX": ""}
    environment.pop("PYTHONPATH", None)
    for step in steps:
        done = subprocess.run(
            ["sh", "-e", "-c", step], env=environment, cwd=there, capture_output=True, text=True,
            timeout=1700,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(there)  # the installed package needs nothing of the context
    check_installed(environment_with_dependencies)

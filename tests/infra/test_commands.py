"""The commands in README.md, CONTRIBUTING.md, docs/ and infra/ can be given as they stand there.

Each `arriero` command parses, each file exists, each `make` target, Kubernetes object and shell
block too; what needs neither a cluster nor a checkpoint is run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from arriero.cluster import cli

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, ROOT, blocks, commands, of

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
PATH = re.compile(r"^(?:infra|tests|docs|cluster|router|shards|kernels)/[\w./-]+$")


@each_page
def test_arriero_commands_parse(page: Path) -> None:
    root: Any = typer.main.get_command(cli.app)
    for words in of(page, "arriero", ".venv/bin/arriero", "/opt/arriero/bin/arriero"):
        command, name, args = root, "arriero", words[1:]
        while True:
            context = command.make_context(name, list(args), resilient_parsing=True)
            if not hasattr(command, "commands"):
                break
            rest = [*context._protected_args, *context.args]
            if not rest or rest[0] not in command.commands:
                assert not rest or rest[0] == "COMMAND", f"no such command: {shlex.join(words)}"
                break
            name, args = rest[0], rest[1:]
            command = command.commands[name]
        unknown = [arg for arg in context.args if arg.startswith("--") and arg != "--help"]
        assert not unknown, f"no such option: {shlex.join(words)}"
        assert hasattr(command, "commands") or not context.args, (
            f"too many arguments: {shlex.join(words)}"
        )


@each_page
def test_files_exist(page: Path) -> None:
    missing = [
        shlex.join(words)
        for words in commands(page)
        for word in words
        if PATH.match(word) and not (ROOT / word).exists()
    ]
    assert not missing


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in of(page, "make"):
        named = {word for word in words[1:] if "=" not in word}
        assert named <= targets, f"{shlex.join(words)}: {named - targets}"


@each_page
def test_kubernetes_objects_exist(page: Path) -> None:
    kinds = {"deploy": "Deployment", "svc": "Service", "raycluster": "RayCluster"}
    known = {
        (manifest["kind"], manifest["metadata"]["name"])
        for file in (ROOT / "infra/kubernetes/base").glob("*.yaml")
        for manifest in yaml.safe_load_all(file.read_text())
        if "metadata" in manifest
    }
    for words in commands(page):
        if words[0] != "kubectl":
            continue
        text = " ".join(words)
        named = re.findall(r"\b(deploy|svc|raycluster)[/ ]([a-z][\w-]*)", text)
        assert {(kinds[kind], name) for kind, name in named} <= known, text
        for folder in re.findall(r"-k (infra/\S+)", text):
            assert (ROOT / folder / "kustomization.yaml").exists(), text
        for namespace in re.findall(r"-n (\S+)", text):
            assert ("Namespace", namespace) in known, text


@each_page
def test_shell_blocks_are_shell(page: Path) -> None:
    for text in blocks(page):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_the_certificates_of_the_readme_can_be_made(tmp_path: Path) -> None:
    (block,) = [text for text in blocks(ROOT / "infra/README.md") if "make-certs.sh" in text]
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    subprocess.run(["bash", "-e"], input=block, text=True, cwd=tmp_path, check=True,
                   capture_output=True)  # fmt: skip
    made = {path.name for path in (tmp_path / "certs").iterdir()}
    assert {"ca.pem", "gateway.pem", "link.pem", "admin.pem"} <= made


def plans() -> Iterator[str]:
    """Every `arriero plan` of the documents that names a model and no spec."""
    for page in PAGES:
        for words in of(page, "arriero"):
            if words[1:2] == ["plan"] and "--model" in words and "NAME" not in words:
                yield shlex.join(words[1:])


@pytest.mark.parametrize("line", sorted(set(plans())))
def test_plans_give_an_answer(line: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "arriero.cluster.cli", *shlex.split(line)],
        env=os.environ | {"ARRIERO_STATE": str(tmp_path)},
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

"""The documents say what the tree holds: paths, named functions, links and commands exist.

Fast: reads text and the syntax of Python files; imports none of the product but the command line.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("cluster", "router", "shards", "kernels", "infra", "tests", "docs")
PATH = re.compile(rf"(?:{'|'.join(ROOMS)})/[\w./-]*")
"""A path of the tree, when it is the whole of a text in backticks."""
FILE_AND_NAMES = re.compile(r"`([\w./-]+\.py)`((?:,?\s+`[A-Za-z_]\w*(?:\.\w+)*`)+)")
"""In `docs/architecture.md`: a file, then names that the file defines."""
METHOD = re.compile(r"`([A-Z]\w*\.\w+)`")
"""In `docs/architecture.md`: a method without a file, which some file defines."""


def files(pattern: str) -> list[str]:
    """Files of the tree, by their path from its root."""
    below = (file for room in ROOMS for file in (ROOT / room).rglob(pattern))
    return sorted(str(file.relative_to(ROOT)) for file in (*ROOT.glob(pattern), *below))


DOCUMENTS = files("*.md")


def prose(name: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)


@functools.cache
def definitions(file: Path) -> frozenset[str]:
    """Functions, classes and constants of a file; methods and attributes as `Class.name`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        names |= defined(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for part in node.body for name in defined(part)}
    return frozenset(names)


def defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_in_backticks_exist(name: str) -> None:
    folder = (ROOT / name).parent
    missing = [
        path
        for path in re.findall(r"`([^`\n]+)`", prose(name))
        if PATH.fullmatch(path) and not (ROOT / path).exists() and not (folder / path).exists()
    ]
    assert not missing, "name the file by its path from the root of the tree"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    folder = (ROOT / name).parent
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = folder / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


def anchors(file: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_walks_name_what_exists() -> None:
    steps = FILE_AND_NAMES.findall(prose("docs/architecture.md"))
    assert len(steps) > 40, "the walks name a file and its functions in each step"
    missing = [
        f"{path}: {name}"
        for path, names in steps
        for name in re.findall(r"`([^`]+)`", names)
        if name not in definitions(ROOT / path)
    ]
    known = frozenset(
        name
        for path in files("*.py")
        if path.startswith(("cluster/", "router/", "shards/", "kernels/"))
        for name in definitions(ROOT / path)
    )
    missing += [name for name in METHOD.findall(prose("docs/architecture.md")) if name not in known]
    assert not missing, "a renamed function is renamed in docs/architecture.md as well"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_each_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = [name for name in DOCUMENTS if name.startswith("docs/")]
    assert pages
    assert not [page for page in pages if f"]({page})" not in readme]

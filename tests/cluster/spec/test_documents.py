"""`docs/spec.md` has a row for each field of `arriero.yaml`, with the field's default."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.fields import SpecSection

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "spec.md").read_text()
LISTS = {"models", "gateway.tenants"}


def sections(annotation: Any) -> Iterator[type[SpecSection]]:  # noqa: ANN401
    """The sections that a field of this type holds."""
    if isinstance(annotation, type) and issubclass(annotation, SpecSection):
        yield annotation
    for part in typing.get_args(annotation):
        yield from sections(part)


def fields(section: type[SpecSection], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each field of a section and of the sections below, by the name that the page gives it."""
    for name, field in section.model_fields.items():
        path = prefix + name
        inner = list(sections(field.annotation))
        if not inner:
            yield path, field
        for part in inner:
            yield from fields(part, f"{path}[]." if path in LISTS else f"{path}.")


FIELDS = dict(fields(DeploymentSpec))


def row(path: str) -> list[str]:
    """Type, default, unit and meaning of a field, as the page has them."""
    found = re.search(rf"^\| `{re.escape(path)}` \|(.*)\|$", PAGE, flags=re.MULTILINE)
    assert found is not None, f"docs/spec.md lacks a row for `{path}`"
    return [cell.strip() for cell in found[1].split(" | ")]


@pytest.mark.parametrize("path", FIELDS)
def test_the_page_has_the_field_and_its_default(path: str) -> None:
    _type, default, *_ = row(path)
    field = FIELDS[path]
    if field.is_required():
        assert default == "required"
        return
    value = field.get_default(call_default_factory=True)
    written = {None: "null", True: "true", False: "false", (): "[]"}
    if value == {}:
        assert default == "{}"
    elif path.endswith("object_store"):
        assert default == f"{value // 10**6}MB"
    else:
        expected = (
            written.get(value, value)
            if not isinstance(value, float | int) or isinstance(value, bool)
            else f"{value:g}"
        )
        assert default == str(expected)


def test_the_page_has_no_other_field() -> None:
    rows = re.findall(r"^\| `([\w.\[\]]+)` \|", PAGE, flags=re.MULTILINE)
    sections_named = {path.rpartition(".")[0] for path in FIELDS}
    assert not [path for path in rows if path not in FIELDS and path not in sections_named]


def examples() -> Iterator[tuple[str, str]]:
    """Each YAML example of the documents, by its page."""
    for page in sorted(DOCS.glob("*.md")):
        for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield page.name, text


@pytest.mark.parametrize(("page", "text"), list(examples()))
def test_the_examples_are_specs(page: str, text: str) -> None:
    data = yaml.safe_load(text)
    data.setdefault("models", [{"name": "demo", "path": "demo"}])  # examples of one section
    DeploymentSpec.model_validate(data)

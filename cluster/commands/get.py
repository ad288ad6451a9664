"""`arriero get`: the spec, the groups and the nodes as YAML or JSON, for programs and for files.

Knows Admin's messages; knows nothing of tables for people (`views`).
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

import typer
import yaml

from arriero.cluster.commands.operations import AsJson, admin, plain
from arriero.cluster.commands.options import StateDir


class What(StrEnum):
    """What `get` gives."""

    SPEC = "spec"
    MODELS = "models"
    GROUPS = "groups"
    GATEWAYS = "gateways"
    NODES = "nodes"


class Form(StrEnum):
    """Form of the output."""

    YAML = "yaml"
    JSON = "json"


def add_to(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("get")(get)


def get(
    what: Annotated[What, typer.Argument(help="What to get.")],
    form: Annotated[Form, typer.Option("--output", "-o", help="Form of the output.")] = Form.YAML,
    as_json: AsJson = False,
    state_dir: StateDir = None,
) -> None:
    """Print the spec that holds now, or models, groups, gateways or nodes, as YAML or JSON.

    `arriero get spec` prints a spec that `arriero rollout` takes.
    """
    with admin(state_dir) as client:
        if what is What.SPEC:
            data: Any = json.loads(client.spec())
        else:
            data = plain(client.status())[what.value]
    if as_json or form is Form.JSON:
        print(json.dumps(data))
    else:
        print(yaml.safe_dump(data, sort_keys=False), end="")

"""Reads `arriero.yaml`, and applies the flags of the command line on top.

Knows files, lines and flags, so that an error names the place; knows nothing of the meaning of
fields (`deployment`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from arriero.cluster.spec.deployment import AdminTlsSpec, DeploymentSpec
from arriero.cluster.spec.fields import SpecSection
from arriero.cluster.spec.gateway import GatewaySpec, TlsSpec
from arriero.cluster.spec.model import ModelSpec
from arriero.cluster.spec.safety import PromptGuardSpec
from arriero.cluster.spec.speculation import SpeculationSpec
from arriero.cluster.spec.yaml_text import Lines, parse
from arriero.router.tenants.keys import read_keys
from arriero.router.tls import TlsFiles
from arriero.shards.checkpoint.remote import is_url
from arriero.shards.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SECTIONS = {
    "host": ("gateway", "host"),
    "port": ("gateway", "port"),
    "http_host": ("gateway", "http", "host"),
    "http_port": ("gateway", "http", "port"),
    "cors": ("gateway", "http", "cors"),
    "address": ("ray", "address"),
    "start_timeout_s": ("health", "start_timeout_s"),
}
_FLAG_FIELDS = {
    "tp": ("mesh", "tp"),
    "pp": ("mesh", "pp"),
    "dp": ("mesh", "dp"),
    "kv_memory": ("kv", "memory"),
    "max_model_len": ("limits", "max_model_len"),
    "sliding_window": ("attention", "sliding_window"),
    "attention_sinks": ("attention", "attention_sinks"),
    "changes_answers": ("attention", "changes_answers"),
}


def load(path: Path | None, flags: Mapping[str, Any]) -> DeploymentSpec:
    """The spec in the file `path`, with the flags of the command line on top.

    Args:
        path: a YAML file; None for flags only (`model` is then required).
        flags: the flags that the user gave. `model` (a folder), `name`, `dtype`, `quantization`,
            `groups`, `device`, `threads`, `tp`, `pp`, `dp`, `kv_memory`, `max_model_len`,
            `sliding_window`, `attention_sinks` and `changes_answers` set fields of the model;
            `host` and `port` of the gateway; `http_host`, `http_port` and `cors` of the gateway's
            HTTP; `address` of ray; `start_timeout_s` of health.

    Raises:
        SpecError: the file cannot be read, or a field is unknown or wrong; the text names file,
            line and field.
        CheckpointError: the folder of a model is no checkpoint.
    """
    data: dict[str, Any] = {}
    lines: Lines = {}
    if path is not None:
        data, lines = _read(path)
    data = _with_flags(data, flags)
    source = str(path) if path is not None else "command line"
    try:
        spec = DeploymentSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError(explain(error, source, lines)) from None
    base = path.parent if path is not None else Path.cwd()
    models = tuple(
        model.model_copy(
            update={
                "path": _model_folder(model, base, source),
                **_absolute_drafter(model, base),
                "adapters": tuple(
                    adapter.model_copy(update={"path": _absolute(base, adapter.path)})
                    for adapter in model.adapters
                ),
                "adapter_root": None
                if model.adapter_root is None
                else _absolute(base, model.adapter_root),
            }
        )
        for model in spec.models
    )
    gateway = spec.gateway.model_copy(
        update={
            "tls": _tls_files("gateway.tls", spec.gateway.tls, base, source),
            "keys": _key_file(spec.gateway, base, source),
            "prompt_guard": _prompt_guard(spec.gateway, base, source),
        }
    )
    link_tls = _tls_files("link_tls", spec.link_tls, base, source)
    admin = spec.admin.model_copy(update={"tls": _admin_files(spec.admin.tls, base, source)})
    sections = {"models": models, "gateway": gateway, "link_tls": link_tls, "admin": admin}
    return spec.model_copy(update=sections)


def _tls_files(field: str, tls: TlsSpec | None, base: Path, source: str) -> TlsSpec | None:
    """The files with absolute paths, after a check that key and certificate match."""
    if tls is None:
        return None
    absolute = TlsSpec(
        certificate=_absolute(base, tls.certificate),
        key=_absolute(base, tls.key),
        ca=None if tls.ca is None else _absolute(base, tls.ca),
    )
    _check(absolute.files(), field, source)
    return absolute


def _admin_files(tls: AdminTlsSpec | None, base: Path, source: str) -> AdminTlsSpec | None:
    if tls is None:
        return None
    paths = {name: _absolute(base, getattr(tls, name)) for name in ("certificate", "key", "ca")}
    _check(TlsFiles(**paths), "admin.tls", source)
    return tls.model_copy(update=paths)


def _check(files: TlsFiles, field: str, source: str) -> None:
    try:
        files.check(field)
    except SpecError as error:
        raise SpecError(f"{source}: {error}") from None


def _key_file(gateway: GatewaySpec, base: Path, source: str) -> Path | None:
    if gateway.keys is None:
        return None
    path = _absolute(base, gateway.keys)
    try:
        read_keys(path)
    except SpecError as error:
        raise SpecError(f"{source}: `gateway.keys`: {error}") from None
    return path


def _prompt_guard(gateway: GatewaySpec, base: Path, source: str) -> PromptGuardSpec | None:
    if gateway.prompt_guard is None:
        return None
    path = _absolute(base, gateway.prompt_guard.path)
    if not (path / "config.json").is_file():
        raise SpecError(
            f"{source}: `gateway.prompt_guard.path`: {path} has no config.json; give the folder of"
            " a Prompt Guard 2"
        )
    return gateway.prompt_guard.model_copy(update={"path": path})


def _absolute(base: Path, path: Path) -> Path:
    return Path(os.path.abspath(base / path.expanduser()))


def _absolute_drafter(model: ModelSpec, base: Path) -> dict[str, SpeculationSpec]:
    """The changed section `speculation`, by its name; empty where no folder drafts."""
    speculation = model.speculation
    if speculation.model is None or is_url(speculation.model):
        return {}
    folder = str(_absolute(base, Path(speculation.model)))
    return {"speculation": speculation.model_copy(update={"model": folder})}


def _model_folder(model: ModelSpec, base: Path, source: str) -> str:
    if is_url(model.path):
        return model.path  # the nodes open the URL; this machine may have no access
    folder = _absolute(base, Path(model.path))
    if not (folder / "config.json").is_file():
        error = CheckpointError if folder.is_dir() else SpecError
        raise error(
            f"{source}: model `{model.name}`: {folder} has no config.json; give the folder of a"
            " checkpoint (`arriero models import` makes such a folder from a GGUF file)"
        )
    return str(folder)


def _read(path: Path) -> tuple[dict[str, Any], Lines]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SpecError(f"{path}: cannot be read: {reason}; give the path of a spec") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text: {error}; give the path of a spec") from None
    return parse(text, str(path))


def _with_flags(data: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    model_flags = {}
    for flag, value in flags.items():
        if flag in _SECTIONS:
            *path, field = _SECTIONS[flag]
            section: Any = data
            for name in path:  # the check of the whole spec refuses a section of a wrong type
                if isinstance(section, dict):
                    section = section.setdefault(name, {})
            if isinstance(section, dict):
                section[field] = value
        else:
            model_flags[flag] = value
    if not model_flags:
        return data
    models = data.setdefault("models", [{}] if "model" in model_flags else [])
    if not isinstance(models, list) or len(models) != 1 or not isinstance(models[0], dict):
        names = ", ".join(f"--{flag.replace('_', '-')}" for flag in model_flags)
        count = len(models) if isinstance(models, Sequence) else 0
        raise SpecError(
            f"{names}: flags for a model need a deployment with one model, and the spec has"
            f" {count}; set the fields in the spec, or give --model PATH without a spec"
        )
    for flag, value in model_flags.items():
        if flag == "model":
            models[0]["path"] = str(value)
            models[0].setdefault("name", Path(os.path.abspath(value)).name)
        elif flag in _FLAG_FIELDS:
            section, field = _FLAG_FIELDS[flag]
            fields = models[0].setdefault(section, {})
            if isinstance(fields, dict):
                fields[field] = value
        else:
            models[0][flag] = value
    return data


def explain(error: ValidationError, source: str, lines: Mapping[tuple[int | str, ...], int]) -> str:
    """The errors of a spec as text: file, line, field and reason of each.

    Args:
        error: error of pydantic.
        source: name of the file, or "command line".
        lines: line number of each field, by path in the file, as far as known.
    """
    texts = []
    details = error.errors(include_url=False)
    for detail in details:
        loc = tuple(detail["loc"])
        if detail["type"] == "too_short" and any(
            len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in details
        ):
            continue  # pydantic counts only the entries without an error
        field = ""
        for step in loc:
            field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else str(step)
        nearest = loc
        while nearest and nearest not in lines:
            nearest = nearest[:-1]
        place = f"{source}:{lines[nearest]}" if nearest else source
        value = detail.get("input")
        shown = f"={value!r}" if isinstance(value, str | int | float | bool) else ""
        reason = _reason(detail)
        if detail["type"] in ("extra_forbidden", "missing"):
            shown = ""
        texts.append(f"{place}: `{field or 'spec'}`{shown}: {reason}")
    return "; ".join(texts)


def _reason(detail: ErrorDetails) -> str:
    """What is wrong with a field, with the limit and a remedy."""
    kind = detail["type"]
    if kind == "extra_forbidden":
        name, known = str(detail["loc"][-1]), _fields_of(detail["loc"][:-1])
        similar = difflib.get_close_matches(name, known, n=1)
        return (
            f"no such field; did you mean `{similar[0]}`?"
            if similar
            else (f"no such field; there are {', '.join(known)}" if known else "no such field")
        )
    if kind == "missing":
        return "is needed; add the field"
    return detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _fields_of(path: Sequence[int | str]) -> list[str]:
    """Names of the fields of the section at a path of the spec; empty for another path."""
    section: Any = DeploymentSpec
    for step in path:
        if isinstance(step, int):
            continue
        if section is None or step not in section.model_fields:
            return []
        section = _section_in(section.model_fields[step].annotation)
    return [] if section is None else list(section.model_fields)


def _section_in(annotation: Any) -> Any:  # noqa: ANN401
    """The class of a section in the type of a field; None without."""
    if isinstance(annotation, type) and issubclass(annotation, SpecSection):
        return annotation
    inner = (_section_in(argument) for argument in get_args(annotation))
    return next((section for section in inner if section is not None), None)

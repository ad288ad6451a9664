"""`arriero.yaml` read from disk, with the command line's flags laid over it.

Knows files, lines and flags, so that an error names the place; what fields mean, the spec knows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from arriero.cluster.spec.deployment import AdminTlsSpec, DeploymentSpec
from arriero.cluster.spec.gateway import GatewaySpec, TlsSpec
from arriero.cluster.spec.model import ModelSpec
from arriero.router.tenants.keys import read_keys
from arriero.router.tls import TlsFiles
from arriero.shards.checkpoint.remote import is_url
from arriero.shards.errors import CheckpointError, SpecError

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
    """The spec in the file `path`, with the command line's flags laid over it.

    Args:
        path: a YAML file; None for flags alone (then `model` is needed).
        flags: the flags given, without those left out: `model` (a folder), `name`, `dtype`,
            `quantization`, `groups`, `device`, `threads`, `tp`, `pp`, `kv_memory`,
            `max_model_len`, `sliding_window`, `attention_sinks` and `changes_answers` go to the
            model; `host` and `port` to the gateway, `http_host`,
            `http_port` and `cors` to its HTTP; `address` to ray; `start_timeout_s` to health.

    Raises:
        SpecError: the file cannot be read, or a field is unknown or wrong: file, line, field.
        CheckpointError: a model's folder is none.
    """
    data: dict[str, Any] = {}
    lines: dict[tuple[int | str, ...], int] = {}
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
        m.model_copy(update={"path": _model_folder(m, base, source)}) for m in spec.models
    )
    gateway = spec.gateway.model_copy(
        update={
            "tls": _tls_files("gateway.tls", spec.gateway.tls, base, source),
            "keys": _key_file(spec.gateway, base, source),
        }
    )
    link_tls = _tls_files("link_tls", spec.link_tls, base, source)
    admin = spec.admin.model_copy(update={"tls": _admin_files(spec.admin.tls, base, source)})
    parts = {"models": models, "gateway": gateway, "link_tls": link_tls, "admin": admin}
    return spec.model_copy(update=parts)


def _tls_files(field: str, tls: TlsSpec | None, base: Path, source: str) -> TlsSpec | None:
    """The files by their absolute paths, once they have proved to be a certificate and its key."""
    if tls is None:
        return None
    found = TlsSpec(
        certificate=_absolute(base, tls.certificate),
        key=_absolute(base, tls.key),
        ca=None if tls.ca is None else _absolute(base, tls.ca),
    )
    _check(found.files(), field, source)
    return found


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


def _absolute(base: Path, path: Path) -> Path:
    return Path(os.path.abspath(base / path.expanduser()))


def _model_folder(model: ModelSpec, base: Path, source: str) -> str:
    if is_url(model.path):
        return model.path  # looked at where it is needed, which may not be here
    folder = _absolute(base, Path(model.path))
    if not (folder / "config.json").is_file():
        wrong = CheckpointError if folder.is_dir() else SpecError
        raise wrong(
            f"{source}: model `{model.name}`: {folder} holds no config.json; give the folder of a"
            " checkpoint (`arriero models import` makes one from a GGUF file)"
        )
    return str(folder)


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[int | str, ...], int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path}: a spec is a mapping with `models:`, not {type(data).__name__}")
    lines: dict[tuple[int | str, ...], int] = {}
    _note_lines(root, (), lines)
    return data, lines


def _note_lines(
    node: yaml.Node | None, at: tuple[int | str, ...], lines: dict[tuple[int | str, ...], int]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*at, key.value)] = key.start_mark.line + 1
            _note_lines(value, (*at, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _note_lines(value, (*at, index), lines)


def _with_flags(data: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    model_flags = {}
    for flag, value in flags.items():
        if flag in _SECTIONS:
            *path, field = _SECTIONS[flag]
            section: Any = data
            for name in path:  # a section of another kind is refused when the whole is checked
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
        named = ", ".join(f"--{flag.replace('_', '-')}" for flag in model_flags)
        have = len(models) if isinstance(models, Sequence) else 0
        raise SpecError(
            f"{named}: such flags change the one model of a deployment, and this one has {have};"
            " say it in the spec, or give --model PATH without a spec"
        )
    for flag, value in model_flags.items():
        if flag == "model":
            models[0]["path"] = value
            models[0].setdefault("name", Path(os.path.abspath(value)).name)
        elif flag in _FLAG_FIELDS:
            section, field = _FLAG_FIELDS[flag]
            part = models[0].setdefault(section, {})
            if isinstance(part, dict):
                part[field] = value
        else:
            models[0][flag] = value
    return data


def explain(error: ValidationError, source: str, lines: Mapping[tuple[int | str, ...], int]) -> str:
    """What is wrong with a spec: file, line, field, reason.

    Args:
        error: pydantic's.
        source: what the spec was read from.
        lines: line of each field, by its path, as far as known.
    """
    parts = []
    for one in error.errors(include_url=False):
        loc = tuple(one["loc"])
        field = ""
        for step in loc:
            field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else str(step)
        at = loc
        while at and at not in lines:
            at = at[:-1]
        where = f"{source}:{lines[at]}" if at else source
        value = one.get("input")
        given = f"={value!r}" if isinstance(value, str | int | float | bool) else ""
        reason = one["msg"].removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            reason, given = "no such field", ""
        elif one["type"] == "missing":
            reason, given = "is needed", ""
        parts.append(f"{where}: `{field or 'spec'}`{given}: {reason}")
    return "; ".join(parts)

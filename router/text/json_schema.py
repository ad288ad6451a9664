"""Rewrites JSON Schemas of clients' libraries as schemas that a mask can enforce.

Keywords with an equivalent are rewritten (`nullable`, a boolean `exclusiveMinimum`, `propertyNames`
of an enum), annotations stay, and keywords that no mask can enforce are removed and listed for the
caller. Knows JSON Schema (drafts 4 to 2020-12, OpenAPI's keywords) and the subset of llguidance;
knows nothing of requests. The caller limits the depth of a schema.

Source: json-schema.org; github.com/guidance-ai/llguidance, docs/json_schema.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Schema = dict[str, Any]

FORMATS = frozenset(
    {
        *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"),
        *("uri", "unknown"),
    }
)
"""Formats of strings that a mask can enforce."""
_UNENFORCEABLE = (
    *("not", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "if", "then", "else"),
    *("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
)
"""Keywords that no mask can enforce, unless `_rewrite_equivalents` has replaced them."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_ALIASES = {
    "str": "string",
    "text": "string",
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "dict": "object",
    "map": "object",
    "list": "array",
    "tuple": "array",
    "none": "null",
}
"""Names of types from other languages."""
_DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/20(19-09|20-12))/schema#?")
MAX_POINTERS = 8
"""Largest number of references in a chain, for names of properties."""
_APPLICATORS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties"})


class Relaxed:
    """A schema that a mask can enforce, made from the schema of a client.

    Args:
        schema: schema of the client; stays unchanged.
        can_enforce: tells from a regular expression and its place whether a mask can enforce the
            expression; raises an error for a text that is no regular expression.

    Attributes:
        schema: the rewritten schema.
        not_enforced: the removed keywords, each with its place as a JSON pointer.
    """

    def __init__(self, schema: Schema, can_enforce: Callable[[str, str], bool]) -> None:
        self._can_enforce = can_enforce
        self._root = schema
        self.not_enforced: list[str] = []
        self.schema: Schema = self._relaxed(schema, "#")

    def _note_removal(self, keyword: str, at: str) -> None:
        self.not_enforced.append(f"{keyword} at {at}")

    def _relaxed(self, given: Any, at: str) -> Any:  # noqa: ANN401
        """A schema with its inner schemas, rewritten."""
        if not isinstance(given, dict):
            return given  # true and false are schemas; the compiler refuses any other value
        schema = {
            keyword: value
            for keyword, value in given.items()
            if value is not None or keyword in ("const", "default", "example")
        }
        self._rewrite_equivalents(schema)
        for keyword in _UNENFORCEABLE:
            if keyword in schema:
                schema.pop(keyword)
                self._note_removal(keyword, at)
        self._relax_strings(schema, at)
        self._relax_property_counts(schema, at)
        for keyword in _MAPS:
            if isinstance(schema.get(keyword), dict):
                schema[keyword] = {
                    name: self._relaxed(inner, f"{at}/{keyword}/{_escaped(name)}")
                    for name, inner in schema[keyword].items()
                }
        for keyword in (*_LISTS, "items"):
            if isinstance(schema.get(keyword), list):
                schema[keyword] = [
                    self._relaxed(inner, f"{at}/{keyword}/{number}")
                    for number, inner in enumerate(schema[keyword])
                ]
        for keyword in _SINGLE:
            if isinstance(schema.get(keyword), dict):
                schema[keyword] = self._relaxed(schema[keyword], f"{at}/{keyword}")
        return _or_null(schema, at)

    def _rewrite_equivalents(self, schema: Schema) -> None:
        """Replace keywords by others with the same meaning."""
        _whole_lengths(schema)
        _numeric_bounds(schema)
        _plain_types(schema)
        if not _DRAFTS.fullmatch(str(schema.get("$schema", ""))):
            schema.pop("$schema", None)  # an unknown dialect; its keywords count alone
        if schema.get("uniqueItems") is False or schema.get("maxItems") in (0, 1):
            schema.pop("uniqueItems", None)
        if schema.get("$recursiveRef") == "#":
            schema["$ref"] = schema.pop("$recursiveRef")
        if not _APPLICATORS & schema.keys():
            for keyword, plain in (
                ("unevaluatedProperties", "additionalProperties"),
                ("unevaluatedItems", "items"),
            ):
                if keyword in schema and plain not in schema:
                    schema[plain] = schema[keyword]
                if keyword in schema and plain in schema:
                    schema.pop(keyword)
        if "if" in schema and not {"then", "else"} & schema.keys():
            schema.pop("if")
        self._rewrite_property_names(schema)

    def _rewrite_property_names(self, schema: Schema) -> None:
        """Replace `propertyNames` with a list or a pattern by properties of these names."""
        names = schema.get("propertyNames")
        for _ in range(MAX_POINTERS):
            if isinstance(names, dict) and isinstance(names.get("$ref"), str):
                names = _resolve(self._root, names["$ref"])
        if names is True or (isinstance(names, dict) and names.keys() <= _TRUE_OF_NAMES):
            schema.pop("propertyNames")
            return
        if not isinstance(names, dict) or {"properties", "patternProperties"} & schema.keys():
            return
        values = schema.get("additionalProperties", True)
        keywords = names.keys() - _TRUE_OF_NAMES
        listed = [names["const"]] if keywords == {"const"} else names.get("enum")
        if keywords <= {"enum", "const"} and isinstance(listed, list):
            schema["properties"] = {name: values for name in listed if isinstance(name, str)}
        elif keywords == {"pattern"} and isinstance(names["pattern"], str):
            schema["patternProperties"] = {names["pattern"]: values}
        else:
            return
        schema["additionalProperties"] = False
        schema.pop("propertyNames")

    def _relax_strings(self, schema: Schema, at: str) -> None:
        """Remove patterns and formats that no mask can enforce."""
        pattern = schema.get("pattern")
        if isinstance(pattern, str) and not self._can_enforce(pattern, at):
            schema.pop("pattern")
            self._note_removal("pattern", at)
        form = schema.get("format")
        if isinstance(form, str) and form not in FORMATS:
            schema.pop("format")
            if _may_be_string(schema):  # the format of a number is only a storage type
                self._note_removal(f"format {form[:64]}", at)
        patterns = schema.get("patternProperties")
        if isinstance(patterns, dict):
            enforced = {p: inner for p, inner in patterns.items() if self._can_enforce(p, at)}
            if len(enforced) < len(patterns):
                self._note_removal("patternProperties", at)
                schema["patternProperties"] = enforced

    def _relax_property_counts(self, schema: Schema, at: str) -> None:
        """Remove counts of properties; with optional properties no mask can enforce a count."""
        properties = schema.get("properties")
        required = schema.get("required")
        listed = required if isinstance(required, list) else []
        needed = {name for name in listed if isinstance(name, str)}
        if schema.get("minProperties", 0) in range(len(needed) + 1):
            schema.pop("minProperties", None)
        if not isinstance(properties, dict) or properties.keys() <= needed:
            return
        closed = schema.get("additionalProperties") is False and "patternProperties" not in schema
        most = schema.get("maxProperties")
        if closed and isinstance(most, int) and most >= len(properties.keys() | needed):
            schema.pop("maxProperties")
        for keyword in ("minProperties", "maxProperties"):
            if keyword in schema:
                schema.pop(keyword)
                self._note_removal(keyword, at)


_TRUE_OF_NAMES = frozenset({"type", "title", "description", "$schema"})
"""Keywords of `propertyNames` that each name fits."""


def _whole_lengths(schema: Schema) -> None:
    for keyword in _LENGTHS:
        value = schema.get(keyword)
        if isinstance(value, float) and value.is_integer():
            schema[keyword] = int(value)


def _numeric_bounds(schema: Schema) -> None:
    """Replace boolean exclusive bounds (draft 4, OpenAPI 3.0) by numeric bounds."""
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        value = schema.get(exclusive)
        if isinstance(value, bool):
            schema.pop(exclusive)
            if value and bound in schema:
                schema[exclusive] = schema.pop(bound)


def _plain_types(schema: Schema) -> None:
    kinds = schema.get("type")
    if isinstance(kinds, str):
        lowered = kinds.lower()
        if lowered == "any":
            schema.pop("type")
        elif kinds not in _TYPES:
            schema["type"] = _ALIASES.get(lowered, lowered if lowered in _TYPES else kinds)
    if not isinstance(schema.get("required", []), list):
        schema.pop("required")  # in draft 3 `required` concerns the property, not the object


def _may_be_string(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type", "string")
    return kinds == "string" or (isinstance(kinds, list) and "string" in kinds)


def _or_null(schema: Schema, at: str) -> Schema:
    """The schema with `nullable` (OpenAPI 3.0) written as a type of null."""
    if schema.pop("nullable", False) is not True:
        return schema
    kinds = schema.get("type")
    if isinstance(kinds, str | list) and not {"const", *_LISTS, "$ref"} & schema.keys():
        listed = [kinds] if isinstance(kinds, str) else kinds
        schema["type"] = [*listed, *(["null"] if "null" not in listed else [])]
        if isinstance(schema.get("enum"), list) and None not in schema["enum"]:
            schema["enum"] = [*schema["enum"], None]
        return schema
    if at == "#" or not {"const", "enum", *_LISTS, "$ref"} & schema.keys():
        return schema  # null is allowed already, or a wrapper would break references by place
    return {"anyOf": [schema, {"type": "null"}]}


def _resolve(root: Any, pointer: str) -> Any:  # noqa: ANN401
    """The target of a local reference; None without a target."""
    if not pointer.startswith("#/"):
        return None
    target = root
    for part in pointer[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        target = target.get(name) if isinstance(target, dict) else None
    return target


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")

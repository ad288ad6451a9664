"""JSON Schemas as libraries write them, to ones that a mask can hold.

Words that mean the same as others are written in those (`nullable`, a boolean `exclusiveMinimum`,
`propertyNames` of an enum), annotations are left alone, and what no mask can hold is taken out and
named, so that the caller can be told. Knows JSON Schema (drafts 4 to 2020-12, OpenAPI's words) and
what llguidance takes; knows nothing of requests. The schema must not be nested too deep.

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
"""Formats of strings that a mask can hold."""
_NEVER = (
    *("not", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "if", "then", "else"),
    *("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
)
"""Words that no mask holds, unless `_equivalent` could write them in others."""
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
"""Names of types that some languages' tools write."""
_DRAFTS = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/20(19-09|20-12))/schema#?")
MAX_POINTERS = 8
"""References followed from one to the next, for names of properties."""
_APPLICATORS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties"})


class Relaxed:
    """A schema that a mask can hold, and what it lacks of the one that was given.

    Args:
        schema: as the client wrote it; it stays as it is.
        holds: whether a mask can hold a regular expression; raises for one that is none.

    Attributes:
        schema: what is left.
        not_enforced: what was taken out, each with its place as a JSON pointer.
    """

    def __init__(self, schema: Schema, holds: Callable[[str, str], bool]) -> None:
        self._holds = holds
        self._root = schema
        self.not_enforced: list[str] = []
        self.schema: Schema = self._relaxed(schema, "#")

    def _drop(self, word: str, at: str) -> None:
        self.not_enforced.append(f"{word} at {at}")

    def _relaxed(self, given: Any, at: str) -> Any:  # noqa: ANN401
        """One schema and those in it."""
        if not isinstance(given, dict):
            return given  # true and false are schemas; anything else is refused by the compiler
        schema = {
            word: value
            for word, value in given.items()
            if value is not None or word in ("const", "default", "example")
        }
        self._equivalent(schema, at)
        for word in _NEVER:
            if word in schema:
                schema.pop(word)
                self._drop(word, at)
        self._string_words(schema, at)
        self._property_counts(schema, at)
        for word in _MAPS:
            if isinstance(schema.get(word), dict):
                schema[word] = {
                    name: self._relaxed(inner, f"{at}/{word}/{_escaped(name)}")
                    for name, inner in schema[word].items()
                }
        for word in (*_LISTS, "items"):
            if isinstance(schema.get(word), list):
                schema[word] = [
                    self._relaxed(inner, f"{at}/{word}/{number}")
                    for number, inner in enumerate(schema[word])
                ]
        for word in _SINGLE:
            if isinstance(schema.get(word), dict):
                schema[word] = self._relaxed(schema[word], f"{at}/{word}")
        return _or_null(schema, at)

    def _equivalent(self, schema: Schema, at: str) -> None:
        """Write words in others that mean the same."""
        _whole_lengths(schema)
        _one_kind_of_bound(schema)
        _plain_types(schema)
        if not _DRAFTS.fullmatch(str(schema.get("$schema", ""))):
            schema.pop("$schema", None)  # of a dialect that says no more than its words do
        if schema.get("uniqueItems") is False or schema.get("maxItems") in (0, 1):
            schema.pop("uniqueItems", None)
        if schema.get("$recursiveRef") == "#":
            schema["$ref"] = schema.pop("$recursiveRef")
        if not _APPLICATORS & schema.keys():
            for word, plain in (
                ("unevaluatedProperties", "additionalProperties"),
                ("unevaluatedItems", "items"),
            ):
                if word in schema and plain not in schema:
                    schema[plain] = schema[word]
                if word in schema and plain in schema:
                    schema.pop(word)
        if "if" in schema and not {"then", "else"} & schema.keys():
            schema.pop("if")
        self._property_names(schema)

    def _property_names(self, schema: Schema) -> None:
        """Names that are listed or match a pattern, as properties of these names."""
        names = schema.get("propertyNames")
        for _ in range(MAX_POINTERS):
            if isinstance(names, dict) and isinstance(names.get("$ref"), str):
                names = _pointed(self._root, names["$ref"])
        if names is True or (isinstance(names, dict) and names.keys() <= _OF_ANY_NAME):
            schema.pop("propertyNames")
            return
        if not isinstance(names, dict) or {"properties", "patternProperties"} & schema.keys():
            return
        values = schema.get("additionalProperties", True)
        words = names.keys() - _OF_ANY_NAME
        listed = [names["const"]] if words == {"const"} else names.get("enum")
        if words <= {"enum", "const"} and isinstance(listed, list):
            schema["properties"] = {name: values for name in listed if isinstance(name, str)}
        elif words == {"pattern"} and isinstance(names["pattern"], str):
            schema["patternProperties"] = {names["pattern"]: values}
        else:
            return
        schema["additionalProperties"] = False
        schema.pop("propertyNames")

    def _string_words(self, schema: Schema, at: str) -> None:
        pattern = schema.get("pattern")
        if isinstance(pattern, str) and not self._holds(pattern, at):
            schema.pop("pattern")
            self._drop("pattern", at)
        form = schema.get("format")
        if isinstance(form, str) and form not in FORMATS:
            schema.pop("format")
            if _may_be_string(schema):  # of numbers it says how they are kept
                self._drop(f"format {form[:64]}", at)
        patterns = schema.get("patternProperties")
        if isinstance(patterns, dict):
            held = {p: inner for p, inner in patterns.items() if self._holds(p, at)}
            if len(held) < len(patterns):
                self._drop("patternProperties", at)
                schema["patternProperties"] = held

    def _property_counts(self, schema: Schema, at: str) -> None:
        """Counts of properties, which a mask holds only where none is optional."""
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
        for word in ("minProperties", "maxProperties"):
            if word in schema:
                schema.pop(word)
                self._drop(word, at)


_OF_ANY_NAME = frozenset({"type", "title", "description", "$schema"})
"""Words of `propertyNames` that every name fits."""


def _whole_lengths(schema: Schema) -> None:
    for word in _LENGTHS:
        value = schema.get(word)
        if isinstance(value, float) and value.is_integer():
            schema[word] = int(value)


def _one_kind_of_bound(schema: Schema) -> None:
    """Draft 4 and OpenAPI 3.0: a boolean beside the bound."""
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
        schema.pop("required")  # draft 3: of the property, not of the object


def _may_be_string(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type", "string")
    return kinds == "string" or (isinstance(kinds, list) and "string" in kinds)


def _or_null(schema: Schema, at: str) -> Schema:
    """OpenAPI 3.0: `nullable` lets null in as well."""
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
        return schema  # null is not kept out, or others point into this schema by their places
    return {"anyOf": [schema, {"type": "null"}]}


def _pointed(root: Any, pointer: str) -> Any:  # noqa: ANN401
    """What a local reference points at; None for nothing."""
    if not pointer.startswith("#/"):
        return None
    found = root
    for part in pointer[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")

"""JSON Schemas to hold outputs against: written by hand, and made from a seed."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

TREE: Schema = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        },
        "leaf": {"type": "null"},
    },
    "$ref": "#/$defs/node",
}

BY_HAND: list[Schema] = [
    TREE,
    {"type": "boolean"},
    {"type": "null"},
    {"const": {"a": [1, 2, {"b": None}]}},
    {"enum": ["red", 7, None, True, [1], {"k": "v"}]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": "string", "pattern": "^(cat|dog)s?$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "integer", "minimum": -5, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 200},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    {"type": "number", "minimum": 0.5, "maximum": 2},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer", "maximum": 9, "minimum": 0},
                                      {"enum": ["x", "y"]}], "items": False, "minItems": 2},
    {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}]},
    {"anyOf": [{"const": "yes"}, {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "boolean"}},
     "additionalProperties": False, "maxProperties": 2},
    {"type": "object", "properties": {"a\"\\\u00e9": {"enum": ["\u00fc\n\t", "\U0001f999"]}},
     "required": ["a\"\\\u00e9"], "additionalProperties": False},
]  # fmt: skip

BOMBS: dict[str, Schema] = {
    "deep": {},  # filled below
    "wide": {
        "type": "object",
        "properties": {f"p{i}": {"enum": [f"v{k}" for k in range(50)]} for i in range(1000)},
    },
    "product": {
        "allOf": [
            {"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in range(8)]}
            for i in range(12)
        ]
    },
    "many": {
        "type": "array",
        "minItems": 10**9,
        "items": {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
    },
    "remote": {"$ref": "http://127.0.0.1:9/schema.json"},
    "lost": {"$ref": "#/$defs/nowhere"},
    "empty": {"allOf": [{"type": "string"}, {"type": "integer"}]},
}
_deep: Schema = {"type": "string"}
for _ in range(100):
    _deep = {"type": "array", "items": _deep}
BOMBS["deep"] = _deep

_WORDS = ("name", "size", "tags", "kind", "unit", "ok", "sub", "id", "note", "rank")


def generated(count: int, seed: int) -> list[Schema]:
    """`count` schemas whose outputs are short."""
    draw = random.Random(seed)
    return [_object(draw, 0) for _ in range(count)]


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(_WORDS, draw.randint(1, 4 - depth))
    required = [name for name in names if draw.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: _value(draw, depth + 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _value(draw: random.Random, depth: int) -> Schema:
    kinds = ["text", "pattern", "integer", "bounds", "enum", "bool", "const", "oneOf"]
    if depth < 3:
        kinds += ["object", "array", "anyOf"]
    kind = draw.choice(kinds)
    low = draw.randint(-50, 50)
    if kind == "text":
        return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(2, 8)}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": draw.choice(("^[a-z]{2,5}$", "^v[0-9]{1,3}$", "^(on|off)$", "^[0-9]{3}$")),
        }
    if kind == "integer":
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 100)}
    if kind == "bounds":
        return {"type": "integer", "exclusiveMinimum": low, "maximum": low + 7}
    if kind == "enum":
        return {"enum": draw.sample(["a", "bb", "ccc", 1, 2.5, None, False], 3)}
    if kind == "bool":
        return {"type": "boolean"}
    if kind == "const":
        return {"const": draw.choice(("fixed", 0, None, [1, 2]))}
    if kind == "oneOf":
        return {"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 99}]}
    if kind == "anyOf":
        return {"anyOf": [_value(draw, depth + 1), {"type": "null"}]}
    if kind == "object":
        return _object(draw, depth)
    return {"type": "array", "items": _value(draw, depth + 1), "maxItems": draw.randint(1, 3)}

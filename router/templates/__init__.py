"""Chat templates for Llama checkpoints that ship none, written from the documented formats.

To add one: put its Jinja beside this file and a line into `find`.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.resources import files


def find(specials: Collection[str], *, rope_factor: float | None = None) -> str | None:
    """The template of the generation that a checkpoint's special tokens tell of, if any.

    Args:
        specials: texts of its special tokens.
        rope_factor: factor of its RoPE scaling; 32 tells Llama 3.2 from 3.1, whose tokens are
            the same.
    """
    if "<|header_start|>" in specials:
        return read("llama4")
    if "<|start_header_id|>" in specials:
        if "<|python_tag|>" not in specials:
            return read("llama3")
        return read("llama3.2" if rope_factor == 32 else "llama3.1")
    return None


def read(name: str) -> str:
    """Source of the template called `name`."""
    return files(__name__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")

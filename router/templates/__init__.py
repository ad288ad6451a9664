"""Chat templates for Llama checkpoints without a template, written from the documented formats.

To add a template, put the Jinja file beside this file and add a line to `find`.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.resources import files


def find(specials: Collection[str], *, rope_factor: float | None = None) -> str | None:
    """The template of the Llama generation with these special tokens; None for other tokens.

    Args:
        specials: texts of the checkpoint's special tokens.
        rope_factor: factor of RoPE scaling; 32 tells Llama 3.2 from 3.1, since both have the same
            special tokens.
    """
    if "<|header_start|>" in specials:
        return read("llama4")
    if "<|start_header_id|>" in specials:
        if "<|python_tag|>" not in specials:
            return read("llama3")
        return read("llama3.2" if rope_factor == 32 else "llama3.1")
    return None


def read(name: str) -> str:
    """Jinja source of the template `name`."""
    return files(__name__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")

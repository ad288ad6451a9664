"""Finds tool calls in a model's text while the text streams."""

from arriero.router.tools.events import Content, Event, ToolCall, Truncated
from arriero.router.tools.parser import ToolCallParser
from arriero.router.tools.partial import partial_call

__all__ = ["Content", "Event", "ToolCall", "ToolCallParser", "Truncated", "partial_call"]

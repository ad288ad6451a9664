"""Tool calls in a model's text, found while it streams."""

from arriero.router.tools.events import Content, Event, ToolCall, Truncated
from arriero.router.tools.parser import ToolCallParser

__all__ = ["Content", "Event", "ToolCall", "ToolCallParser", "Truncated"]

"""Drafts in `arriero top` and `arriero status`: a column and a line, for groups that draft."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

from arriero.cluster.commands.top import view
from arriero.cluster.commands.views import status_view
from arriero.router.proto.arriero.v1 import admin_pb2 as pb


def text_of(view: RenderableType) -> str:
    file = io.StringIO()
    Console(width=120, file=file).print(view)
    return file.getvalue()


def status_of(*drafts: tuple[int, int, int]) -> pb.Status:
    """A status with a group for each (rows with drafts, drafted tokens, accepted tokens)."""
    status = pb.Status()
    for number, (rows, drafted, accepted) in enumerate(drafts):
        status.groups.add(
            seat=f"m-{number}",
            id=f"m-{number}.1",
            phase="serving",
            drafts=rows,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
        )
    return status


def test_groups_that_draft_show_their_accepted_length() -> None:
    status = status_of((10, 40, 28), (0, 0, 0))
    top = text_of(view((0.0, status), (1.0, status)))
    assert "drafts" in top
    (drafting,) = [line for line in top.splitlines() if "m-0.1" in line]
    (other,) = [line for line in top.splitlines() if "m-1.1" in line]
    assert "3.8 (70%)" in drafting and "%)" not in other
    shown = text_of(status_view(status))
    assert "m-0.1: 3.8 (70%) tokens of a step with drafts (share right)" in shown
    assert "m-1.1: " not in shown


def test_groups_without_drafts_show_nothing() -> None:
    status = status_of((0, 0, 0))
    assert "drafts" not in text_of(view((0.0, status), (1.0, status)))
    assert "drafts" not in text_of(status_view(status))

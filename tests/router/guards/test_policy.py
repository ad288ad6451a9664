"""Output under judgement: whatever the cut into deltas, no condemned expression is shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.router.guards.policy import OutputWindows

BAD = ("bomb", "how to kill", "x")


def condemns(text: str) -> bool:
    return any(word in text for word in BAD)


def show(deltas: Sequence[str], window: int, overlap: int) -> tuple[str, bool]:
    """What a client sees of the deltas, and whether the output was cut."""
    windows = OutputWindows[str](window=window, overlap=overlap)
    seen = ""
    for number, delta in enumerate(deltas):
        windows.add(delta, delta, 1, final=number == len(deltas) - 1)
        if windows.needs_judgement:
            if condemns(windows.text):
                windows.condemn()
                break
            seen += "".join(windows.accept())
    return seen, windows.condemned


def cuts(text: str) -> list[list[str]]:
    """All divisions of a short text into deltas."""
    divided = []
    for mask in range(2 ** (len(text) - 1)):
        ends = [i + 1 for i in range(len(text) - 1) if mask >> i & 1]
        divided.append([text[a:b] for a, b in pairwise([0, *ends, len(text)])])
    return divided


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("text", "bad"), [("a bomb here", True), ("bomb", True), ("bob mb", False)]
)
def test_every_cut_of_a_text(text: str, bad: bool, window: int) -> None:
    for deltas in cuts(text):
        seen, condemned = show(deltas, window, overlap=len("bomb") - 1)
        assert condemned == bad
        if bad:
            assert text.startswith(seen) and len(seen) <= text.index("bomb")
        else:
            assert seen == text


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("bom hwtkil", min_size=0, max_size=6), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(10, 40),
)
def test_any_cut_and_window(deltas: list[str], window: int, overlap: int) -> None:
    text = "".join(deltas)
    seen, condemned = show(deltas, window, overlap)
    assert condemned == condemns(text)
    starts = [text.index(word) for word in BAD if word in text]
    if starts:
        # of the expression that is complete first nothing was shown, not even its beginning
        ends = {text.index(word) + len(word): text.index(word) for word in BAD if word in text}
        assert len(seen) <= ends[min(ends)]
    else:
        assert seen == text


def test_long_output_is_shown_while_it_grows() -> None:
    windows = OutputWindows[int](window=4, overlap=6)
    shown = []
    for number in range(40):
        windows.add(number, "abc", 1, final=False)
        if windows.needs_judgement:
            shown += windows.accept()
    assert shown == list(range(38)), "all but the overlap"
    windows.add(40, "", 0, final=True)
    assert windows.needs_judgement and windows.accept() == [38, 39, 40]
    assert not windows.open and not windows.needs_judgement


def test_text_that_the_client_has_belongs_to_the_judged_text() -> None:
    windows = OutputWindows[str](window=1, overlap=4, before="a bo")
    windows.add("mb", "mb", 1, final=False)
    assert windows.text == "a bomb" and windows.num_tokens == 1
    windows.condemn()
    windows.add("more", "more", 1, final=True)
    assert windows.accept() == [] and not windows.open

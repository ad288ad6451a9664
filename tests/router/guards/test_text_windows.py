"""Windows of long texts."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from arriero.router.guards.text_windows import split_windows, whole_score


@given(st.integers(0, 900), st.integers(2, 40), st.data())
def test_windows_cover_a_text(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    tokens = list(range(length))
    windows = split_windows(tokens, size=size, overlap=overlap)
    assert all(len(window) <= size for window in windows)
    assert windows[0] == tokens[:size] and windows[-1] == tokens[-size:]
    assert sorted({token for window in windows for token in window}) == tokens
    for a, b in pairwise(windows):
        assert b[0] > a[0] and a[-1] + 1 - b[0] >= overlap, "neighbours share `overlap` tokens"


def test_the_worst_window_counts() -> None:
    assert whole_score([0.1, 0.9, 0.2]) == 0.9 and whole_score([]) == 0.0

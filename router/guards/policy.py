"""Output under judgement: which deltas of a sample may be shown. Sans-I/O.

Deltas are held back until a guard has judged the text that holds them and `overlap` more
characters (or the end). A judgement is over the whole text so far, so no expression is lost on a
border of windows; a guard's prefix cache makes the repeated part cheap. Since shown text lies
`overlap` characters behind judged text, an expression of at most `overlap` characters that the
guard condemns was not shown in part before. Knows texts and counts of tokens; knows nothing of
guards, messages and time.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

Payload = TypeVar("Payload")


class OutputWindows(Generic[Payload]):
    """The output of a sample: held, shown or condemned.

    Args:
        window: tokens between two judgements, at least 1.
        overlap: characters at the end of judged text that stay hidden.
        before: text of the sample that the client has already; part of the judged text.
    """

    def __init__(self, *, window: int, overlap: int, before: str = "") -> None:
        self._window, self._overlap = window, overlap
        self._texts = [before]
        self._num_chars = len(before)
        self._held: deque[tuple[int, Payload]] = deque()  # end of the text in characters, delta
        self._num_unjudged = 0
        self.num_tokens = 0
        self.ended = False
        self.condemned = False

    @property
    def open(self) -> bool:
        """Whether further deltas are of interest."""
        return not (self.ended or self.condemned)

    @property
    def text(self) -> str:
        """The text so far, hidden text included."""
        return "".join(self._texts)

    def add(self, payload: Payload, text: str, num_tokens: int, *, final: bool) -> None:
        """Hold a delta.

        Args:
            payload: the delta.
            text: its text.
            num_tokens: its tokens.
            final: whether the sample ends with this delta.
        """
        if not self.open:
            return
        self.num_tokens += num_tokens
        self._num_unjudged += num_tokens
        self._texts.append(text)
        self._num_chars += len(text)
        self._held.append((self._num_chars, payload))
        self.ended = final

    @property
    def needs_judgement(self) -> bool:
        """Whether `text` must be judged now: a window is full, or the sample has ended."""
        if self.condemned or not self._held:
            return False
        return self.ended or self._num_unjudged >= self._window

    def accept(self) -> list[Payload]:
        """The deltas that may be shown after `text` was judged as safe, in order."""
        self._num_unjudged = 0
        visible = self._num_chars if self.ended else self._num_chars - self._overlap
        shown = []
        while self._held and self._held[0][0] <= visible:
            shown.append(self._held.popleft()[1])
        return shown

    def condemn(self) -> None:
        """Drop what is held: `text` was judged as unsafe."""
        self.condemned = True
        self._held.clear()

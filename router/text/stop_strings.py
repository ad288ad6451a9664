"""Stop strings in text that arrives in pieces.

The matcher holds back the longest end of the text that may grow into a stop string, so that no part
of a stop string is ever sent, and sends all other text at once. The answer does not depend on the
division into pieces: the stop string that is complete first wins, and among stop strings that are
complete at the same character, the longest. Knows text only.
"""

from __future__ import annotations

from collections.abc import Sequence

from arriero.shards.errors import InvalidRequest

MAX_STOPS = 64
MAX_STOP_BYTES = 256


def check_stops(stops: Sequence[str]) -> None:
    """Raise `InvalidRequest` for stop strings that exceed a limit."""
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stop", f"`stop` has {len(stops)} strings; send at most {MAX_STOPS}")
    for number, stop in enumerate(stops):
        size = len(stop.encode())
        if not 1 <= size <= MAX_STOP_BYTES:
            raise InvalidRequest(
                "stop",
                f"`stop[{number}]` has {size} bytes; send 1 to {MAX_STOP_BYTES} bytes",
            )


class StopMatcher:
    """Watches a stream of text, with the automaton of Knuth, Morris and Pratt for each string.

    Attributes:
        stop_string: the stop string that ended the text; None before.
    """

    __slots__ = (
        "_failures", "_firsts", "_include", "_matched", "_pending", "_stops", "stop_string",
    )  # fmt: skip

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        # Longest first: among strings that are complete at the same character the first match wins.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._failures = [_failures(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._include = include
        self._pending = ""
        self.stop_string: str | None = None

    def add(self, text: str, *, final: bool = False) -> str:
        """The text that may be sent now; no text after a stop string.

        Args:
            text: the next piece.
            final: no text follows, so no text is held back.
        """
        if self.stop_string is not None:
            return ""
        if not self._pending and self._firsts.isdisjoint(text):
            return text
        buffer = self._pending + text
        for at, char in enumerate(text, len(self._pending) + 1):
            for number, stop in enumerate(self._stops):
                matched, failures = self._matched[number], self._failures[number]
                while matched and stop[matched] != char:
                    matched = failures[matched - 1]
                if stop[matched] == char:
                    matched += 1
                if matched == len(stop):
                    self.stop_string, self._pending = stop, ""
                    return buffer[: at if self._include else at - len(stop)]
                self._matched[number] = matched
        size = len(buffer) - (0 if final else max(self._matched, default=0))
        self._pending = buffer[size:]
        return buffer[:size]


def _failures(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of the longest proper prefix that is also a suffix."""
    table = [0] * len(stop)
    matched = 0
    for at in range(1, len(stop)):
        while matched and stop[at] != stop[matched]:
            matched = table[matched - 1]
        if stop[at] == stop[matched]:
            matched += 1
        table[at] = matched
    return table

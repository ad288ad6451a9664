"""Stop strings, found in text that arrives in pieces.

Holds back the longest end of the text that may yet grow into a stop string, so that no part of
one is ever sent, and sends all else at once. The answer does not depend on how the text is cut:
the stop string that is complete first wins, and of those complete at the same character the
longest. Knows text only.
"""

from __future__ import annotations

from collections.abc import Sequence

from arriero.shards.errors import InvalidRequest

MAX_STOPS = 64
MAX_STOP_BYTES = 256


def check_stops(stops: Sequence[str]) -> None:
    """Raise `InvalidRequest` for stop strings that break a limit."""
    if len(stops) > MAX_STOPS:
        raise InvalidRequest("stop", f"`stop` has {len(stops)} strings; the most is {MAX_STOPS}")
    for number, stop in enumerate(stops):
        size = len(stop.encode())
        if not 1 <= size <= MAX_STOP_BYTES:
            raise InvalidRequest(
                "stop",
                f"`stop[{number}]` has {size} bytes; it must have at least 1 and at most "
                f"{MAX_STOP_BYTES}",
            )


class StopMatcher:
    """Watches one stream of text (Knuth, Morris and Pratt's automaton, one for each string).

    Attributes:
        found: the stop string that ended the text, or None so far.
    """

    __slots__ = ("_failures", "_firsts", "_held", "_include", "_matched", "_stops", "found")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        # Longest first: of strings complete at the same character the first one found wins.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._failures = [_failures(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def add(self, text: str, *, final: bool = False) -> str:
        """What of the text so far may be sent now; nothing once a stop string is found.

        Args:
            text: the next piece.
            final: nothing follows, so nothing need be held back.
        """
        if self.found is not None:
            return ""
        if not self._held and self._firsts.isdisjoint(text):
            return text
        waiting = self._held + text
        for at, char in enumerate(text, len(self._held) + 1):
            for number, stop in enumerate(self._stops):
                matched, failures = self._matched[number], self._failures[number]
                while matched and stop[matched] != char:
                    matched = failures[matched - 1]
                if stop[matched] == char:
                    matched += 1
                if matched == len(stop):
                    self.found, self._held = stop, ""
                    return waiting[: at if self._include else at - len(stop)]
                self._matched[number] = matched
        keep = len(waiting) - (0 if final else max(self._matched, default=0))
        self._held = waiting[keep:]
        return waiting[:keep]


def _failures(stop: str) -> list[int]:
    """For each prefix of `stop`, its longest proper prefix that also ends it."""
    table = [0] * len(stop)
    matched = 0
    for at in range(1, len(stop)):
        while matched and stop[at] != stop[matched]:
            matched = table[matched - 1]
        if stop[at] == stop[matched]:
            matched += 1
        table[at] = matched
    return table

"""The pace of background requests, sans-I/O: batches take what interactive traffic leaves free.

A background request waits in the queue of its gateway until all of these hold: no interactive
request waits for its first token beyond one for each group, less than a window of background
sequences run, and a quarter of the seats stays free for interactive requests. The window follows
the time between two tokens, as TCP's follows the delay of packets: it grows while that time stays
near the shortest one seen, and shrinks once background requests make steps longer.

Knows counts and times that are passed in; knows nothing of queues, tenants or groups.
"""

from __future__ import annotations

from collections import deque

SEAT_SHARE = 0.75
"""Largest share of the seats that background requests fill together with interactive requests."""
QUIET_S = 30.0
"""Seconds without an interactive request after which background requests may use the whole step."""
STRETCH, QUIET_STRETCH = 1.05, 4.0
"""Largest time between two tokens, in shortest times: beside interactive requests, and alone."""
BACKOFF = 0.7
"""Factor of the window when tokens come too slowly."""
FIRST_WINDOW = 4.0
_BACKOFF_S = 1.0
"""Seconds between two reductions of the window: the first one needs time to show."""
_GAPS = 32
"""Number of times between tokens that count; their lower quartile leaves prefill steps out."""
_DRIFT = 1.01
"""Growth of the shortest time at each look, so that a changed load finds its own shortest time."""


class BackgroundPace:
    """Decides when background requests of one model start.

    Attributes:
        window: most background sequences at once.
    """

    def __init__(self) -> None:
        self.window = FIRST_WINDOW
        self._running = {True: 0, False: 0}
        self._prompting = {True: 0, False: 0}
        self._last_interactive_s = -QUIET_S
        self._gaps: deque[float] = deque(maxlen=_GAPS)
        self._shortest_s = 0.0
        self._reduced_s: float | None = None

    @property
    def num_background(self) -> int:
        """Number of background sequences that run."""
        return self._running[True]

    def arrived(self, now_s: float) -> None:
        """Note an interactive request; from now on it waits for its first token."""
        if self._is_quiet(now_s):  # a window that was right for a batch alone is too large now
            self.window = min(self.window, FIRST_WINDOW)
        self._prompting[False] += 1
        self._last_interactive_s = now_s

    def started(self, num_sequences: int, *, background: bool) -> None:
        """Note that a request left the queue."""
        self._running[background] += num_sequences
        if background:
            self._prompting[True] += 1

    def first_token(self, *, background: bool) -> None:
        """Note that a request that runs has its first token."""
        self._prompting[background] -= 1

    def next_token(self, gap_s: float) -> None:
        """Note the seconds between two tokens of a request."""
        self._gaps.append(gap_s)

    def ended(
        self, num_sequences: int, now_s: float, *, background: bool, started: bool, prompting: bool
    ) -> None:
        """Note the end of a request.

        Args:
            num_sequences: number of its samples.
            now_s: monotonic time.
            background: whether the request was a background request.
            started: whether the request had left the queue.
            prompting: whether the request still waited for its first token.
        """
        if started:
            self._running[background] -= num_sequences
        if prompting and (started or not background):
            self._prompting[background] -= 1
        if background and started:
            self._adapt(now_s)
        elif not background:
            self._last_interactive_s = now_s

    def may_start(self, room: int, num_groups: int, now_s: float) -> bool:
        """Whether another background request may start.

        Args:
            room: sequences of this gateway that the groups take at once.
            num_groups: groups of the model.
            now_s: monotonic time.
        """
        if self._prompting[False] >= max(1, num_groups):
            return False
        background, interactive = self._running[True], self._running[False]
        if background >= int(self.window):
            return False
        if not self._is_quiet(now_s):
            # One prompt a group: a step that an interactive request has to wait for stays short.
            if self._prompting[True] >= max(1, num_groups):
                return False
        elif not background:
            return True
        return background + interactive < SEAT_SHARE * room

    def _is_quiet(self, now_s: float) -> bool:
        return not self._running[False] and now_s - self._last_interactive_s >= QUIET_S

    def _adapt(self, now_s: float) -> None:
        """Change the window after the end of a background request."""
        if len(self._gaps) == _GAPS:
            gap_s = sorted(self._gaps)[_GAPS // 4]
            before_s = self._shortest_s * _DRIFT
            self._shortest_s = min(gap_s, before_s) if self._shortest_s else gap_s
            stretch = QUIET_STRETCH if self._is_quiet(now_s) else STRETCH
            if gap_s > stretch * self._shortest_s:
                if self._reduced_s is None or now_s - self._reduced_s >= _BACKOFF_S:
                    self.window = max(1.0, BACKOFF * self.window)
                    self._reduced_s = now_s
                return
        if self._running[True] + 1 >= int(self.window):  # a window that is not full teaches nothing
            self.window += 1.0 if self._reduced_s is None else 1.0 / self.window

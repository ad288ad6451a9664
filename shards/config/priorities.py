"""The priority of background requests, and what it means to the scheduler.

Knows numbers; knows nothing of requests.
"""

from __future__ import annotations

BACKGROUND_PRIORITY = 1_000_000
"""Priority of background requests, behind that of every other request."""
BACKGROUND_CHUNK = 32
"""Most prompt tokens of a background sequence in a step: a step cannot be interrupted, so that its
length is what a new interactive request waits for. Several sequences fill a step together."""

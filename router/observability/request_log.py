"""A line of JSON for each request that ended: who, what it took, and how it ended.

There is no prompt and no output in it unless that is asked for. Knows the line's fields; knows
nothing of how requests run.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arriero.router.observability.metrics import RequestTimer
from arriero.router.tenants.admission_controller import Caller


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLogConfig:
    """Where the lines go.

    Attributes:
        path: a file, opened again when it was moved away; None for the standard output.
        prompts: put the prompt's text in as well.
    """

    path: Path | None = None
    prompts: bool = False


class RequestLog:
    """Writes the lines.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, config: RequestLogConfig) -> None:
        self._prompts = config.prompts
        self._handler: logging.Handler
        if config.path is None:
            self._handler = logging.StreamHandler(sys.stdout)
        else:
            self._handler = logging.handlers.WatchedFileHandler(config.path, encoding="utf-8")

    def write(
        self,
        caller: Caller,
        model: str,
        num_prompt: int,
        watch: RequestTimer,
        end: str,
        prompt: Callable[[], str],
    ) -> None:
        """One request's line.

        Args:
            caller: who asked.
            model: which model.
            num_prompt: prompt tokens.
            watch: its times and tokens.
            end: "finished", "cancelled" by the client, or an error's name.
            prompt: gives the prompt's text; called only where it is asked for.
        """
        line: dict[str, object] = {
            "time": round(time.time(), 3),
            "request_id": caller.request_id,
            "tenant": caller.tenant.name,
            "model": model,
            "prompt_tokens": num_prompt,
            "output_tokens": watch.num_tokens,
            "queue_ms": _since(watch.begun_s, watch.turn_s),
            "first_token_ms": _since(watch.begun_s, watch.first_s),
            "total_ms": _since(watch.begun_s, time.monotonic()),
            "end": end,
        }
        if self._prompts:
            line["prompt"] = prompt()
        text = json.dumps(line, ensure_ascii=False)
        record = logging.LogRecord("arriero.requests", logging.INFO, "", 0, text, None, None)
        self._handler.handle(record)

    def close(self) -> None:
        """Let the file go."""
        self._handler.close()


def _since(begun_s: float, then_s: float | None) -> float | None:
    return None if then_s is None else round((then_s - begun_s) * 1e3, 2)

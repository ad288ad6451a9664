"""The request log: a line of JSON for each ended request, with client, tokens, times and end.

A line contains the prompt only if the configuration asks for prompts, and never the output. Knows
the fields of a line; knows nothing of the execution of requests.
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
    """Configuration of the request log.

    Attributes:
        path: file, opened again after a rotation; None for the standard output.
        prompts: include the text of the prompt.
    """

    path: Path | None = None
    prompts: bool = False


class RequestLog:
    """Writes the lines of the request log.

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
        timer: RequestTimer,
        end: str,
        prompt: Callable[[], str],
    ) -> None:
        """Write the line of a request.

        Args:
            caller: the client.
            model: id of the model.
            num_prompt: prompt tokens.
            timer: times and tokens of the request.
            end: "finished", "cancelled" by the client, or the name of an error.
            prompt: gives the prompt's text; called only for a log with prompts.
        """
        line: dict[str, object] = {
            "time": round(time.time(), 3),
            "request_id": caller.request_id,
            "tenant": caller.tenant.name,
            "model": model,
            "prompt_tokens": num_prompt,
            "output_tokens": timer.num_tokens,
            "queue_ms": _since(timer.start_s, timer.admitted_s),
            "first_token_ms": _since(timer.start_s, timer.first_token_s),
            "total_ms": _since(timer.start_s, time.monotonic()),
            "end": end,
        }
        if self._prompts:
            line["prompt"] = prompt()
        text = json.dumps(line, ensure_ascii=False)
        record = logging.LogRecord("arriero.requests", logging.INFO, "", 0, text, None, None)
        self._handler.handle(record)

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


def _since(start_s: float, end_s: float | None) -> float | None:
    """Milliseconds between two times."""
    return None if end_s is None else round((end_s - start_s) * 1e3, 2)

"""The request log: a line of JSON for each ended request, with client, tokens, times and end.

A line contains the prompt only if the configuration asks for prompts, and never the output. The
file is made for its owner alone (mode 0600). Knows the fields of a line; knows nothing of the
execution of requests.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
            self._handler = _PrivateFileHandler(config.path, keep_mode=not config.prompts)

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


class _PrivateFileHandler(logging.handlers.WatchedFileHandler):
    """Makes its file readable and writable by the owner alone, also after a rotation.

    Args:
        path: the file.
        keep_mode: leave the mode of a file that exists; an operator may have opened it to others.
    """

    def __init__(self, path: Path, *, keep_mode: bool) -> None:
        self._keep_mode = keep_mode
        super().__init__(path, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = os.open(self.baseFilename, flags, 0o600)
        if not self._keep_mode:
            os.fchmod(descriptor, 0o600)
        return open(descriptor, "a", encoding=self.encoding)


def _since(start_s: float, end_s: float | None) -> float | None:
    """Milliseconds between two times."""
    return None if end_s is None else round((end_s - start_s) * 1e3, 2)

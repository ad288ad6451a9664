"""Instrumentation of a request: metrics, a span, a line in the request log, lines for debugging.

Knows the enabled parts; knows nothing of the format of each part.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from arriero.router.observability.log_lines import set_request_id
from arriero.router.observability.metrics import Metrics, RequestTimer
from arriero.router.observability.request_log import RequestLog
from arriero.router.observability.tracing import ActiveSpan, Tracing
from arriero.router.tenants.admission_controller import Caller
from arriero.shards.errors import ArrieroError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ObservedRequest:
    """The timer of a request, and the span; None without tracing."""

    timer: RequestTimer
    span: ActiveSpan | None

    def admitted(self) -> None:
        """Record the end of the wait in the gateway."""
        self.timer.admitted()
        if log.isEnabledFor(logging.DEBUG):
            log.debug("turn after %.1f ms", self.timer.since_start_ms())
        if self.span is not None:
            self.span.event("turn")

    @property
    def traceparent(self) -> str:
        """The `traceparent` for the group; "" without tracing."""
        return "" if self.span is None else self.span.header


@dataclass(frozen=True, slots=True)
class RequestObserver:
    """The enabled parts of the instrumentation."""

    metrics: Metrics
    tracing: Tracing | None = None
    log: RequestLog | None = None

    @contextmanager
    def request(
        self, caller: Caller, model: str, num_prompt: int, prompt: Callable[[], str]
    ) -> Iterator[ObservedRequest]:
        """Observe a valid request until its end.

        Args:
            caller: the client.
            model: id of a served model.
            num_prompt: prompt tokens.
            prompt: gives the prompt's text for a log with prompts.
        """
        span = None
        if self.tracing is not None:
            attributes: dict[str, str | int | float] = {
                "arriero.request_id": caller.request_id,
                "arriero.tenant": caller.tenant.name,
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": num_prompt,
            }
            span = self.tracing.begin("request", caller.traceparent, attributes)
        set_request_id(caller.request_id)
        log.debug("tenant %s, model %s, %d prompt tokens", caller.tenant.name, model, num_prompt)
        end, error, timer = "finished", "", None
        try:
            with self.metrics.request(model, caller.tenant.name) as timer:
                yield ObservedRequest(timer, span)
        except (GeneratorExit, asyncio.CancelledError):
            end = "cancelled"
            raise
        except BaseException as caught:
            end = type(caught).__name__
            error = str(caught) if isinstance(caught, ArrieroError) else end
            raise
        finally:
            if timer is not None and log.isEnabledFor(logging.DEBUG):
                elapsed_ms, num_tokens = timer.since_start_ms(), timer.num_tokens
                log.debug("%s: %d tokens, %.1f ms %s", end, num_tokens, elapsed_ms, error)
            if timer is not None and self.log is not None:
                self.log.write(caller, model, num_prompt, timer, end, prompt)
            if span is not None:
                num_output = 0 if timer is None else timer.num_tokens
                span.end({"gen_ai.usage.output_tokens": num_output, "arriero.end": end}, error)

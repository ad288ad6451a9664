"""What is seen of a request while it runs: counters, a span, and a line in the log.

Knows which of them are on; what each looks like is theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from arriero.router.observability.metrics import Metrics, RequestTimer
from arriero.router.observability.request_log import RequestLog
from arriero.router.observability.tracing import Trace, Tracing
from arriero.router.tenants.admission_controller import Caller
from arriero.shards.errors import ArrieroError


@dataclass(frozen=True, slots=True)
class ObservedRequest:
    """One request's watch, and its span if there is one."""

    watch: RequestTimer
    trace: Trace | None

    def turn(self) -> None:
        """Its turn has come."""
        self.watch.turn()
        if self.trace is not None:
            self.trace.event("turn")

    @property
    def traceparent(self) -> str:
        """What to pass on; "" for nothing."""
        return "" if self.trace is None else self.trace.header


@dataclass(frozen=True, slots=True)
class RequestObserver:
    """What is on."""

    metrics: Metrics
    tracing: Tracing | None = None
    log: RequestLog | None = None

    @contextmanager
    def request(
        self, caller: Caller, model: str, num_prompt: int, prompt: Callable[[], str]
    ) -> Iterator[ObservedRequest]:
        """See one request, from its checks to its end.

        Args:
            caller: who asks.
            model: one that is served.
            num_prompt: prompt tokens.
            prompt: gives the prompt's text, for a log that is to have it.
        """
        trace = None
        if self.tracing is not None:
            facts: dict[str, str | int | float] = {
                "arriero.request_id": caller.request_id,
                "arriero.tenant": caller.tenant.name,
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": num_prompt,
            }
            trace = self.tracing.begin("request", caller.traceparent, facts)
        end, error, watch = "finished", "", None
        try:
            with self.metrics.request(model, caller.tenant.name) as watch:
                yield ObservedRequest(watch, trace)
        except (GeneratorExit, asyncio.CancelledError):
            end = "cancelled"
            raise
        except BaseException as caught:
            end = type(caught).__name__
            error = str(caught) if isinstance(caught, ArrieroError) else end
            raise
        finally:
            if watch is not None and self.log is not None:
                self.log.write(caller, model, num_prompt, watch, end, prompt)
            if trace is not None:
                num_output = 0 if watch is None else watch.num_tokens
                trace.end({"gen_ai.usage.output_tokens": num_output, "arriero.end": end}, error)

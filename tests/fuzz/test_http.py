"""Everything that /openapi.json allows, and some that it does not, asked of a real gateway."""

from __future__ import annotations

import time

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from support.target import Findings, Target

EXAMPLES = 10
"""Examples of each operation and mode in a round; fewer in a short run, which is one round."""
SHORT_RUN_S, SHORT_EXAMPLES = 60.0, 4


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore")  # of the generator's own parts
def test_the_schema(target: Target, duration_s: float, caplog: pytest.LogCaptureFixture) -> None:
    schema = schemathesis.openapi.from_url(f"{target.http}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 8
    findings = Findings("HTTP fuzz")
    until = time.monotonic() + duration_s
    rounds = 0
    examples = EXAMPLES if duration_s > SHORT_RUN_S else SHORT_EXAMPLES
    while time.monotonic() < until:
        rounds += 1
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if time.monotonic() > until and rounds > 1:
                    break
                _ask(operation, mode, rounds, examples, findings)
    findings.close(target, caplog.records)
    assert findings.statuses["200"] and findings.statuses["400"]


def _ask(operation, mode: GenerationMode, number: int, examples: int, findings: Findings) -> None:  # noqa: ANN001
    cases = operation.as_strategy(generation_mode=mode)

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=cases)
    def one(case) -> None:  # noqa: ANN001
        response = case.call(timeout=60)
        status = response.status_code
        shown = (operation.label, case.query, case.body)
        findings.see(str(status), shown, response.text, stated=status < 500)
        if status >= 400:
            error = response.json()["error"]
            of_anthropic = operation.path.startswith("/v1/messages")
            fields = {"message", "type"} | (set() if of_anthropic else {"param", "code"})
            assert set(error) == fields, response.text

    try:
        one()
    except Exception as error:
        if "Unsatisfiable" not in type(error).__name__ and "Unsatisfiable" not in str(error):
            raise  # an operation without a body has nothing to get wrong

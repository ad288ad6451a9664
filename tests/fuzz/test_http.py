"""Everything that /openapi.json allows, and some that it does not, asked of a real gateway."""

from __future__ import annotations

import time

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from support.target import Target

EXAMPLES = 10


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore")  # of the generator's own parts
def test_the_schema(target: Target, duration_s: float) -> None:
    schema = schemathesis.openapi.from_url(f"{target.http}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 8
    statuses: dict[int, int] = {}
    until = time.monotonic() + duration_s
    rounds = 0
    while time.monotonic() < until:
        rounds += 1
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if time.monotonic() > until and rounds > 1:
                    break
                _ask(operation, mode, rounds, statuses)
    target.check_nothing_is_left()
    print(f"{sum(statuses.values())} requests in {rounds} rounds; by status: {statuses}")
    assert statuses.get(200)
    assert statuses.get(400)


def _ask(operation, mode: GenerationMode, number: int, statuses: dict[int, int]) -> None:  # noqa: ANN001
    cases = operation.as_strategy(generation_mode=mode)

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=cases)
    def one(case) -> None:  # noqa: ANN001
        response = case.call(timeout=60)
        status = response.status_code
        statuses[status] = statuses.get(status, 0) + 1
        text = response.text
        assert status < 500, (operation.label, status, text[:500], case.body)
        assert "Traceback" not in text and 'File "' not in text, text[:500]
        if status >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, text

    try:
        one()
    except Exception as error:
        if "Unsatisfiable" not in type(error).__name__ and "Unsatisfiable" not in str(error):
            raise  # an operation without a body has nothing to get wrong

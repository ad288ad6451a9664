"""How long the fuzzers run, and their target."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.target import Target, fuzz_target

SHORT_S = 8.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="how long each fuzzer runs; 8 s without it")


@pytest.fixture(scope="session")
def duration_s(request: pytest.FixtureRequest) -> float:
    minutes = request.config.getoption("--minutes", default=None)
    return SHORT_S if minutes is None else 60 * minutes


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with fuzz_target(tmp_path_factory.mktemp("fuzz") / "tiny") as aimed_at:
        yield aimed_at

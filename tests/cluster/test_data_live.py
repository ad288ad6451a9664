"""A data set over a deployment of its own cluster, whose parts are killed under the rows."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arriero.cluster.connection import connected
from support.tiny_deployment import TinyDeployment, tiny_deployment

pytest.importorskip("pandas", reason="needs the extra arriero[data]")
pytest.importorskip("pyarrow", reason="needs the extra arriero[data]")

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
NUM_ROWS = 600
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder"),
]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyDeployment]:
    folder = tmp_path_factory.mktemp("data")
    with tiny_deployment(folder, Path(MODEL)) as deployment:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in deployment.environment.items():
                patch.setenv(name, value)
            with connected(deployment.deployment):
                yield deployment


def test_rows_while_a_group_and_a_gateway_are_killed(deployed: TinyDeployment) -> None:
    import ray

    from arriero.cluster.data import processor

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        content = f"Name {row['id']} things."
        return {"id": row["id"], "messages": [{"role": "user", "content": content}]}

    process = processor(
        model="tiny",
        sampling={"max_tokens": 24, "ignore_eos": True},
        preprocess=preprocess,
        batch_size=20,
        concurrency=2,
    )
    rng, names, tokens = random.Random(2), Counter[int](), Counter[int]()
    faults = {NUM_ROWS // 4: deployed.kill_group, NUM_ROWS // 2: deployed.kill_gateway}
    for row in process(ray.data.range(NUM_ROWS)).iter_rows():
        assert row["error"] is None, row["error"]
        names[row["id"]] += 1
        tokens[row["num_generated_tokens"]] += 1
        if fault := faults.pop(names.total(), None):
            fault(rng)
    assert deployed.kills == ["group", "gateway"]
    assert names == Counter(range(NUM_ROWS))
    assert tokens == {24: NUM_ROWS}, "a resumed row has no token twice"

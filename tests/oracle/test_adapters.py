"""One batch of several adapters and the base model: each sequence as peft's own merge computes it.

`make test` runs a short form (three adapters, few layers); `make oracle` all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from arriero.shards.adapters.adapter import open_adapters
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.adapters import AdapterFile
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support import adapters as made
from support.groups import running
from support.oracle import greedy

pytest.importorskip("peft", reason="peft is not installed")
# peft reads attributes of transformers that have new names
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

TINY = Path(__file__).parents[1] / "assets" / "tiny-maverick"
NEW_TOKENS = 8
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, seed=0)


@dataclass
class Models:
    """A model with adapters, and what each gives for its prompt."""

    path: str
    files: tuple[AdapterFile, ...]
    prompts: list[list[int]]
    expected: list[list[int]]

    def config(self, **more: object) -> GroupConfig:
        settings = {"num_blocks": 512, "max_model_len": 512, "max_sequences": 16, "threads": 1}
        return GroupConfig(
            model_path=self.path, dtype="float32", adapters=self.files, **(settings | more)
        )


def logits_of(model: Callable[..., object]) -> Callable[[list[int]], torch.Tensor]:
    def of(tokens: list[int]) -> torch.Tensor:
        answer = model(input_ids=torch.tensor([tokens]), use_cache=False)
        return answer.logits[0]  # type: ignore[attr-defined, no-any-return]

    return of


def models(
    path: str, recipes: Sequence[made.Recipe], prompts: list[list[int]], folder: Path
) -> Models:
    import transformers

    files, expected = [], []
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        unchanged = [greedy(logits_of(base), prompt, [0] * NEW_TOKENS)[0] for prompt in prompts]
    for i, recipe in enumerate(recipes):
        model = made.make(base, recipe, folder / str(i))
        files.append(AdapterFile(name=f"a{i}", path=str(folder / str(i))))
        with torch.inference_mode():
            expected.append(greedy(logits_of(model), prompts[i], [0] * NEW_TOKENS)[0])
        assert expected[i] != unchanged[i], f"adapter {i} changes nothing"
    expected.append(unchanged[len(recipes)])
    return Models(path, tuple(files), prompts, expected)


def check(of: Models, **more: object) -> None:
    config = of.config(**more)
    opened = open_adapters(config, Checkpoint.open(of.path).config)
    chosen = [*(adapter.digest for adapter in opened), ""]
    with running(config) as group:
        for _ in range(2):  # the second time over a warm cache
            names = [
                group.submit(prompt, PARAMS, adapter=adapter)
                for prompt, adapter in zip(of.prompts, chosen, strict=True)
            ]
            for i, answer in enumerate(group.wait(names)):
                assert answer.error is None, answer.error
                assert answer.tokens == of.expected[i], f"model {i} of {len(names)} differs"
        # the same prompt under another adapter reads nothing of the first one's cache
        (wrong,) = group.wait([group.submit(of.prompts[0], PARAMS, adapter=chosen[1])])
        assert wrong.num_cached == 0


@pytest.fixture(scope="module")
def few(
    few_layers: str, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Models:
    folder = tmp_path_factory.mktemp("adapters")
    return models(few_layers, made.DENSE[1:4], prompts[12:16], folder)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Models:
    prompts = [[(7 * i + 11 * j) % 500 + 1 for j in range(20 + i)] for i in range(5)]
    return models(str(TINY), made.ROUTED, prompts, tmp_path_factory.mktemp("routed"))


LAYOUTS = [
    pytest.param({}, id="one slice"),
    pytest.param({"kernels": "reference"}, id="reference"),
    pytest.param({"tp": 2}, id="TP2"),
    pytest.param({"tp": 2, "tp_shares": (2.0, 1.0)}, id="TP2 unequal"),
    pytest.param({"pp": 2}, id="PP2"),
    pytest.param({"tp": 3, "pp": 2}, id="TP3xPP2", marks=pytest.mark.slow),
    pytest.param({"max_batch_tokens": 16}, id="chunks"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_models_is_pefts_merge(few: Models, layout: dict[str, object]) -> None:
    check(few, **layout)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_experts_and_router_too(routed: Models, layout: dict[str, object]) -> None:
    check(routed, **layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nine_models_in_one_batch(
    few_layers: str, prompts: list[list[int]], tmp_path: Path, layout: dict[str, object]
) -> None:
    check(models(few_layers, made.DENSE, prompts[8:17], tmp_path), **layout)

"""One batch of several adapters and the base model: each sequence as peft's own merge computes it.

`make test` runs a short form (three adapters, few layers); `make oracle` all of it.
"""

from __future__ import annotations

import hashlib
import json
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
from support import slices
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

    def only(self, kept: Sequence[int]) -> Models:
        """Some of the adapters, and the base model."""
        places = [*kept, len(self.files)]
        return Models(
            self.path,
            tuple(self.files[i] for i in kept),
            [self.prompts[i] for i in places],
            [self.expected[i] for i in places],
        )

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


class Peft:
    """Greedy tokens of peft's merges, kept between runs, since they cost minutes."""

    def __init__(self, cache: pytest.Cache) -> None:
        self._cache = cache

    def models(
        self, path: str, recipes: Sequence[made.Recipe], prompts: list[list[int]], folder: Path
    ) -> Models:
        """Adapters of a model by recipes, with a prompt for each and one for the base model."""
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        unchanged = [self._greedy(path, base, None, prompt, folder) for prompt in prompts]
        files, expected = [], []
        for i, recipe in enumerate(recipes):
            at = folder / str(i)
            made.make(base, recipe, at)
            files.append(AdapterFile(name=f"a{i}", path=str(at)))
            expected.append(self._greedy(path, base, recipe, prompts[i], at))
            assert expected[i] != unchanged[i], f"adapter {i} changes nothing"
        expected.append(unchanged[len(recipes)])
        return Models(path, tuple(files), prompts, expected)

    def _greedy(
        self,
        path: str,
        base: torch.nn.Module,
        recipe: made.Recipe | None,
        prompt: list[int],
        folder: Path,
    ) -> list[int]:
        import peft
        import transformers

        weights = (Path(path) / "model.safetensors").stat().st_size
        versions = (peft.__version__, transformers.__version__)
        question = json.dumps([repr(recipe), prompt, NEW_TOKENS, weights, versions])
        key = f"adapters/{hashlib.sha256(question.encode()).hexdigest()}"
        known = self._cache.get(key, None)
        if known is None:
            model = base if recipe is None else made.merged(base, folder)
            with torch.inference_mode():
                known, _ = greedy(logits_of(model), prompt, [0] * NEW_TOKENS)
            self._cache.set(key, known)
        return list(known)


@pytest.fixture(scope="session")
def peft_merges(pytestconfig: pytest.Config) -> Peft:
    assert pytestconfig.cache is not None
    return Peft(pytestconfig.cache)


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
    peft_merges: Peft,
    few_layers: str,
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Models:
    folder = tmp_path_factory.mktemp("adapters")
    return peft_merges.models(few_layers, made.DENSE[1:4], prompts[12:16], folder)


def sparse_prompts(count: int) -> list[list[int]]:
    return [[(7 * i + 11 * j) % 500 + 1 for j in range(20 + i)] for i in range(count)]


@pytest.fixture(scope="module")
def routed(peft_merges: Peft, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("routed")
    return peft_merges.models(str(TINY), made.ROUTED, sparse_prompts(5), folder)


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


@pytest.fixture(scope="module")
def nine(
    peft_merges: Peft,
    whole: str,
    prompts: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Models:
    """All of SmolLM2 with eight adapters."""
    folder = tmp_path_factory.mktemp("nine")
    return peft_merges.models(whole, made.DENSE, prompts[8:17], folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nine_models_in_one_batch(nine: Models, layout: dict[str, object]) -> None:
    check(nine, **layout)


@pytest.fixture(scope="module")
def nine_sparse(peft_merges: Peft, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A Llama 4 with eight adapters, of experts, router, embedding and head."""
    folder = tmp_path_factory.mktemp("sparse")
    return peft_merges.models(str(TINY), made.MIXED, sparse_prompts(9), folder)


SPARSE_LAYOUTS = {
    "one slice": {},
    "TP2 unequal": {"tp": 2, "tp_shares": (2.0, 1.0)},
    "PP2": {"pp": 2},
    "TP2xPP2": {"tp": 2, "pp": 2},
    "EP2": {"dp": 2},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
def test_nine_models_with_experts_in_one_batch(nine_sparse: Models, layout: str) -> None:
    """Adapters of routed experts need `dp` 1: EP2 serves the others."""
    chosen = nine_sparse
    if layout == "EP2":
        kept = [i for i, r in enumerate(made.MIXED) if "target_parameters" not in r.settings]
        chosen = nine_sparse.only(kept)
    check(chosen, num_local_blocks=512, **SPARSE_LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [made.DENSE[1], made.DENSE[2]], ids=["layers", "tables"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_quantized_base_is_as_near_as_its_merge_is(
    few_layers: str,
    prompts: list[list[int]],
    tmp_path: Path,
    recipe: made.Recipe,
    quantization: str,
) -> None:
    """The adapter over rounded weights errs no more than the merge does when it is rounded."""
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(few_layers, dtype=torch.float32)
    made.make(base, recipe, tmp_path / "adapter")
    made.merged(base, tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    config = Checkpoint.open(few_layers).config
    file = AdapterFile(name="a", path=str(tmp_path / "adapter"))
    group = GroupConfig(model_path=few_layers, dtype="float32", adapters=(file,))
    (adapter,) = open_adapters(group, config)
    prompt = prompts[16]
    exact = slices.logits_of(tmp_path / "merged", prompt, kernels="cpu")
    changed = exact - slices.logits_of(few_layers, prompt, kernels="cpu")
    of_merge = slices.logits_of(
        tmp_path / "merged", prompt, kernels="cpu", quantization=quantization
    )
    of_adapter = slices.logits_of(
        few_layers, prompt, kernels="cpu", quantization=quantization, adapter=adapter
    )
    rounding = (of_merge - exact).square().mean().sqrt()
    assert (of_adapter - exact).square().mean().sqrt() <= 1.2 * rounding
    assert changed.square().mean().sqrt() > 2 * rounding, "the bound says nothing"

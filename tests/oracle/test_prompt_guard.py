"""Prompt Guard 2's form: a tiny DeBERTa-v2 classifier, with texts longer than its context."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray
import torch
from ray import serve
from tokenizers import Tokenizer, models, pre_tokenizers

from arriero.cluster.replica import prompt_guard_service
from arriero.cluster.replica.prompt_guard import PromptGuard
from arriero.cluster.spec.safety import PromptGuardSpec
from arriero.router.guards.injections import InjectionGuard
from arriero.router.guards.verdict import GuardLost
from arriero.shards.errors import CheckpointError, Unavailable

WORDS = [f"w{number}" for number in range(60)]
CONTEXT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    path = tmp_path_factory.mktemp("prompt-guard")
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    wrapped.save_pretrained(path)
    torch.manual_seed(3)
    config = transformers.DebertaV2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=CONTEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        initializer_range=1.0,
        id2label={0: "benign", 1: "malicious"},
        label2id={"benign": 0, "malicious": 1},
    )
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(path)
    return path


def test_scores_are_the_models_own(folder: Path) -> None:
    import transformers

    guard = PromptGuard(str(folder), batch=2)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)

    def score(numbers: list[int]) -> float:
        ids = torch.tensor([[1, *(number + 4 for number in numbers), 2]])
        with torch.inference_mode():
            return float(model(input_ids=ids).logits.softmax(-1)[0, 1])

    short, other = list(range(5)), list(range(30, 40))
    texts = [" ".join(WORDS[number] for number in numbers) for numbers in (short, other)]
    assert guard.scores(texts) == pytest.approx([score(short), score(other)], abs=1e-4)
    # 60 tokens in windows of 30 with an overlap of 7: the worst window counts
    size = guard._size
    step = size - min(64, size // 4)
    starts = [*range(0, 60 - size, step), 60 - size]
    worst = max(score(list(range(start, start + size))) for start in starts)
    assert guard.scores([" ".join(WORDS)]) == pytest.approx([worst], abs=1e-4)


def test_no_classifier(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match=r"no classifier of prompts: no config\.json"):
            PromptGuard(str(path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no classifier of prompts"):
        PromptGuard(str(tmp_path))


def test_a_computation_ends_at_its_limit(folder: Path) -> None:
    with pytest.raises(Unavailable, match="too long"):
        PromptGuard(str(folder)).scores([" ".join(WORDS)], limit_s=0.0)


async def test_a_policy_asks_the_replicas(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's deployment of the classifier, in this process and without Ray."""
    monkeypatch.setattr(prompt_guard_service, "set_log_level", lambda *_: None)
    texts = [" ".join(WORDS[:5]), " ".join(WORDS), " ".join(WORDS[30:40])]
    scores = PromptGuard(str(folder)).scores(texts)
    spec = PromptGuardSpec(path=folder, replicas=2)
    built = prompt_guard_service.application(spec, "warning", "text", period_s=1.0)
    handle = await asyncio.to_thread(serve.run, built, _local_testing_mode=True)
    remote = prompt_guard_service.RemotePromptGuard(handle)
    assert await remote(texts, 60.0) == pytest.approx(scores, abs=1e-4)
    guard = InjectionGuard(remote)
    for change, flagged in ((-1e-3, True), (1e-3, False)):
        threshold = max(scores) + change
        verdict = await guard.judge(texts, tenant="a", threshold=threshold, timeout_s=60.0)
        assert verdict.flagged == flagged and verdict.score == pytest.approx(max(scores), abs=1e-4)

    async def at_once(texts: Sequence[str], timeout_s: float) -> Sequence[float]:
        return await remote(texts, 0.0)

    with pytest.raises(GuardLost, match="too long"):
        await InjectionGuard(at_once).judge(texts, tenant="a", threshold=0.5, timeout_s=60.0)
    assert not ray.is_initialized()

"""Sampling through the whole engine: a token depends on its own request alone."""

from __future__ import annotations

import pytest
import torch

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import running


@pytest.fixture(
    scope="module", params=["few_layers", pytest.param("whole", marks=pytest.mark.slow)]
)
def model_path(request: pytest.FixtureRequest) -> str:
    path: str = request.getfixturevalue(request.param)
    return path


def config(model_path: str, **more) -> GroupConfig:  # noqa: ANN003
    settings = {"num_blocks": 1024, "max_model_len": 1024, "max_sequences": 64} | more
    return GroupConfig(model_path=model_path, **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_seed_alone_and_in_a_batch(model_path, prompts, dtype) -> None:  # noqa: ANN001
    mine = SamplingParams(temperature=0.9, top_p=0.95, seed=1234, max_tokens=48, ignore_eos=True)
    others = [
        SamplingParams(temperature=0.5 + 0.02 * i, top_k=i, seed=i, max_tokens=48, ignore_eos=True)
        for i in range(32)
    ]
    with running(config(model_path, dtype=dtype, prefix_cache=False)) as group:
        alone = group.generate([prompts[12]], mine)[0]
        batch = group.generate([prompts[12], *prompts[:32]], [mine, *others])[0]
        again = group.generate([*prompts[:32], prompts[12]], [*others, mine])[-1]
    assert alone.tokens == batch.tokens == again.tokens
    assert len(set(alone.tokens)) > 5


def test_samples_share_the_prompt(model_path, prompts) -> None:  # noqa: ANN001
    params = SamplingParams(temperature=1.0, seed=7, n=4, max_tokens=16, ignore_eos=True)
    with running(config(model_path, dtype="float32")) as group:
        name = group.submit(prompts[20], params)
        group.wait([name])
        samples = [group.answers[name, i].tokens for i in range(4)]
        single = group.generate(
            [prompts[20]], SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True)
        )[0]
        assert samples[0] == single.tokens
        assert len({tuple(s) for s in samples}) == 4
        assert group.engine.stats().blocks_used == 0


def test_logprobs(model_path, prompts) -> None:  # noqa: ANN001
    """Of output and prompt tokens, against transformers."""
    import transformers

    prompt = prompts[15]
    params = SamplingParams(
        temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2, seed=0, ignore_eos=True
    )
    with running(config(model_path, dtype="float32", max_batch_tokens=64)) as group:
        answer = group.generate([prompt], params)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.tensor([prompt + answer.tokens])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    assert len(answer.prompt_logprobs) == len(prompt) - 1
    for i, one in enumerate(answer.prompt_logprobs):
        best = logprobs[i].topk(2)
        assert one.token == prompt[i + 1]
        assert one.logprob == pytest.approx(float(logprobs[i, one.token]), abs=2e-4)
        assert [t for t, _ in one.top] == best.indices.tolist()
    for i, one in enumerate(answer.logprobs):
        row = logprobs[len(prompt) - 1 + i]
        assert one.token == answer.tokens[i]
        assert one.logprob == pytest.approx(float(row[one.token]), abs=2e-4)
        assert [t for t, _ in one.top] == row.topk(3).indices.tolist()


def test_penalties_bias_and_stops(model_path, prompts) -> None:  # noqa: ANN001
    """Each against a straightforward loop over transformers' logits."""
    import transformers

    prompt = prompts[10]
    cases = [
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=24, seed=0),
        SamplingParams(
            temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5, max_tokens=24, seed=0
        ),
        SamplingParams(temperature=0.0, logit_bias={100: 50.0, 101: -5.0}, max_tokens=3, seed=0),
        SamplingParams(temperature=0.0, allowed_token_ids=(5, 6, 7, 500), max_tokens=6, seed=0),
        SamplingParams(temperature=0.0, banned_token_ids=(28, 198, 216), max_tokens=12, seed=0),
    ]
    with running(config(model_path, dtype="float32")) as group:
        answers = group.generate([prompt] * len(cases), cases)
        first = answers[0].tokens
        stopped = group.generate(
            [prompt],
            SamplingParams(
                temperature=0.0,
                repetition_penalty=1.3,
                stop_token_ids=(first[5],),
                max_tokens=24,
                seed=0,
            ),
        )[0]
        assert stopped.tokens == first[: first.index(first[5]) + 1]
        assert stopped.finish_reason == "stop"
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for params, answer in zip(cases, answers, strict=True):
        tokens: list[int] = []
        with torch.inference_mode():
            ids, cache = torch.tensor([prompt]), None
            for _ in range(len(answer.tokens)):
                got = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = got.past_key_values
                row = got.logits[0, -1]
                tokens.append(int(adjusted(row, prompt, tokens, params).argmax()))
                ids = torch.tensor([[tokens[-1]]])
        assert answer.tokens == tokens, params


def adjusted(row, prompt, tokens, params) -> torch.Tensor:  # noqa: ANN001
    for token, value in params.logit_bias.items():
        row[token] += value
    row[list(params.banned_token_ids)] = float("-inf")
    if params.allowed_token_ids is not None:
        allowed = torch.zeros_like(row, dtype=torch.bool)
        allowed[list(params.allowed_token_ids)] = True
        row = row.masked_fill(~allowed, float("-inf"))
    seen = torch.tensor(sorted(set(prompt) | set(tokens)))
    values = row[seen]
    row[seen] = torch.where(
        values > 0, values / params.repetition_penalty, values * params.repetition_penalty
    )
    for token in set(tokens):
        row[token] -= params.presence_penalty + params.frequency_penalty * tokens.count(token)
    return row


def test_nothing_left_to_sample_ends_that_request_alone(model_path, prompts) -> None:  # noqa: ANN001
    """Allowed tokens that `min_tokens` bans: an error for the one concerned, the group goes on."""
    doomed = SamplingParams(allowed_token_ids=(2,), min_tokens=3, max_tokens=5, seed=0)
    fine = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0)
    with running(config(model_path, dtype="bfloat16")) as group:
        names = [group.submit(prompts[3], doomed), group.submit(prompts[5], fine)]
        bad, good = group.wait(names)
        after = group.generate([prompts[5]], fine)[0]
    assert bad.finish_reason == "error" and "no token is left" in (bad.error or "")
    assert good.finish_reason == "length" and good.tokens == after.tokens

"""Images through the whole engine: transformers' own tokens, given the same pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import InvalidRequest
from arriero.shards.images.decode import ImageLimits, tiles_of
from arriero.shards.images.layout import ImageTokens, grid_of, image_tokens
from arriero.shards.images.request import RequestImage
from support.groups import Group, running
from support.models import IMAGE_TOKEN, tiny_llama4
from support.oracle import greedy

TILE, FEATURES, NEW = 56, 4, 60
IDS = ImageTokens(start=119, end=120, patch=IMAGE_TOKEN, image=122, column=123, row=124)
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, seed=0, logprobs=2)


def picture(seed: int, height: int, width: int) -> bytes:
    """Smooth colours, so that tiles differ."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def laid_out(data: bytes) -> tuple[list[int], RequestImage, torch.Tensor]:
    """An image's tokens, itself, and its tiles."""
    grid, tiles = tiles_of(data, TILE, ImageLimits())
    assert grid == grid_of(*Image.open(io.BytesIO(data)).size[::-1], TILE)
    tokens = image_tokens(grid, FEATURES, IDS)
    return tokens, RequestImage(data=data, num_features=grid.num_tiles * FEATURES), tiles


Case = tuple[list[int], tuple[RequestImage, ...], torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seeing")
    tiny_llama4(path, seed=2, sees=True, moe_step=2, qk_norm=False)
    return path


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """One tile; several; two images around text; the same text with another image."""
    text = [(5 * j + 1) % 110 for j in range(30)]
    one, many, other = (
        laid_out(picture(i, *size)) for i, size in enumerate(((40, 50), (100, 160), (40, 50)))
    )
    return [
        (text[:7] + one[0] + text[7:9], (one[1],), one[2]),
        (text + many[0] + text[:1], (many[1],), many[2]),
        (one[0] + text[:11] + many[0] + text[:3], (one[1], many[1]), torch.cat((one[2], many[2]))),
        (text[:7] + other[0] + text[7:9], (other[1],), other[2]),
    ]


@pytest.fixture(scope="module")
def expected(folder: Path, cases: list[Case]) -> list[tuple[list[int], list[float]]]:
    import transformers

    model = transformers.Llama4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with running(config(folder)) as group:
        names = [group.submit(prompt, PARAMS, images=images) for prompt, images, _ in cases]
        drafts = [answer.tokens for answer in group.wait(names)]
    out = []
    for (prompt, _, tiles), draft in zip(cases, drafts, strict=True):

        def logits_of(tokens: list[int], tiles: torch.Tensor = tiles) -> torch.Tensor:
            ids = torch.tensor([tokens])
            got: torch.Tensor = model(input_ids=ids, pixel_values=tiles, use_cache=False).logits[0]
            return got

        with torch.inference_mode():
            tokens, rows = greedy(logits_of, prompt, draft)
        assert len(tokens) == NEW
        out.append((tokens, rows.log_softmax(-1).amax(-1).tolist()))
    return out


def config(folder: Path, **more: int) -> GroupConfig:
    settings = {
        "num_blocks": 128,
        "num_local_blocks": 128,
        "block_size": 8,
        "max_batch_tokens": 24,
        "max_sequences": 8,
    }
    return GroupConfig(model_path=str(folder), dtype="float32", threads=1, **settings | more)


def check(group: Group, cases: list[Case], expected: list[tuple[list[int], list[float]]]) -> None:
    names = [group.submit(prompt, PARAMS, images=images) for prompt, images, _ in cases]
    for answer, (tokens, logprobs) in zip(group.wait(names), expected, strict=True):
        assert answer.error is None, answer.error
        assert answer.tokens == tokens
        assert [one.logprob for one in answer.logprobs] == pytest.approx(logprobs, abs=2e-4)


def test_one_slice(folder: Path, cases: list[Case], expected: list) -> None:  # type: ignore[type-arg]
    assert expected[0] != expected[3], "the image has no say"
    with running(config(folder)) as group:
        check(group, cases, expected)
        # a hit on the same image, none on another
        for prompt, images, _ in (cases[0], cases[3]):
            name = group.submit(prompt, PARAMS, images=images)
            assert group.wait([name])[0].num_cached == (len(prompt) - 1) // 8 * 8
        name = group.submit(cases[0][0], PARAMS, images=laid_out(picture(9, 40, 50))[1:2])
        assert group.wait([name])[0].num_cached == 8


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_several_slices(
    folder: Path,
    cases: list[Case],
    expected: list,  # type: ignore[type-arg]
    layout: dict[str, int],
) -> None:
    with running(config(folder, **layout)) as group:
        check(group, cases, expected)


def test_refusals(folder: Path, cases: list[Case]) -> None:
    prompt, images, _ = cases[0]
    with running(config(folder)) as group:
        for wrong, words in ((images * 2, "features"), (images * 9, "at most 8")):
            with pytest.raises(InvalidRequest, match=words):
                group.submit(prompt, PARAMS, images=wrong)

"""Images from clients to a tiny Llama 4 that reads them: over gRPC and HTTP, real sockets."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import matplotlib
import openai
import pytest
import pytest_asyncio
from PIL import Image
from tokenizers import Tokenizer

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.errors import InvalidRequest
from support.frontdoor import LLAMA3, LLAMA_SPECIALS, echo, make_card, make_tokenizer, serve
from support.fronted import Front
from support.seeing import picture, seeing_front, seeing_tokenizer

PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def asked(*images: bytes, text: str = "what is this") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"image": {"data": data}} for data in images]
    return [{"role": "user", "parts": [*parts, {"text": text}]}]


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def asked_http(*urls: str, text: str = "what is this") -> Any:  # noqa: ANN401
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return seeing_tokenizer()


@pytest_asyncio.fixture
async def served(tokenizer: Tokenizer, tmp_path: Path) -> AsyncIterator[Front]:
    async with seeing_front(tmp_path, tokenizer) as front:
        yield front


async def said(served: Front, *images: bytes, **more: object) -> tuple[list[int], pb.Usage]:
    tokens: list[int] = []
    usage = pb.Usage()
    fields = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True} | more
    async for message in served.client.chat(asked(*images), **fields):
        tokens += [token for output in message.outputs for token in output.token_ids]
        if message.HasField("usage"):
            usage = message.usage
    return tokens, usage


async def test_sizes_layouts_and_both_doors(served: Front) -> None:
    bare = (await said(served))[1].prompt_tokens
    photo = PHOTO.read_bytes()
    assert Image.open(io.BytesIO(photo)).size == (512, 600)
    for data, num_tokens in (
        (picture(336, 336), 147),
        (picture(337, 337), 727),
        (picture(500, 700, form="WEBP"), 1017),
        (picture(5000, 5000, form="JPEG"), 2467),
        (photo, 727),  # two by two tiles, and the whole
    ):
        tokens, usage = await said(served, data)
        assert usage.prompt_tokens - bare == num_tokens
        answer = await served.ask.chat.completions.create(
            model="tiny",
            messages=asked_http(data_url(data)),
            max_tokens=6,
            temperature=0,
            logprobs=True,
            extra_body={"ignore_eos": True},
        )
        counted: Any = answer.usage
        assert counted.prompt_tokens == usage.prompt_tokens
        assert counted.prompt_tokens_details.cached_tokens >= usage.prompt_tokens - 17
        again, _ = await said(served, data)
        assert again == tokens


async def test_the_prefix_cache_tells_images_apart(served: Front) -> None:
    one, other = picture(300, 300, 10), PHOTO.read_bytes()
    small = io.BytesIO()
    Image.open(io.BytesIO(other)).resize((300, 300)).save(small, "PNG")
    first, usage = await said(served, one)
    assert usage.cached_tokens == 0
    second, usage = await said(served, small.getvalue())
    assert usage.cached_tokens < 32  # what goes before the image
    assert first != second, "the image has no say"
    assert (await said(served, one))[1].cached_tokens > 128
    both = await said(served, one, other)
    assert both[1].prompt_tokens > 147 + 727


async def test_what_looks_like_an_image_stays_text(served: Front) -> None:
    text = "<|image|> <|image_start|><|patch|>"
    request = pb.TokenizeRequest(
        conversation=pb.Conversation(messages=[pb.Message(role="user", content=text)])
    )
    typed = await served.client.tokenize(request)
    request.conversation.messages[0].content = ""
    part = pb.ContentPart(image=pb.Image(data=picture(40, 40)))
    request.conversation.messages[0].parts.extend([part, pb.ContentPart(text=text)])
    given = await served.client.tokenize(request)
    assert len(given.token_ids) - len(typed.token_ids) == 147


async def test_refusals(served: Front) -> None:
    whole = picture(400, 400, form="JPEG")
    bomb = png_header(60_000, 60_000)
    for data, field, words in (
        (b"", "messages[0].parts[0].image", "no file"),
        (b"GIF89a" + bytes(99), "messages[0].parts[0].image", "send JPEG, PNG or WebP"),
        (bytes(20_000_001), "messages[0].parts[0].image", "20000000"),
        (bomb, "messages[0].parts[0].image", "pixels"),
        (png_header(8000, 8000), "messages[0].parts[0].image", "50000000"),
        (whole[: len(whole) // 2], "messages[0].parts[0].image", "cannot be decoded"),
        (png_header(300, 300), "messages[0].parts[0].image", "cannot be decoded"),
    ):
        with pytest.raises(InvalidRequest, match=words) as refused:
            await said(served, data)
        assert refused.value.field == field
    with pytest.raises(InvalidRequest, match="at most 8"):
        await said(served, *[picture(20, 20)] * 9)
    for url, words in (
        ("https://example.com/a.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,!!", "not base64"),
        (data_url(b"text"), "JPEG, PNG or WebP"),
    ):
        with pytest.raises(openai.BadRequestError, match=words) as wrong:
            await served.ask.chat.completions.create(model="tiny", messages=asked_http(url))
        assert str(wrong.value.param).startswith("messages[0].content[0].image_url")
    low: Any = asked_http(data_url(whole))
    low[0]["content"][0]["image_url"]["detail"] = "low"  # a hint; images are read in full
    assert (await served.ask.chat.completions.create(model="tiny", messages=low)).choices
    assert (await said(served, whole))[0]  # the group is well


async def test_a_model_without_sight_says_so() -> None:
    tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
    async with serve(make_card(tokenizer, LLAMA3), echo) as stack:
        with pytest.raises(InvalidRequest, match="reads no images"):
            async for _ in stack.client.chat(asked(picture(20, 20))):
                pass


def png_header(width: int, height: int) -> bytes:
    """A PNG file that promises so many pixels, and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(10)))
        + chunk(b"IEND", b"")
    )

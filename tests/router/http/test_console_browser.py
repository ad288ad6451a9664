"""The console in a headless Chromium: chats, hostile answers, images, the cluster, the keyboard."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.router.tenants.keys import add_key
from support.console import (
    CHROMIUM,
    NARROW,
    TOKEN,
    WIDE,
    MadeCluster,
    browser,
    open_page,
    says,
)
from support.frontdoor import Policy, Stack, endless, make_card, serve
from support.seeing import picture, seeing_front

if TYPE_CHECKING:
    from playwright.async_api import Browser

pytest.importorskip("playwright.async_api")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium"),
    pytest.mark.asyncio(loop_scope="module"),  # one browser for all tests
]

CHECKS = (Path(__file__).parents[2] / "support" / "page_checks.js").read_text()
HOSTILE = """<script>alert(1)</script>
<img src=x onerror="alert(2)"><svg onload=alert(3)></svg>
<iframe src="https://elsewhere.example/"></iframe><style>body{display:none}</style>
<a href="javascript:alert(4)">raw link</a>

[a script](javascript:alert(5)) [data](data:text/html,<script>alert(6)</script>)
[spelled](jAvAsCrIpT:alert(7)) [coded](&#106;avascript:alert(8)) [good](https://good.example/a)
![picture](https://elsewhere.example/pixel.png) ![x](x" onerror="alert(9))
<https://auto.example/> <math><mi//xlink:href="data:x,<script>alert(10)</script>">

| <img src=x onerror=alert(11)> | b |
|---|---|
| `<b onclick=alert(12)>` | <div style="position:fixed;inset:0">over</div> |
"""
CALL = '{"name": "weather", "parameters": {"place": "La Paz"}}'
TOOLS = json.dumps([{
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"place": {
        "type": "string"}}}},
}])  # fmt: skip
ANSWERS = {
    "": "The **quick** brown fox; así es la vida.\n\n```python\nprint('hello')\n```\n",
    "be hostile": HOSTILE,
    "the weather": CALL,
    "sunny and dry": "It is sunny in La Paz.",
}


@dataclass
class Served:
    """A gateway with a console."""

    stack: Stack
    origin: str
    cluster: MadeCluster
    tokenizer: Tokenizer

    @property
    def prompts(self) -> list[str]:
        return [
            self.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
            for request in self.stack.engine.submitted
        ]


def serving(tokenizer: Tokenizer, policy: Policy, *, keys: Path | None = None, step_s: float = 0):  # noqa: ANN201
    cluster = MadeCluster()
    config = GatewayConfig(http_address="127.0.0.1:0", console=True, keys=keys)
    card = make_card(
        tokenizer,
        templates.read("llama3.1"),
        max_model_len=4096,
        eos_token_ids=(1, tokenizer.token_to_id("<|eot_id|>")),
    )
    return cluster, serve(card, policy, config=config, read_cluster=cluster.read, step_s=step_s)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    async with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def talking(llama_tokenizer: Tokenizer) -> AsyncIterator[Served]:
    cluster, started = serving(llama_tokenizer, says(llama_tokenizer, ANSWERS))
    async with started as stack:
        origin = f"http://127.0.0.1:{stack.gateway.http_port}"
        yield Served(stack, origin, cluster, llama_tokenizer)


async def ask(page: Any, text: str) -> None:  # noqa: ANN401
    """Send a message and wait for the end of its answer."""
    await page.fill("#prompt", text)
    await page.keyboard.press("Enter")
    await page.get_by_role("button", name="Send", exact=True).wait_for()


async def faults(page: Any) -> list[str]:  # noqa: ANN401
    result = await page.evaluate(CHECKS)
    assert result["numTexts"] > 5
    return list(result["faults"])


async def test_a_chat_streams_edits_and_starts_again(talking: Served, running: Browser) -> None:
    async with open_page(running, talking.origin) as watched:
        page = watched.page
        await page.get_by_label("System prompt").fill("Speak of foxes.")
        await page.get_by_label("Temperature").fill("0.5")
        await page.get_by_label("Most tokens").fill("300")
        await page.get_by_label("Stop strings").fill("never said")
        await ask(page, "hello\nthere")
        answer = page.get_by_label("Answer of the model")
        assert await answer.locator("strong").inner_text() == "quick"
        assert await answer.locator("pre code").inner_text() == "print('hello')\n"
        facts = await answer.locator(".facts").inner_text()
        assert "tokens/s" in facts and "first after" in facts and "about" not in facts
        first = talking.stack.engine.submitted[0]
        assert (first.params.temperature, first.params.max_tokens) == (0.5, 300)
        assert "Speak of foxes." in talking.prompts[0] and "hello\nthere" in talking.prompts[0]
        await page.get_by_role("button", name="Regenerate").click()
        await page.get_by_role("button", name="Send", exact=True).wait_for()
        assert len(talking.prompts) == 2 and talking.prompts[0] == talking.prompts[1]
        await ask(page, "and then")
        assert "brown fox" in talking.prompts[2] and "and then" in talking.prompts[2]
        await page.get_by_role("button", name="Edit").first.click()
        assert await page.input_value("#prompt") == "hello\nthere"
        assert await answer.count() == 0
        await page.reload()  # settings stay in the tab
        assert await page.get_by_label("System prompt").input_value() == "Speak of foxes."
        watched.check()


async def test_escape_stops_an_answer(llama_tokenizer: Tokenizer, running: Browser) -> None:
    _, started = serving(llama_tokenizer, endless, step_s=0.02)
    async with started as stack:
        origin = f"http://127.0.0.1:{stack.gateway.http_port}"
        async with open_page(running, origin) as watched:
            page = watched.page
            for stop in ("Escape", "Stop"):
                await page.fill("#prompt", "go on")
                await page.keyboard.press("Enter")
                await page.wait_for_function(
                    "() => [...document.querySelectorAll('.text')].at(-1)?.innerText.length > 40"
                )
                if stop == "Escape":
                    await page.keyboard.press("Escape")
                else:
                    await page.get_by_role("button", name="Stop", exact=True).click()
                await page.get_by_role("button", name="Send", exact=True).wait_for()
            assert await page.get_by_text("stopped").count() == 2
            for _ in range(100):
                if len(stack.engine.cancelled) == 2:
                    break
                await page.wait_for_timeout(50)
            assert len(stack.engine.cancelled) == 2 and not stack.engine.running
            watched.check()


async def test_hostile_answers_do_nothing(talking: Served, running: Browser) -> None:
    async with open_page(running, talking.origin) as watched:
        page = watched.page
        await ask(page, "be hostile")
        box = page.locator(".assistant .text")
        inside = await box.evaluate(
            "box => [...box.querySelectorAll('*')].flatMap(element =>"
            " [element.tagName, ...[...element.attributes].map(({name}) => '@' + name)])"
        )
        tags = {name for name in inside if not name.startswith("@")}
        assert not tags & {"SCRIPT", "IMG", "SVG", "IFRAME", "STYLE", "DIV", "MATH", "B"}
        assert {name for name in inside if name.startswith("@")} <= {
            "@href", "@rel", "@target", "@tabindex", "@class",
        }  # fmt: skip
        links = await box.evaluate(
            "box => [...box.querySelectorAll('a[href]')].map(link => [link.href, link.rel])"
        )
        assert {href for href, _ in links} <= {
            "https://good.example/a", "https://auto.example/", "https://elsewhere.example/",
        }  # fmt: skip
        assert "https://good.example/a" in {href for href, _ in links}
        assert all("noopener" in rel for _, rel in links)
        assert "<script>alert(1)</script>" in await box.inner_text()  # shown as text
        for link in await box.locator("a:not([href])").all():
            await link.click()
        await page.wait_for_timeout(300)
        watched.check()


async def test_the_page_cannot_run_foreign_code(talking: Served, running: Browser) -> None:
    """The second wall: what the policy does where cleaning would fail."""
    async with open_page(running, talking.origin) as watched:
        page = watched.page
        await page.evaluate(
            """() => {
              for (const attempt of [
                () => { document.body.innerHTML += "<img src=x onerror=alert(1)>"; },
                () => eval("alert(2)"),
                () => {
                  const script = document.createElement("script");
                  script.textContent = "alert(3)";
                  document.body.append(script);
                },
                () => {
                  const image = new Image();
                  image.src = "https://elsewhere.example/p.png";
                },
                () => fetch("https://elsewhere.example/").catch(() => {}),
              ]) setTimeout(attempt); // outside of the driver's call, which may run `eval`
            }"""
        )
        await page.wait_for_timeout(300)
        assert watched.dialogs == [] and len(watched.errors) >= 5, watched


async def test_tool_calls_are_shown_and_answered(talking: Served, running: Browser) -> None:
    async with open_page(running, talking.origin) as watched:
        page = watched.page
        tools = page.get_by_label("Tools, a JSON list")
        await tools.fill("[{")
        assert "not JSON" in await page.get_by_role("alert").inner_text()
        await tools.fill(TOOLS)
        await ask(page, "the weather")
        call = page.get_by_label("Call of weather")
        assert json.loads(await call.locator("pre").inner_text()) == {"place": "La Paz"}
        await call.get_by_label("Answer of the tool").fill("sunny and dry")
        await page.get_by_role("button", name="Send the tools' answers").click()
        await page.get_by_text("It is sunny in La Paz.").wait_for()
        assert "sunny and dry" in talking.prompts[1]
        watched.check()


async def test_tokens_have_details(talking: Served, running: Browser) -> None:
    async with open_page(running, talking.origin) as watched:
        page = watched.page
        await page.get_by_label("Log-probabilities").check()
        await ask(page, "hello")
        await page.get_by_role("button", name="Tokens", exact=True).click()
        text = await page.locator(".tokens").evaluate(
            "box => [...box.querySelectorAll('.token')].map(token => token.textContent).join('')"
        )
        assert "así es la vida" in text.replace("·", "")
        await page.hover(".token[data-index='3']")
        assert "60.7 %" in await page.locator(".details").inner_text()
        await page.mouse.move(5, 5)
        assert await page.locator(".details").count() == 0
        await page.locator(".tokens").focus()
        await page.keyboard.press("ArrowRight")
        assert await page.locator(".token.current").get_attribute("data-index") == "1"
        watched.check()


async def test_keys_are_typed_and_stay_in_the_tab(
    llama_tokenizer: Tokenizer, running: Browser, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, "tenant", "")
    cluster, started = serving(llama_tokenizer, says(llama_tokenizer, ANSWERS), keys=keys)
    async with started as stack:
        origin = f"http://127.0.0.1:{stack.gateway.http_port}"
        async with open_page(running, origin) as watched:
            page = watched.page
            await page.get_by_role("button", name="Enter a key").click()
            await page.get_by_label("API key").fill(key)
            await page.get_by_label("Admin token").fill("wrong")
            await page.get_by_role("button", name="Save").click()
            await ask(page, "hello")
            assert await page.locator(".assistant strong").inner_text() == "quick"
            stored = await page.evaluate(
                "() => [JSON.stringify({...sessionStorage}), JSON.stringify({...localStorage}),"
                " document.cookie, location.href]"
            )
            assert key in stored[0] and key not in "".join(stored[1:])
            await page.get_by_role("link", name="Cluster").click()
            await page.get_by_text("needs an admin token").wait_for()
            assert cluster.num_reads == 0
            # refusals of calls, which the browser notes by itself
            assert all("401" in error for error in watched.errors)
            watched.errors.clear()
            await page.get_by_role("button", name="Change the admin token").click()
            await page.get_by_role("button", name="Forget both").click()
            kept = await page.evaluate("() => JSON.stringify({...sessionStorage})")
            assert key not in kept and "wrong" not in kept
            await page.get_by_text("The gateway is well").wait_for()
            assert watched.elsewhere == []


async def test_the_cluster_at_a_glance(talking: Served, running: Browser) -> None:
    async with open_page(running, talking.origin, "#cluster") as watched:
        page = watched.page
        await page.get_by_text("The gateway is well").wait_for()
        assert talking.cluster.num_reads == 0
        await page.get_by_role("button", name="Enter an admin token").click()
        await page.get_by_label("Admin token").fill(TOKEN)
        await page.get_by_role("button", name="Save").click()
        group = page.get_by_label("Group scout-0.1", exact=True)
        await group.wait_for()
        await page.wait_for_function(
            "() => /^[\\d,]+$/.test(document.querySelector('.tile dd').innerText)", timeout=20_000
        )
        words = await page.locator("main").inner_text()
        for word in ("KV in use", "50 %", "Prefix hits", "65 %", "signal 9", "served again after"):
            assert word in words
        for word in ("device", "host memory", "disk", "store", "4 slices", "68 %"):
            assert word in await group.inner_text()
        assert await page.locator(".uplot canvas").count() == 1
        experts = page.get_by_label("Map of the experts' tokens")
        await experts.focus()
        await page.keyboard.press("ArrowDown")
        assert "Layer 3, expert 0" in await page.locator(".under-map").inner_text()
        events = await page.locator(".events li").all_inner_texts()
        assert "1 to 2 groups" in events[0] and "by up" in events[0]
        watched.check()


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_everything_can_be_read(
    talking: Served, running: Browser, size: dict[str, int], scheme: str
) -> None:
    options = {"viewport": size, "color_scheme": scheme}
    async with open_page(running, talking.origin, **options) as watched:
        page = watched.page
        found = await faults(page)
        if await page.get_by_label("Log-probabilities").count() == 0:
            await page.get_by_role("button", name="Settings", exact=True).click()
        found += await faults(page)
        await page.get_by_label("Log-probabilities").check()
        await page.get_by_label("Tools, a JSON list").fill(TOOLS)
        await page.get_by_role("button", name="Close the settings").click()
        for text in ("be hostile", "the weather"):
            await ask(page, text)
            found += await faults(page)
        await page.get_by_role("button", name="Tokens", exact=True).first.click()
        found += await faults(page)
        await page.get_by_role("button", name="Access").click()
        found += await faults(page)
        await page.get_by_label("Admin token").fill(TOKEN)
        await page.get_by_role("button", name="Save").click()
        await page.get_by_role("link", name="Cluster").click()
        await page.locator(".group").first.wait_for()
        await page.get_by_text("Evidence").click()
        found += await faults(page)
        assert found == []
        watched.check()


async def test_the_keyboard_reaches_everything(talking: Served, running: Browser) -> None:
    async with open_page(running, talking.origin) as watched:
        page = watched.page
        await page.get_by_role("combobox").locator("option").first.wait_for(state="attached")
        assert await page.evaluate("() => document.activeElement.id") == "prompt"
        await page.keyboard.type("one")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("two")
        assert await page.input_value("#prompt") == "one\ntwo"
        await page.locator(".brand").focus()
        names, rings = [], []
        for key in ("Shift+Tab", *["Tab"] * 13):
            await page.keyboard.press(key)
            name, ring = await page.evaluate(
                """() => {
                  const element = document.activeElement;
                  const style = getComputedStyle(element);
                  const around = getComputedStyle(element.closest(".entry") ?? element);
                  const label = element.getAttribute("aria-label") || element.innerText
                    || element.labels?.[0]?.innerText || element.tagName;
                  return [label.trim().split("\\n")[0], style.outlineStyle !== "none"
                    && parseFloat(style.outlineWidth) >= 2 || around.boxShadow !== "none"];
                }"""
            )
            names.append(name)
            rings.append(ring)
        assert names[0] == "Skip to the content" and all(rings), (names, rings)
        for name in ("Chat", "Cluster", "Access", "Settings", "Messages", "Add images", "Message"):
            assert any(name in seen for seen in names), (name, names)
        await page.evaluate("() => document.activeElement.blur()")
        await page.get_by_role("link", name="Skip to the content").focus()
        await page.keyboard.press("Enter")
        assert await page.evaluate("() => document.activeElement.id") == "main"
        await page.get_by_role("button", name="Access").focus()
        await page.keyboard.press("Enter")
        await page.get_by_role("dialog").wait_for()
        await page.keyboard.press("Escape")
        assert await page.get_by_role("dialog").count() == 0
        theme = page.get_by_role("button", name="Theme: auto")
        await theme.press("Enter")
        assert await page.evaluate("() => document.documentElement.dataset.theme") == "light"
        watched.check()


async def test_an_image_goes_into_a_tiny_llama_4(running: Browser, tmp_path: Path) -> None:
    data = base64.b64encode(picture(336, 336)).decode()
    transfer = """data => {
      const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
      const files = new DataTransfer();
      files.items.add(new File([bytes], "blue.png", { type: "image/png" }));
      files.items.add(new File(["x"], "notes.txt", { type: "text/plain" }));
      return files;
    }"""
    async with (
        seeing_front(tmp_path, console=True) as front,
        open_page(running, front.url) as watched,
    ):
        page = watched.page
        await page.get_by_label("Most tokens").fill("4")
        dropped = await page.evaluate_handle(transfer, data)
        await page.dispatch_event("#prompt", "drop", {"dataTransfer": dropped})
        await page.get_by_alt_text("blue.png").wait_for()
        assert "notes.txt is no JPEG" in await page.get_by_role("alert").inner_text()
        await page.locator("input[type=file]").set_input_files(
            {"name": "second.png", "mimeType": "image/png", "buffer": picture(100, 100)}
        )
        await page.get_by_role("button", name="Remove second.png").click()
        await ask(page, "what is this")
        facts = await page.locator(".facts").inner_text()
        assert "4 tokens" in facts and "ended at the most tokens" in facts
        prompt = int(facts.partition("prompt ")[2].split(",")[0].split()[0])
        assert prompt > 147  # the tokens of an image of one tile
        assert await page.locator(".user img").count() == 1
        watched.check()

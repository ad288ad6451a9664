"""Pictures of the console for docs/console.md, and for eyes.

    python tests/router/http/console_pictures.py FOLDER

Needs Chromium and playwright. The model is scripted and the cluster is made up; sizes 1280 and 390
pixels wide, dark and light.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from support.console import NARROW, TOKEN, WIDE, MadeCluster, browser, open_page, says
from support.frontdoor import LLAMA_SPECIALS, make_card, make_tokenizer, serve

ANSWER = """A **KV cache** keeps the keys and values of all earlier tokens, so each step computes \
those of *one* new token:

| | without | with |
|---|---|---|
| work for token n | n² | n |
| memory | none | 2 · layers · heads · n |

```python
keys, values = cache[layer]
keys.append(project_k(x))
values.append(project_v(x))
```

1. Prefill fills the cache.
2. Decode reads it, and adds a row.
"""
QUESTION = "How does a KV cache make decoding fast?"


async def take(folder: Path) -> None:
    """Take all pictures."""
    tokenizer = make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>")
    card = make_card(
        tokenizer, templates.read("llama3.1"), model="Llama-3.1-8B-Instruct", max_model_len=8192
    )
    config = GatewayConfig(http_address="127.0.0.1:0", console=True)
    cluster, policy = MadeCluster(), says(tokenizer, {"": ANSWER})
    with tempfile.TemporaryDirectory() as profile:
        async with (
            serve(card, policy, step_s=0.002, config=config, read_cluster=cluster.read) as stack,
            browser(Path(profile)) as running,
        ):
            origin = f"http://127.0.0.1:{stack.gateway.http_port}"
            for size in (WIDE, NARROW):
                for scheme in ("light", "dark"):
                    name = f"{size['width']}-{scheme}.png"
                    options = {"viewport": size, "color_scheme": scheme}
                    async with open_page(running, origin, "#chat", **options) as watched:
                        page = watched.page
                        await page.wait_for_selector("option", state="attached")
                        await page.screenshot(path=folder / f"welcome-{name}")
                        await page.fill("#prompt", QUESTION)
                        await page.keyboard.press("Enter")
                        await page.get_by_role("button", name="Regenerate").wait_for(timeout=60_000)
                        await page.screenshot(path=folder / f"chat-{name}")
                        if size is NARROW:
                            await page.get_by_role("button", name="Settings", exact=True).click()
                        await page.get_by_label("Log-probabilities").check()
                        if size is NARROW:
                            await page.click("[aria-label='Close the settings']")
                        await page.get_by_role("button", name="Regenerate").click()
                        await page.get_by_role("button", name="Tokens", exact=True).click()
                        await page.get_by_role("button", name="Regenerate").wait_for(timeout=60_000)
                        await page.hover(".token[data-index='30']")
                        await page.screenshot(path=folder / f"tokens-{name}")
                        await page.get_by_role("button", name="Access").click()
                        await page.screenshot(path=folder / f"access-{name}")
                        await page.get_by_label("Admin token").fill(TOKEN)
                        await page.get_by_role("button", name="Save").click()
                        await page.get_by_role("link", name="Cluster").click()
                        await page.wait_for_selector(".group")
                        await page.wait_for_timeout(9000)
                        await page.screenshot(path=folder / f"cluster-{name}")
                        await page.set_viewport_size({**size, "height": 1180})
                        await page.screenshot(path=folder / f"cluster-tall-{name}")
                        print(name, watched.errors, watched.elsewhere)


if __name__ == "__main__":
    asyncio.run(take(Path(sys.argv[1])))

"""Takes the pictures of docs/page.md: `make screenshots`, with playwright and a chromium.

The page is the real one; the answers, figures and machines are scripted, so that the pictures are
the same each time.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.responses import Response

from tests.serving.browser_tab import END, Tab, frame, scripted, streamed
from tests.waiting import until

FOLDER = Path(__file__).parents[2] / "docs/page"
MOST_BYTES = 150_000
QUALITY = 82
DESKTOP = {"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 1.5}
IPAD = {"viewport": {"width": 820, "height": 1180}, "device_scale_factor": 1.5, "has_touch": True}
IPAD_WIDE = {**IPAD, "viewport": {"width": 1180, "height": 820}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}

ANSWER = """An all_reduce leaves every rank with the same sum. On a ring of `n`
ranks it takes two passes:

1. **reduce_scatter**: each rank sends one chunk to its neighbour and adds the one that it
   gets. After `n - 1` hops each rank has the whole sum of one chunk.
2. **all_gather**: the finished chunks travel round once more.

```python
def bytes_sent(size: int, ranks: int) -> float:
    \"\"\"Of each rank, whatever their number: less than twice the data.\"\"\"
    return 2 * size * (ranks - 1) / ranks
```

| ranks | hops | sent by each |
|---|---|---|
| 2 | 2 | 1.0 x size |
| 4 | 6 | 1.5 x size |
| 8 | 14 | 1.75 x size |

The slowest link sets the pace, so a ring suits machines on the same switch."""
SHORT = """A ring sends each gradient round the machines twice, in small pieces, so that no link
carries more than the others."""
LONGER = """Picture four people in a circle, each with one page of numbers. All add their page
to the one that comes from the left and hands it on. After three steps each page is a full sum
somewhere; after three more, everybody has a copy of all four."""
THOUGHTS = "They ask about all_reduce on a ring. Two phases; the count of bytes matters most."
QUESTION = "How does a ring all_reduce work, and how much does each machine send?"
TITLES = (
    "Rice, an onion and two eggs",
    "Regex for ISO dates",
    "Letter to the landlord",
    "Why is float16 training unstable?",
)


def words(text: str, every_s: float) -> list[bytes | float]:
    """The text, a word at a time."""
    parts: list[bytes | float] = []
    for at, word in enumerate(text.split(" ")):
        parts += [frame(word if at == 0 else f" {word}"), every_s]
    return parts


def usage(prompt: int, tokens: int) -> bytes:
    """The event of a whole answer's figures."""
    figures = {"prompt_tokens": prompt, "completion_tokens": tokens}
    return f"data: {json.dumps({'choices': [], 'usage': figures})}\n\n".encode()


def whole(text: str, every_s: float = 0.02, first_s: float = 0.2, tokens: int = 0) -> Response:
    """An answer that ends."""
    return streamed(
        first_s, *words(text, every_s), END[0], usage(38, tokens or len(text) // 4), END[1]
    )


def growing(text: str) -> Response:
    """An answer that thinks, begins, and then comes too slowly to end in the picture."""
    thoughts = frame(THOUGHTS, "reasoning_content")
    begun = " ".join(text.split(" ")[:88])
    return streamed(thoughts, 0.3, *words(begun, 0.03), *words(text[len(begun) :], 1.0))


def stage(rank: int, host: str, first: int, last: int, **figures: float) -> dict[str, Any]:
    """As /cluster says it."""
    return {
        "rank": rank, "host": host, "first_layer": first, "last_layer": last,
        "weight_bytes": 0.118e9 * (last - first + 1), "cache_bytes": 0.9e9, "memory_bytes": 5.6e9,
        "wait_s": 0, "tokens": 0, "sent_bytes": 0, "compute_s": 0.0, "network_s": 0.0, **figures,
    }  # fmt: skip


class Machines:
    """What /cluster says of machines that work: with each question a second has passed."""

    def __init__(self, *stages: dict[str, Any]) -> None:
        self._stages = stages
        self._seconds = 0

    def __call__(self) -> dict[str, Any]:
        self._seconds += 1
        spent = [(0.61, 0.2), (0.64, 0.18), (0.42, 0.24)]
        stages = [
            {
                **one,
                "compute_s": compute * self._seconds,
                "network_s": network * self._seconds,
                "sent_bytes": 310_000 * self._seconds,
            }
            for one, (compute, network) in zip(self._stages, spent, strict=False)
        ]
        return {
            "status": "ready", "reason": "", "running": 2, "waiting": 0, "cache_usage": 0.34,
            "generated_tokens": 21.4 * self._seconds, "stages": stages,
        }  # fmt: skip


THREE = (stage(0, "mini1", 0, 11), stage(1, "mini2", 12, 23), stage(2, "macbook", 24, 35))


def conversations() -> bytes:
    """An export of some that were there before."""
    listed = [
        {
            "id": f"{at:024x}", "title": title, "created": at, "changed": len(TITLES) - at,
            "system": "", "leaf": "a",
            "messages": [{"id": "a", "parent": None, "role": "user", "text": title, "created": at}],
        }
        for at, title in enumerate(TITLES)
    ]  # fmt: skip
    return json.dumps({"conversations": listed}).encode()


class Camera:
    """A browser that shows the page on several devices."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self._browser = browser
        self._folder = folder

    def shoot(
        self, name: str, url: str, device: dict[str, Any], scheme: str, pose: Callable[[Tab], None]
    ) -> None:
        """One picture."""
        context = self._browser.new_context(**device, color_scheme=scheme, reduced_motion="reduce")
        tab = Tab(context, url).open()
        file = {"name": "before.json", "mimeType": "application/json", "buffer": conversations()}
        tab.page.set_input_files("input[type=file]", file)
        tab.page.wait_for_selector(f".sidebar >> text={TITLES[0]}", state="attached")
        tab.page.wait_for_timeout(1500)  # it is stored
        tab.page.reload()
        tab.page.wait_for_selector(f".sidebar >> text={TITLES[0]}", state="attached")
        pose(tab)
        tab.page.wait_for_timeout(500)
        session = context.new_cdp_session(tab.page)
        shot = session.send("Page.captureScreenshot", {"format": "webp", "quality": QUALITY})
        data = base64.b64decode(shot["data"])
        (self._folder / f"{name}.webp").write_bytes(data)
        print(f"{name}.webp  {len(data) / 1000:.0f} kB")
        assert len(data) < MOST_BYTES, f"{name}.webp is too large for the repository"
        context.close()


def asked(tab: Tab) -> None:
    """A whole answer, seen from its question."""
    tab.ask(QUESTION)
    tab.page.evaluate("document.querySelector('.log').scrollTo(0, 0)")


def writing(tab: Tab) -> None:
    """An answer that comes."""
    tab.send(QUESTION)
    tab.page.wait_for_selector(".status.writing >> text=tokens/s", timeout=60_000)
    tab.page.wait_for_timeout(2500)


def machines_seen(tab: Tab) -> None:
    """The panel, with shares of the last second."""
    tab.ask(QUESTION)
    tab.page.click("button[aria-label=Machines]")
    tab.page.wait_for_timeout(2500)


def compared(tab: Tab) -> None:
    """Two replicas, both done."""
    tab.page.click("button[aria-label=Compare]")
    tab.page.wait_for_selector("option >> text=step 5000", state="attached")
    tab.page.fill(
        "textarea[aria-label='Question to both']", "Explain a ring all_reduce to a child."
    )
    tab.page.click("text=Ask both")
    until(lambda: tab.page.locator(".columns .answer[aria-busy=false]").count() == 2)


def main(folder: Path) -> None:
    """All pictures."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(exist_ok=True)
    name = {
        "model_name": "qwen3_4b",
        "max_sequence_length": 4096,
        "max_new_tokens": 1024,
        "history": "browser",
    }
    replicas = [{"rank": 0, "step": "1000"}, {"rank": 1, "step": "5000"}]
    both = Machines(stage(0, "mini1", 0, 35), stage(1, "mini2", 0, 35))
    with sync_playwright() as started:
        arguments = [
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
        ]
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        camera = Camera(browser, folder)
        with scripted(lambda _: whole(ANSWER, tokens=214), cluster=Machines(*THREE), **name) as (
            url,
            _,
        ):
            camera.shoot("desktop_light", url, DESKTOP, "light", asked)
            camera.shoot("ipad_wide_machines_light", url, IPAD_WIDE, "light", machines_seen)
            camera.shoot("phone_welcome_light", url, PHONE, "light", lambda tab: None)
        with scripted(lambda _: growing(ANSWER), cluster=Machines(*THREE), **name) as (url, _):
            camera.shoot("ipad_dark", url, IPAD, "dark", writing)
            camera.shoot("phone_dark", url, PHONE, "dark", writing)
        texts = (SHORT, LONGER)
        answers = lambda n: whole(texts[n % 2], 0.03 + 0.01 * (n % 2), 0.2)  # noqa: E731
        with scripted(answers, replicas, both, **{**name, "model_name": "my_notes"}) as (url, _):
            camera.shoot("desktop_compare_dark", url, DESKTOP, "dark", compared)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)

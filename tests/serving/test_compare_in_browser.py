"""One question to two servers or replicas, side by side, in a real Chromium."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from smolrun.serving.access import AccessPolicy
from tests.serving.browser_tab import END, Tab, frame, scripted, streamed
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import says, served
from tests.waiting import until

pytestmark = pytest.mark.soak


def ask_both(tab: Tab, text: str = "Hi") -> list[str]:
    """What both say."""
    tab.page.fill("textarea[aria-label='Question to both']", text)
    tab.page.click("text=Ask both")
    columns = tab.page.locator(".columns .answer[aria-busy=false]")
    until(lambda: columns.count() == 2)
    return [one.inner_text() for one in columns.locator(".prose").all()]


def test_two_servers_answer_side_by_side_and_nothing_is_kept(opened: Any, tmp_path: Path):
    with ExitStack() as closing:
        origins: list[str] = []
        policy = AccessPolicy(api_key="other", origins=origins)
        other = closing.enter_context(
            served(FakeEngine(says("Other"), step_s=0.01), tmp_path, policy)
        )
        one = closing.enter_context(
            served(FakeEngine(says("One"), step_s=0.01), tmp_path, compare_with=[other.url])
        )
        tab = opened(one.url)
        tab.page.click("button[aria-label=Compare]")
        tab.page.wait_for_selector(
            "text=serving.cors_origins lacks"
        )  # a policy of the other server
        tab.page.keyboard.press("Escape")
        origins.append(one.url)
        tab.page.click("button[aria-label=Compare]")
        tab.page.fill("input[aria-label^='API key of']", "other")
        tab.page.click("text=Unlock")
        tab.page.wait_for_selector("input[aria-label^='API key of']", state="detached")
        assert ask_both(tab) == ["One", "Other"]
        for status in tab.page.locator(".columns .status").all():
            assert "tokens/s" in status.inner_text() and "first after" in status.inner_text()
        assert [engine.submitted[0].prompt_ids for engine in (one.engine, other.engine)]
        tab.page.keyboard.press("Escape")
        assert tab.page.locator(".sidebar .title").count() == 0
        assert all(url.startswith(other.url) for url in tab.foreign)
        assert [one for one in tab.complaints if "CORS" not in one] == []


def test_stop_ends_both(opened: Any, tmp_path: Path):
    with ExitStack() as closing:
        origins: list[str] = []
        text = "word " * 150
        other = closing.enter_context(
            served(FakeEngine(says(text), step_s=0.05), tmp_path, AccessPolicy(origins=origins))
        )
        one = closing.enter_context(
            served(FakeEngine(says(text), step_s=0.05), tmp_path, compare_with=[other.url])
        )
        origins.append(one.url)
        tab = opened(one.url)
        tab.page.click("button[aria-label=Compare]")
        tab.page.fill("textarea[aria-label='Question to both']", "Hi")
        tab.page.click("text=Ask both")
        until(lambda: tab.page.locator(".columns .prose >> text=word").count() == 2)
        tab.page.keyboard.press("Escape")  # closed: nobody reads them
        until(lambda: one.is_at_rest() and other.is_at_rest())
        assert tab.complaints == []


def test_replicas_are_asked_by_their_rank(opened: Any):
    replicas = [{"rank": 0, "step": "100"}, {"rank": 1, "step": "200"}]
    answers = {0: streamed(frame("Old"), *END), 1: streamed(frame("New"), *END)}
    with scripted(lambda n: answers[n], replicas) as (url, asked):
        tab = opened(url)
        tab.page.click("button[aria-label=Compare]")
        tab.page.wait_for_selector("option >> text=step 200", state="attached")
        assert sorted(ask_both(tab)) == ["New", "Old"]
        assert sorted(one["worker_rank"] for one in asked) == [0, 1]
        tab.check()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_fit_for_a_phone_and_a_screen_reader(opened: Any, scheme: str):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    replicas = [{"rank": 0, "step": "100"}, {"rank": 1, "step": "200"}]
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with scripted(lambda n: streamed(frame("Yes"), *END), replicas) as (url, _):
        tab = opened(url, color_scheme=scheme, bypass_csp=True, **phone)
        tab.page.click("button[aria-label=Compare]")
        tab.page.wait_for_selector("option >> text=step 200", state="attached")
        ask_both(tab)
        found = axe.run(tab.page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        sheet = tab.page.locator("dialog")
        assert sheet.evaluate("one => one.scrollWidth") <= 360
        for target in sheet.locator("button, select").all():
            box = target.bounding_box()
            assert box is not None and min(box["width"], box["height"]) >= 43.9


def test_one_server_with_one_replica_has_nothing_to_compare(opened: Any):
    with scripted(lambda n: streamed(frame("Yes"), *END)) as (url, _):
        assert opened(url).page.locator("button[aria-label=Compare]").count() == 0

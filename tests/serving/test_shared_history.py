"""serving.history=server in a real Chromium: every device shows the conversations of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolrun.serving import conversations
from smolrun.serving.access import AccessPolicy
from tests.serving.browser_tab import Tab
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, says, served
from tests.waiting import until

pytestmark = pytest.mark.soak

TITLES = ".sidebar .title"


@pytest.fixture
def shared(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Served]:
    def start(text: str = "Hello", policy: AccessPolicy | None = None, **engine: Any) -> Served:
        context = served(
            FakeEngine(says(text), **engine), tmp_path, policy, history=tmp_path / "history"
        )
        server = context.__enter__()
        request.addfinalizer(lambda: context.__exit__(None, None, None))
        return server

    return start


def look(tab: Tab) -> None:
    """As when a person comes back to the page: it asks the server at once."""
    tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def shows(tab: Tab, *titles: str) -> None:
    def are_there() -> bool:
        look(tab)
        return tab.page.locator(TITLES).all_inner_texts() == [*titles]

    until(are_there)


def choose(tab: Tab, title: str) -> None:
    tab.page.click(f"{TITLES} >> text={title}")


def rename(tab: Tab, title: str) -> None:
    """The conversation that is shown."""
    tab.page.hover(".sidebar li.shown")
    tab.page.click(".shown button[aria-label^=Rename]")
    tab.page.fill("input[aria-label=Name]", title)
    tab.page.keyboard.press("Enter")


def is_kept(server: Served, title: str) -> bool:
    ids = [one["id"] for one in server.client.get("/v1/conversations").json()["data"]]
    kept = [server.client.get(f"/v1/conversations/{id}").json() for id in ids]
    return any(
        one["title"] == title and all(m.get("end") for m in one["messages"][1::2]) for one in kept
    )


def test_two_devices_have_the_same_conversations(shared, opened):
    server = shared()
    macbook, ipad = opened(server.url), opened(server.url)
    macbook.ask("From the MacBook")
    shows(ipad, "From the MacBook")
    choose(ipad, "From the MacBook")
    ipad.says("Hello")
    ipad.ask("And from the iPad")
    look(macbook)
    until(lambda: (look(macbook), macbook.page.locator(".bubble").count() == 2)[1])
    assert macbook.page.locator(".bubble").last.inner_text() == "And from the iPad"
    rename(macbook, "Ours")
    shows(ipad, "Ours")
    ipad.page.on("dialog", lambda dialog: dialog.accept())
    ipad.page.hover(".sidebar li")
    ipad.page.click("button[aria-label^=Delete]")
    shows(macbook)
    assert server.client.get("/v1/conversations").json()["data"] == []
    macbook.check()


def test_a_link_to_a_conversation_opens_it_on_a_device_that_did_not_have_it(shared, opened):
    server = shared()
    one = opened(server.url)
    one.ask("Look here")
    until(lambda: is_kept(server, "Look here"))
    other = Tab(opened(server.url).page.context, server.url)
    other.page.goto(one.page.url)
    other.says("Hello")


def test_what_two_devices_add_to_the_same_conversation_is_all_there(shared, opened):
    server = shared()
    one, other = opened(server.url), opened(server.url)
    one.ask("Base")
    shows(other, "Base")
    choose(other, "Base")
    other.says("Hello")
    other.page.context.set_offline(True)
    until(lambda: is_kept(server, "Base"))
    rename(other, "Renamed without network")
    one.ask("More")
    until(lambda: is_kept(server, "Base"))
    other.page.context.set_offline(False)
    for tab in (one, other):
        shows(tab, "Renamed without network")
        until(lambda tab=tab: (look(tab), tab.page.locator(".bubble").count() == 2)[1])
    one.check()


def test_what_is_deleted_without_network_is_deleted_later(shared, opened):
    server = shared()
    tab = opened(server.url)
    tab.ask("Gone")
    until(lambda: is_kept(server, "Gone"))
    tab.page.context.set_offline(True)
    tab.page.on("dialog", lambda dialog: dialog.accept())
    tab.page.hover(".sidebar li")
    tab.page.click("button[aria-label^=Delete]")
    tab.page.context.set_offline(False)
    until(lambda: (look(tab), server.client.get("/v1/conversations").json()["data"] == [])[1])
    shows(tab)


def test_an_answer_that_comes_is_seen_on_the_other_device_and_not_taken_from_it(shared, opened):
    text = " ".join(f"word{number}" for number in range(120))
    server = shared(text, step_s=0.05, max_sequence_length=8192)
    one, other = opened(server.url), opened(server.url)
    one.send("Slow")
    shows(other, "Slow")
    choose(other, "Slow")
    other.page.wait_for_selector("text=another tab or device")
    until(lambda: (look(other), "word" in other.answer())[1])
    before = len(other.answer())
    until(lambda: (look(one), look(other), len(other.answer()) > before)[2])
    assert "\nsmolrun_streams_resumed_total 0.0\n" in server.client.get("/metrics").text
    server.engine.step_s = 0.0
    assert one.whole() == text
    until(lambda: (look(other), other.answer() == text)[1])
    assert len(server.engine.submitted) == 1
    one.check()
    other.check()


def test_an_answer_whose_device_is_gone_is_read_on_by_the_other_one(shared, opened):
    text = " ".join(f"word{number}" for number in range(120))
    server = shared(text, step_s=0.05, max_sequence_length=8192)
    one, other = opened(server.url), opened(server.url)
    one.send("Slow")
    until(lambda: "word2" in one.answer())
    shows(other, "Slow")
    choose(other, "Slow")
    one.page.context.close()
    other.page.wait_for_selector("button[aria-label=Stop]", timeout=60_000)
    server.engine.step_s = 0.0
    assert other.whole() == text
    assert len(server.engine.submitted) == 1 and server.engine.cancelled == []


def test_a_server_that_cannot_keep_more_is_shown_and_answers_come(shared, opened, monkeypatch):
    monkeypatch.setattr(conversations, "_MOST", 1)
    server = shared()
    tab = opened(server.url)
    tab.ask("First")
    until(lambda: is_kept(server, "First"))
    tab.page.click("text=New conversation")
    assert tab.ask("Second") == "Hello"
    tab.page.wait_for_selector(".sidebar .refusal >> text=delete some")
    tab.page.reload()
    shows(tab, "Second", "First")
    tab.page.wait_for_selector(".sidebar .refusal >> text=delete some")
    tab.page.on("dialog", lambda dialog: dialog.accept())
    tab.page.hover(".sidebar li:nth-child(2)")
    tab.page.click("button[aria-label^=Delete]:visible >> nth=-1")
    until(lambda: (look(tab), is_kept(server, "Second"))[1])
    until(lambda: tab.page.locator(".sidebar .refusal").count() == 0)


def test_a_folder_that_is_forbidden_is_shown(shared, opened, tmp_path: Path):
    (tmp_path / "history").write_text("a file is in its place")
    tab = opened(shared().url)
    assert tab.ask() == "Hello"
    tab.page.wait_for_selector(".sidebar .refusal >> text=cannot keep or read")


def test_a_wrong_key_shows_nothing_and_is_asked_for(shared, opened):
    server = shared(policy=AccessPolicy(api_key="right"))
    with_key = opened(f"{server.url}/#key=right")
    with_key.ask("Secret")
    tab = opened(f"{server.url}/#key=wrong")
    tab.page.wait_for_selector("input[type=password]")
    assert tab.page.locator(TITLES).count() == 0
    tab.page.fill("input[type=password]", "right")
    tab.page.click("text=Unlock")
    shows(tab, "Secret")


def test_hostile_conversations_of_another_device_do_nothing(shared, opened):
    server = shared()
    ids = [f"{number:024x}" for number in range(6)]
    text = "<img src=x onerror=alert(1)>"
    message = {"id": text, "parent": None, "role": "user", "text": text}
    answer = {"id": "b", "parent": text, "role": "assistant", "text": "[a](javascript:alert(1))"}
    hostile: list[dict[str, Any]] = [
        {
            "title": text,
            "messages": [message, {**answer, "error": text, "end": "failed"}],
            "leaf": "b",
        },
        {
            "title": "loop",
            "messages": [
                {**message, "id": "x", "parent": "y"},
                {**message, "id": "y", "parent": "x"},
            ],
        },
        {"title": "types", "messages": [{"id": 5}], "leaf": {}},
        {
            "title": "figures",
            "messages": [
                message,
                {**answer, "figures": {"tokens": 5, "firstTokenSeconds": []}, "ranks": {}},
            ],
        },
        {"title": "proto", "__proto__": {"x": 1}, "constructor": 5, "messages": []},
        {
            "title": "open",
            "messages": [message, {**answer, "stream": "../../v1/models", "seen": "x"}],
        },
    ]
    for id, one in zip(ids, hostile, strict=True):
        body = json.dumps({"id": id, **one}).encode()
        assert server.client.put(f"/v1/conversations/{id}", content=body).status_code == 200
    tab = opened(server.url)
    until(lambda: (look(tab), tab.page.locator(TITLES).count() >= 5)[1])
    for title in ("loop", "figures", "proto", "open"):
        choose(tab, title)
        assert tab.page.locator("textarea[aria-label=Message]").is_visible()
    tab.page.click("text=New conversation")
    assert tab.ask("Still well") == "Hello"
    tab.check()


def test_a_browser_without_storage_still_has_them(shared, opened):
    script = "Object.defineProperty(window, 'indexedDB', {get() {throw new DOMException('no')}})"
    server = shared()
    opened(server.url).ask("Kept")
    until(lambda: is_kept(server, "Kept"))
    tab = opened(server.url, script=script)
    shows(tab, "Kept")
    assert tab.page.locator(".sidebar .refusal").count() == 0

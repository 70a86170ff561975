"""The page in a real Chromium whose connection is lost, which is loaded again, or open twice: each
answer comes once and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.browser_tab import END, Tab, broken, frame, scripted, streamed
from tests.serving.server import Served
from tests.tasks.served import model_in, serving
from tests.waiting import until

pytestmark = pytest.mark.soak

TEXT = " ".join(f"word{number}" for number in range(120))
STATUS = ".status >> nth=-1"


def begin(serve: Any, opened: Any) -> tuple[Served, Tab]:
    """A slow answer that has begun."""
    server = serve(TEXT, step_s=0.05, max_sequence_length=4096)
    tab = opened(server.url)
    tab.send()
    until(lambda: "word2" in tab.answer())
    return server, tab


def ends(server: Served, tab: Tab) -> None:
    """From now on the engine takes no time; one request was all that it took."""
    server.engine.step_s = 0.0
    assert tab.whole() == TEXT
    assert len(server.engine.submitted) == 1 and server.engine.cancelled == []
    assert "tokens" in tab.page.locator(STATUS).inner_text()
    tab.page.reload()
    tab.page.wait_for_selector(".answer")
    assert tab.answer() == TEXT
    tab.check()


def lose_network(server: Served, tab: Tab) -> None:
    tab.page.context.set_offline(True)
    # Chromium keeps open connections; the server's end is what breaks.
    for connection in list(server.server._server.server_state.connections):
        server.server._loop.call_soon_threadsafe(connection.transport.abort)


def test_a_page_that_is_loaded_again_shows_the_same_answer_to_its_end(serve, opened):
    server, tab = begin(serve, opened)
    for _ in range(3):
        tab.page.reload()
        tab.page.wait_for_selector(".answer .prose")
        before = len(tab.answer())
        until(lambda before=before: len(tab.answer()) > before)
    ends(server, tab)


def test_an_answer_that_ended_while_the_page_was_away_is_fetched(serve, opened):
    server, tab = begin(serve, opened)
    tab.page.goto("about:blank")
    server.engine.step_s = 0.0
    until(server.is_at_rest)
    tab.page.goto(server.url)
    tab.page.click(".sidebar >> text=Hi")
    ends(server, tab)


def test_a_device_without_network_for_a_while_gets_the_rest(serve, opened):
    server, tab = begin(serve, opened)
    lose_network(server, tab)
    tab.page.wait_for_selector(".status.reconnecting")
    assert "reconnecting" in tab.page.locator(STATUS).inner_text()
    before, text = server.engine.generated, tab.answer()
    until(lambda: server.engine.generated > before + 20)
    assert tab.answer() == text
    tab.page.context.set_offline(False)
    ends(server, tab)


def test_a_device_without_network_for_too_long_is_told_and_can_continue(serve, opened):
    server, tab = begin(serve, opened)
    tab.page.clock.install()
    tab.page.reload()
    until(lambda: (tab.page.clock.run_for(500), len(tab.answer()) > 30)[1])
    lose_network(server, tab)
    until(lambda: (tab.page.clock.run_for(500), tab.page.locator(".reconnecting").count())[1] > 0)
    tab.page.clock.fast_forward(100_000)
    assert tab.page.locator(".reconnecting").count() == 1
    tab.page.clock.fast_forward(25_000)
    until(lambda: (tab.page.clock.run_for(500), tab.page.locator(".failure").count())[1] > 0)
    assert "connection" in tab.page.locator(".failure").inner_text()
    assert tab.page.locator("button >> text=Continue").is_enabled()
    assert tab.answer().startswith("word0 word1")


def test_a_connection_that_is_silent_for_long_is_replaced(serve, opened):
    """As after a locked screen: nothing says that it is dead."""
    server, tab = begin(serve, opened)
    tab.page.clock.install()
    tab.page.reload()
    until(lambda: (tab.page.clock.run_for(500), len(tab.answer()) > 30)[1])
    server.engine.step_s = 1.0
    text = "smolrun_streams_resumed_total "
    before = server.client.get("/metrics").text.partition(f"\n{text}")[2].split()[0]
    tab.page.clock.fast_forward(25_000)
    until(
        lambda: (
            tab.page.clock.run_for(500),
            f"\n{text}{float(before) + 1}\n" in server.client.get("/metrics").text,
        )[1]
    )
    server.engine.step_s = 0.0
    until(lambda: (tab.page.clock.run_for(500), tab.answer() == TEXT)[1])


def test_stop_after_a_reload_frees_the_slot(serve, opened):
    server, tab = begin(serve, opened)
    tab.page.reload()
    tab.page.click("button[aria-label=Stop]")
    until(server.is_at_rest)
    assert tab.whole().startswith("word0 word1")
    assert "stopped" in tab.page.locator(STATUS).inner_text()
    assert "\nsmolrun_streams_kept 0.0\n" in server.client.get("/metrics").text


def test_an_answer_that_is_no_longer_kept_can_be_continued(opened):
    half = broken(frame("Half an"))
    half.headers["x-smolrun-stream"] = "any"
    answers = [half, streamed(frame(" answer"), *END)]
    with scripted(lambda n: answers[n]) as (url, asked):
        tab = opened(url)
        assert tab.ask() == "Half an"
        assert tab.page.locator(".failure").is_visible()
        tab.page.click("text=Continue")
        tab.says("Half an answer")
        assert asked[1]["continue_final_message"] is True


def test_a_second_tab_follows_and_takes_over_when_the_first_is_closed(serve, opened):
    server, one = begin(serve, opened)
    two = opened(server.url, beside=one)
    two.page.click(".sidebar >> text=Hi")
    until(lambda: "another tab" in two.page.locator(STATUS).inner_text())
    before = len(two.answer())
    until(lambda: len(two.answer()) > before)
    assert "\nsmolrun_streams_resumed_total 0.0\n" in server.client.get("/metrics").text
    one.page.close()
    two.page.wait_for_selector("button[aria-label=Stop]")
    ends(server, two)


def test_a_tab_whose_answer_another_client_took_gets_the_rest_in_the_end(serve, opened):
    server, tab = begin(serve, opened)
    id = next(iter(_streams(tab)))
    with server.client.stream("GET", f"/v1/streams/{id}") as answer:
        server.engine.step_s = 0.0
        assert b"[DONE]" in answer.read()
    assert tab.whole() == TEXT


def _streams(tab: Tab) -> list[str]:
    """The ids that the page keeps in IndexedDB."""
    return tab.page.evaluate(
        """() => new Promise(resolve => {
            indexedDB.open("smolrun").onsuccess = event => {
                const all = event.target.result.transaction("conversations")
                    .objectStore("conversations").getAll()
                all.onsuccess = () => resolve(all.result.flatMap(one => one.messages)
                    .flatMap(one => one.stream ? [one.stream] : []))
            }
        })"""
    )


def test_what_an_answer_waits_for_is_shown(opened):
    parts = [b": queued 2\n\n", 1.0, b": queued 0\n\n", 1.0, b": loading the model\n\n", 1.0]
    with scripted(lambda n: streamed(*parts, frame("Yes"), *END)) as (url, _):
        tab = opened(url)
        tab.send()
        for words in ("queued, 2 before you", "queued, you are next", "loading the model"):
            tab.page.wait_for_selector(f".status >> text={words}")
        assert tab.whole() == "Yes"


def test_a_real_model_is_resumed(opened, tmp_path: Path):
    """Greedy text of a whole server with a model, beside a page that was loaded again."""
    words = ["model=hf", f"model.name={model_in(tmp_path / 'tiny')}", "cluster.ranks=1"]
    with serving(tmp_path, *words, "serving.port=0", "serving.temperature=0") as server:
        tab = opened(server.url)
        tab.send("Tell me")
        for _ in range(2):
            tab.page.wait_for_selector(".answer .prose")
            tab.page.reload()
        tab.page.wait_for_selector(".answer[aria-busy=false] .actions", timeout=60_000)
        body = {"messages": [{"role": "user", "content": "Tell me"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        whole = answer.json()["choices"][0]["message"]["content"]
        stored = tab.page.evaluate(
            """() => new Promise(resolve => {
                indexedDB.open("smolrun").onsuccess = event => {
                    event.target.result.transaction("conversations").objectStore("conversations")
                        .getAll().onsuccess = all => resolve(all.target.result[0].messages[1].text)
                }
            })"""
        )
        assert stored == whole and len(whole) > 100

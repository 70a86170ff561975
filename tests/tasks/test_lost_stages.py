"""Stages of a server that are lost at awkward times, with real processes: while they load, while
they read a prompt, two at a time, and for good. What a client sees is the whole answer, or an error
event that says why there is none."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.tasks.background import process_of
from tests.tasks.served import LONG, START_S, Server, model_in, serving
from tests.tasks.test_serve import choice, rank_up, stage_rows
from tests.waiting import until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]

# A draw for every place, so that a wrong token changes all that follow.
DRAWN = {"temperature": 1.0, "seed": 5, "max_tokens": 300}
PROMPT = "Lorem ipsum dolor sit amet. " * 250  # 7,000 tokens of the tiny model, 110 batches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_in(tmp_path_factory.mktemp("models") / "tiny")


def pipeline(model: Path, ranks: int, *overrides: str) -> list[str]:
    keys = ["serving=pipeline", "serving.hosts=all", "serving.slots=2", "mesh.liveness=fast"]
    return [*choice(model), *keys, f"cluster.ranks={ranks}", *overrides]


def answer(
    server: Server, on_line: Callable[[str], None] = lambda _: None, **fields: Any
) -> list[str]:
    """The lines of a streamed answer to its end, each given to `on_line` when it comes."""
    body = server.body(**LONG | DRAWN | fields)
    lines: list[str] = []
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body, timeout=START_S
    ) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            lines.append(line)
            on_line(line)
    assert "data: [DONE]" in lines or "error" in events_of(lines)[-1], lines[-3:]
    return lines


def events_of(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line[:7] == "data: {"]


def text_of(lines: list[str]) -> str:
    """Of a whole answer."""
    events = events_of(lines)
    assert "error" not in events[-1], events[-1]
    return "".join(
        choice["delta"].get("content", "") for event in events for choice in event["choices"]
    )


def until_whole(server: Server, ranks: int) -> None:
    """All stages serve again."""

    def is_whole() -> bool:
        is_ready = httpx.get(f"{server.url}/readyz").status_code == 200
        return is_ready and len(stage_rows(server.url)) == ranks

    until(is_whole, START_S)


class Kill:
    """Kills these ranks, one each time that a line begins so."""

    def __init__(self, server: Server, *plan: tuple[str, int]) -> None:
        self._server, self._plan = server, list(plan)

    def __call__(self, line: str) -> None:
        if self._plan and line.startswith(self._plan[0][0]):
            _, rank = self._plan.pop(0)
            self._server.worker(rank).kill()

    def is_done(self) -> bool:
        return not self._plan


def kill_when_linked(outputs: Path, rank: int) -> None:
    """As soon as it has links; before it has measured or loaded anything."""

    def is_linked() -> bool:
        return any("links up" in log.read_text() for log in outputs.glob(f"2*/logs/rank{rank}-*"))

    until(is_linked, START_S)
    process_of(rank, max(outputs.glob("2*"))).kill()


def test_a_stage_lost_before_it_has_loaded_delays_the_start(tmp_path: Path, model: Path) -> None:
    kill = threading.Thread(target=kill_when_linked, args=(tmp_path / "outputs", 1), daemon=True)
    kill.start()
    with serving(tmp_path, *pipeline(model, 3)) as server:
        kill.join(START_S)
        until_whole(server, 3)
        assert len(text_of(answer(server))) > 100


def test_a_stage_lost_while_it_reads_a_prompt(tmp_path: Path, model: Path) -> None:
    short = ["serving.prefill_chunk=64", "serving.prefix_reuse=false", "serving.context=8192"]
    with serving(tmp_path, *pipeline(model, 3, *short)) as server:
        asked = {"messages": [{"role": "user", "content": PROMPT}]}
        undisturbed = answer(server, **asked)
        for rank in (1, 2):
            kill = Kill(server, (": prefill", rank))
            lines = answer(server, kill, **asked)
            assert kill.is_done()
            assert text_of(lines) == text_of(undisturbed)
            comments = [line.split()[1] for line in lines if line.startswith(":")]
            assert comments[-1] == "prefill" and "recovering" in comments, "it was in the prompt"
            until_whole(server, 3)


@pytest.mark.parametrize("ranks", [(3, 2), (1, 3), (1, 1)])
def test_stages_lost_while_others_take_over(
    tmp_path: Path, model: Path, ranks: tuple[int, int]
) -> None:
    """The second one when the client learns of the first, or when that one is back."""
    first, second = ranks
    with serving(tmp_path, *pipeline(model, 4)) as server:
        undisturbed = text_of(answer(server))
        if first != second:
            kill = Kill(server, ("data: {", first), (": recovering", second))
        else:
            kill = Kill(server, ("data: {", first))
        text = text_of(answer(server, kill))
        assert kill.is_done()
        assert text == undisturbed
        if first == second:  # it is about to join, or has just joined
            until(lambda: is_back(server, first), START_S)
            server.worker(second).kill()
        assert text_of(answer_at_last(server)) == undisturbed
        until_whole(server, 4)
        assert text_of(answer(server)) == undisturbed


def is_back(server: Server, rank: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return server.worker(rank).is_running()
    return False


def answer_at_last(server: Server) -> list[str]:
    """Of a server that may not take requests just now."""
    until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200, START_S)
    return answer(server)


def test_a_model_that_fits_on_no_hosts_that_are_left_ends_answers_with_an_error(
    tmp_path: Path, model: Path
) -> None:
    """Each of two hosts has room for the cache of three of four layers."""
    hosts = "cluster.hosts=[{name: one, memory_gb: 1}, {name: two, memory_gb: 1}]"
    sizes = ["serving.slots=240", "serving.context=8192"]
    keys = [key for key in pipeline(model, 2) if key not in ("cluster.ranks=2", "serving.slots=2")]
    with serving(tmp_path, *keys, *sizes, hosts) as server:
        began = time.monotonic()
        lines = answer(server, Kill(server, ("data: {", 1)), max_tokens=8000)
        assert time.monotonic() - began < START_S
        error = events_of(lines)[-1].get("error", {})
        assert "does not fit" in error.get("message", ""), lines[-5:]
        code, out, err = server.end()
        assert code == 3
        assert "without rank 1 on two the model would not fit on the others" in out + err
        assert "does not fit" in err
        until(server.is_gone)


@pytest.mark.timeout(1800)
def test_short_requests_while_replicas_are_killed(tmp_path: Path, model: Path) -> None:
    """10,000 requests, 20 kills, and every request gets the text of its seed."""
    total, kills, seeds = 10_000, 20, 8
    counts: Counter[str] = Counter()
    counting = threading.Lock()
    up = {str(rank): 1.0 for rank in range(3)}
    keys = ["serving=replicas", "cluster.ranks=3", "mesh.liveness=fast"]
    with serving(tmp_path, *choice(model), *keys) as server:
        until(lambda: rank_up(server.url) == up, START_S)
        chat = f"{server.url}/v1/chat/completions"
        fields = {"temperature": 1.0, "max_tokens": 8, "logit_bias": LONG["logit_bias"]}
        bodies = [server.body(**fields, seed=seed) for seed in range(seeds)]

        def text_of(answer: httpx.Response) -> str:
            text: str = answer.json()["choices"][0]["message"]["content"]
            return text

        with httpx.Client(timeout=START_S) as client:
            texts = [text_of(client.post(chat, json=body)) for body in bodies]
        assert len(set(texts)) == seeds

        def ask(first: int) -> None:
            with httpx.Client(timeout=START_S) as client:
                for number in range(first, total, 6):
                    answer = client.post(chat, json=bodies[number % seeds])
                    while answer.status_code == 503 and "retry-after" in answer.headers:
                        time.sleep(0.2)
                        answer = client.post(chat, json=bodies[number % seeds])
                    assert answer.status_code == 200, answer.text
                    is_right = text_of(answer) == texts[number % seeds]
                    with counting:
                        counts["right" if is_right else "wrong"] += 1

        def is_due(kill: int) -> bool:
            return counts.total() >= kill * total // kills and rank_up(server.url) == up

        with ThreadPoolExecutor(6) as clients:
            asked = [clients.submit(ask, first) for first in range(6)]
            for kill in range(kills):
                until(functools.partial(is_due, kill), 600)
                server.worker(kill % 3).kill()
            for one in asked:
                one.result(timeout=600)
        assert counts == {"right": total}

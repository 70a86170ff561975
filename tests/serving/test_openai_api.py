"""OpenAI's API over a fake engine, by real sockets: shapes, usage, logprobs, choices, thinking."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smolrun.serving.generation import Piece, merged
from smolrun.serving.responses import EventStream
from tests.serving.chat_model import THINKING_TEMPLATE, chat_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, echoes, events, says, served
from tests.waiting import until


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A base model that answers with the prompt."""
    with served(FakeEngine(echoes), tmp_path_factory.mktemp("echo")) as server:
        yield server


def test_a_chat_is_answered_as_a_whole_and_as_a_stream(echo: Served):
    whole = echo.chat("Grüße").json()
    assert whole["object"] == "chat.completion" and whole["model"] == "fake"
    message = {"role": "assistant", "content": "Grüße", "refusal": None}
    assert whole["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    ]
    assert whole["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 8,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    answer = echo.chat("Grüße", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert "x-smolrun-rank" not in answer.headers  # one engine, which may be a pipeline
    chunks = events(answer.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert [delta["content"] for delta in deltas[1:-1]] == list("Grüße")
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(c["id"], c["object"], c["model"]) for c in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_in_a_chunk_of_its_own_when_it_is_asked_for(echo: Served):
    chunks = events(echo.chat(stream=True, stream_options={"include_usage": True}).text)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 2 + 3


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_the_answer(echo: Served, name: str):
    answer = echo.chat("abcdef", **{name: 3}).json()
    assert answer["choices"][0]["message"]["content"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


def test_the_default_of_max_tokens_is_what_the_context_has_room_for(echo: Served):
    echo.chat("a" * 500)
    assert echo.engine.submitted[-1].max_tokens == 512 - 500


def test_a_stop_string_ends_the_answer_and_the_work(echo: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(echo.engine, "step_s", 0.005)  # so that much is left when it is found
    for stream in (False, True):
        answer = echo.chat("one, two, three" + "x" * 400, stop=["two", "zzz"], stream=stream)
        if stream:
            chunks = [chunk["choices"][0] for chunk in events(answer.text)]
            text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
            reason = chunks[-1]["finish_reason"]
        else:
            text = answer.json()["choices"][0]["message"]["content"]
            reason = answer.json()["choices"][0]["finish_reason"]
            assert answer.json()["usage"]["completion_tokens"] == len("one, two")
        assert (text, reason) == ("one, ", "stop")
    mine = [submit.request for submit in echo.engine.submitted[-2:]]
    # An answer may leave before the engine is asked to stop it.
    until(lambda: [one.request for one in echo.engine.cancelled if one.choice == 0][-2:] == mine)
    until(echo.is_at_rest)


def test_a_stop_string_leaves_the_cached_tokens_in_the_usage(tmp_path: Path):
    with served(FakeEngine(echoes, prefill_steps=1, cached_tokens=3), tmp_path) as server:
        usage = server.complete("one. two", stop=".").json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
        assert "smolrun_cached_tokens_total 3.0" in server.client.get("/metrics").text


def test_text_held_back_for_a_stop_string_is_delivered(echo: Served):
    assert echo.chat("a ST", stop="STOP").json()["choices"][0]["message"]["content"] == "a ST"
    chunks = events(echo.chat("a ST", stop="STOP", stream=True).text)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "a ST"


def test_stop_token_ids_end_the_answer_and_are_no_text(echo: Served):
    answer = echo.chat("abc", stop_token_ids=[99]).json()
    assert echo.engine.submitted[-1].stop_ids == [0, 99]
    assert answer["choices"][0]["message"]["content"] == "ab"
    echo.chat("abc", ignore_eos=True)
    assert echo.engine.submitted[-1].stop_ids == []


def test_n_choices_share_one_prompt(echo: Served):
    whole = echo.chat("abc", n=3).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in whole["choices"]} == {"abc"}
    assert whole["usage"]["prompt_tokens"] == 3 and whole["usage"]["completion_tokens"] == 12
    chunks = events(echo.chat("abc", n=3, stream=True).text)
    texts = ["", "", ""]
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["abc"] * 3


def test_log_probabilities_of_a_chat(echo: Served):
    content = echo.chat("€a", logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert [entry["bytes"] for entry in content] == [[0xE2], [0x82], [0xAC], [97]]
    assert content[3]["token"] == "a" and content[3]["logprob"] == -0.5
    assert content[3]["top_logprobs"] == [{"token": "a", "bytes": [97], "logprob": -0.5}]
    streamed = []
    for chunk in events(echo.chat("€a", logprobs=True, stream=True).text):
        streamed += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]


def test_a_likely_token_that_the_tokenizer_does_not_have_is_left_out(tmp_path: Path):
    with served(FakeEngine(echoes, likely=[9999]), tmp_path) as server:
        chat = server.chat("a", logprobs=True, top_logprobs=2).json()["choices"][0]
        top = chat["logprobs"]["content"][0]["top_logprobs"]
        assert [(entry["token"], entry["bytes"]) for entry in top] == [("a", [97])]
        text = server.complete("a", logprobs=2).json()["choices"][0]
        assert text["logprobs"]["top_logprobs"] == [{"a": -0.5}]


def test_sampling_reaches_the_engine_as_it_was_asked_for(echo: Served):
    given = {"temperature": 1e-9, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5}
    given |= {"presence_penalty": -1.0, "frequency_penalty": 2.0}
    echo.chat(**given, top_k=-1, seed=0, logit_bias={"65": -100})
    sampling = echo.engine.submitted[-1].sampling
    assert {key: getattr(sampling, key) for key in given} == given
    assert (sampling.top_k, sampling.seed, sampling.logit_bias) == (0, 0, {65: -100.0})


def test_without_a_seed_every_request_has_its_own(echo: Served):
    echo.chat()
    echo.chat()
    one, other = [submit.sampling.seed for submit in echo.engine.submitted[-2:]]
    assert one != other


def test_usage_is_what_the_engine_did_and_what_is_measured(tmp_path: Path):
    def counted(name: str) -> float:
        text = server.client.get("/metrics").text
        return float(re.findall(rf"^smolrun_{name}_total (\S+)$", text, re.MULTILINE)[0])

    with served(FakeEngine(echoes, prefill_steps=1), tmp_path) as server:
        engine = server.engine
        for stream in (False, True):
            for ask in (
                lambda **more: server.chat("Grüße €", **more),
                lambda **more: server.chat("Grüße €", n=3, max_tokens=2, **more),
                lambda **more: server.chat("ab", logprobs=True, stop_token_ids=[98], **more),
                lambda **more: server.complete(["ab", "€"], n=2, echo=True, logprobs=1, **more),
                lambda **more: server.complete([1, 2, 0xE2], max_tokens=3, **more),
            ):
                done, generated = len(engine.submitted), engine.generated
                before = counted("prompt_tokens"), counted("generated_tokens")
                more: dict[str, Any] = {"stream": stream}
                more |= {"stream_options": {"include_usage": True}} if stream else {}
                answer = ask(**more)
                usage = (events(answer.text)[-1] if stream else answer.json())["usage"]
                prompts = sum(len(one.prompt_ids) for one in engine.submitted[done:])
                assert usage["prompt_tokens"] == prompts
                assert usage["completion_tokens"] == engine.generated - generated > 0
                assert usage["total_tokens"] == prompts + engine.generated - generated
                after = counted("prompt_tokens"), counted("generated_tokens")
                assert after == (before[0] + prompts, before[1] + usage["completion_tokens"])


def test_text_completions_of_texts_and_of_token_ids(echo: Served):
    for prompt in ("abc", ["abc"], [97, 98, 99], [[97, 98, 99]]):
        answer = echo.complete(prompt).json()
        assert answer["object"] == "text_completion"
        assert answer["choices"] == [
            {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}
        ]
    answer = echo.complete(["ab", "cd"], n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "ab", "cd", "cd"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 12
    assert echo.complete("a" * 30).json()["choices"][0]["finish_reason"] == "length"


def test_many_prompts_are_one_request_for_the_queue(tmp_path: Path):
    # 68 choices find room here at once; more are taken where nothing else is there.
    with served(FakeEngine(echoes), tmp_path) as server:
        answer = server.complete([str(number) for number in range(64)], n=2)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == 128


def test_a_defect_ends_a_text_completion():
    class Broken:
        async def pieces(self) -> AsyncIterator[Piece]:
            raise ValueError("a defect")
            yield

    async def all_of() -> None:
        async for _ in merged([Broken(), Broken()]):  # type: ignore[list-item]
            pass

    with pytest.raises(ValueError, match="a defect"):
        asyncio.run(asyncio.wait_for(all_of(), 10))


def test_a_model_need_not_be_named(echo: Served):
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "Hi"})):
        for model in ({}, {"model": ""}, {"model": None}):
            answer = echo.client.post(path, json=body | model)
            assert answer.status_code == 200 and answer.json()["model"] == "fake"
    assert echo.client.get("/v1/models/").status_code == 404


def test_a_stream_of_text_completions(echo: Served):
    answer = echo.complete(["ab", "cd"], stream=True, stream_options={"include_usage": True})
    texts = ["", ""]
    *chunks, last = events(answer.text)
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["ab", "cd"] and last["usage"]["total_tokens"] == 4 + 6


def test_echo_repeats_the_prompt_with_its_log_probabilities(echo: Served):
    answer = echo.complete("a€", echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    assert answer["text"] == "a€a"
    logprobs = answer["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -1.0, -0.5]
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
    first, *middle, last = logprobs["top_logprobs"]
    # The likeliest one, and that which stands there, as lm-eval compares them.
    assert first is None and middle == [{" ": -0.25, "\ufffd": -1.0}] * 3 and last == {"a": -0.5}
    chunks = events(echo.complete("ab", echo=True, stream=True).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abab"


def test_models(echo: Served):
    (model,) = echo.client.get("/v1/models").json()["data"]
    assert model["id"] == "fake" and model["object"] == "model" and model["max_model_len"] == 512
    assert echo.client.get("/v1/models/fake").json() == model
    missing = echo.client.get("/v1/models/some/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_request_ids_come_back_and_are_in_the_answer(echo: Served):
    answer = echo.client.get("/v1/models", headers={"x-request-id": "my-id.1"})
    assert answer.headers["x-request-id"] == "my-id.1"
    made = echo.client.get("/v1/models", headers={"x-request-id": "bad id " * 50 + "x"})
    assert made.headers["x-request-id"] != "bad id" and len(made.headers["x-request-id"]) == 24
    answer = echo.chat()
    assert answer.json()["id"] == "chatcmpl-" + answer.headers["x-request-id"]


def test_a_base_model_says_that_it_continues_text(echo: Served):
    assert "continues the text" in echo.chat().headers["x-smolrun-note"]


def test_thinking_is_reasoning_content(tmp_path: Path):
    chat_model(tmp_path, THINKING_TEMPLATE)
    with served(FakeEngine(says("<think>two</think>2", end=256)), tmp_path) as server:
        message = server.chat("1+1").json()["choices"][0]["message"]
        assert message["reasoning_content"] == "two" and message["content"] == "2"
        chunks = events(server.chat("1+1", stream=True).text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "two"
        assert "".join(d.get("content", "") for d in deltas) == "2"
        server.chat("1+1", chat_template_kwargs={"enable_thinking": True})
        assert bytes(server.engine.submitted[-1].prompt_ids[-8:]) == b"<think>\n"


def test_no_character_of_an_answer_ends_a_line_of_its_stream(echo: Served):
    """Clients split lines as str.splitlines does."""
    said = "a\x85b\u2028c\u2029d\x1ce\x0bf"
    body = {"messages": [{"role": "user", "content": said}], "stream": True, "max_tokens": 200}
    answer = echo.client.post("/v1/chat/completions", json=body)
    lines = [line for line in answer.text.splitlines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
    assert said in "".join(delta.get("content") or "" for delta in deltas)


def test_a_client_that_leaves_before_the_first_event_is_cancelled():
    """Its connection takes no byte, so that its events never begin."""
    closed: list[str] = []
    generation: Any = SimpleNamespace(close=lambda: closed.append("closed"), replicas=[], step=None)

    async def events() -> AsyncIterator[bytes]:
        closed.append("begun")
        yield b""

    async def send(_: object) -> None:
        await asyncio.Event().wait()

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def leave() -> None:
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        await EventStream([generation], events())(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(leave(), 20))
    assert closed == ["closed"]

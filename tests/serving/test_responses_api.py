"""POST /v1/responses: OpenAI's newer API, as its clients use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from smolrun.serving.access import AccessPolicy
from smolrun.serving.responses_api import KeptResponses
from tests.serving.chat_model import THINKING_TEMPLATE, TOOLS_TEMPLATE, chat_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, says, served
from tests.serving.test_clients import SAYS
from tests.serving.test_js_clients import script
from tests.waiting import SOON_S, until

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ANSWER = "Bonn has 12 degrees, Köln 12 degrees."
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("responses")
    chat_model(folder, TOOLS_TEMPLATE)
    with served(FakeEngine(script, max_sequence_length=4096), folder) as found:
        yield found


def create(server: Served, input: object = "Hello?", **fields: object) -> httpx.Response:
    return server.client.post("/v1/responses", json={"input": input, **fields})


def body_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.is_success, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """Of a stream, after its frames and numbers were checked."""
    frames = [frame.split("\n") for frame in answer.text.split("\n\n") if frame.startswith("event")]
    bodies = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [f"event: {body['type']}" for body in bodies] == [name for name, _ in frames]
    assert [body["sequence_number"] for body in bodies] == list(range(len(bodies)))
    return bodies


def summed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output items as a client adds them up, from `added` and the deltas alone."""
    items: list[dict[str, Any]] = []
    for one in events:
        kind = one["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert one["output_index"] == len(items)
            items.append(one["item"])
        elif "output_index" in one:
            item = items[one["output_index"]]
            assert one.get("item_id", item["id"]) == item["id"]
            if kind == "content_part.added":
                item["content"].append(one["part"])
            elif kind == "function_call_arguments.delta":
                item["arguments"] += one["delta"]
            elif kind.endswith(".delta"):
                item["content"][one["content_index"]]["text"] += one["delta"]
            elif kind == "output_item.done":
                assert one["item"] == item | {"status": one["item"]["status"]}
                item["status"] = one["item"]["status"]
    return items


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: part for key, part in item.items() if key not in ("id", "call_id")} for item in output
    ]


@pytest.mark.parametrize(
    ("fields", "kinds", "status"),
    [
        ({}, ["message"], "completed"),
        ({"tools": [WEATHER]}, ["message", "function_call", "function_call"], "completed"),
        ({"max_output_tokens": 3}, ["message"], "incomplete"),
    ],
)
def test_a_stream_adds_up_to_the_whole_response(
    server: Served, fields: dict[str, Any], kinds: list[str], status: str
) -> None:
    whole = body_of(create(server, **fields))
    assert [item["type"] for item in whole["output"]] == kinds and whole["status"] == status
    events = events_of(create(server, stream=True, **fields))
    first, last = events[0], events[-1]
    assert (first["type"], first["response"]["output"]) == ("response.created", [])
    assert last["type"] == f"response.{status}"
    assert summed(events) == last["response"]["output"]
    assert without_ids(last["response"]["output"]) == without_ids(whole["output"])
    assert last["response"]["usage"] == whole["usage"] and whole["usage"]["output_tokens"]
    assert whole["output"][-1]["status"] == status
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert whole["incomplete_details"] == reason


def test_thoughts_are_an_item_of_their_own_and_left_out_of_later_turns(tmp_path: Path) -> None:
    chat_model(tmp_path, THINKING_TEMPLATE)
    with served(FakeEngine(says("<think>Hm.</think>Yes.", end=256)), tmp_path) as server:
        first = body_of(create(server))
        thought, said = first["output"]
        assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "Hm.")
        assert (said["type"], said["content"][0]["text"]) == ("message", "Yes.")
        events = events_of(create(server, stream=True))
        assert summed(events) == events[-1]["response"]["output"]
        assert "response.reasoning_text.delta" in {one["type"] for one in events}
        for again in (
            create(server, "Why?", previous_response_id=first["id"]),
            create(server, [user("Hello?"), *first["output"], user("Why?")]),
        ):
            assert again.is_success, again.text
            prompt = prompt_of(server)
            assert "Hm." not in prompt
            assert prompt.count("Yes.") == prompt.count("Hello?") == prompt.count("Why?") == 1


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "input_text", "text": text}]}


def prompt_of(server: Served) -> str:
    return bytes(id for id in server.engine.submitted[-1].prompt_ids if id < 256).decode()


def test_a_response_asks_the_engine_what_a_chat_would(server: Served) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 3}
    create(
        server,
        [{"role": "developer", "content": "In German."}, user("Hi")],
        instructions="Be short.",
        max_output_tokens=7,
        **sampling,
    )
    response = server.engine.submitted[-1]
    messages = [
        {"role": "system", "content": "Be short.\n\nIn German."},
        {"role": "user", "content": "Hi"},
    ]
    body = {"messages": messages, "max_tokens": 7, **sampling}
    assert server.client.post("/v1/chat/completions", json=body).is_success
    chat = server.engine.submitted[-1]
    assert response.prompt_ids == chat.prompt_ids
    assert response.sampling == chat.sampling and response.max_tokens == chat.max_tokens


def test_calls_and_their_results_are_sent_in_three_ways(server: Served) -> None:
    first = body_of(create(server, "Weather?", tools=[WEATHER]))
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "12 degrees"}
        for call in calls
    ]
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    ways = [
        {"input": results, "previous_response_id": first["id"]},
        {"input": [user("Weather?"), *first["output"], *results]},
        {"input": [user("Weather?"), *references, *results]},
    ]
    prompts = []
    for way in ways:
        answer = body_of(create(server, tools=[WEATHER], **way))
        assert answer["output"][0]["content"][0]["text"] == ANSWER
        prompts.append(prompt_of(server))
    assert len(set(prompts)) == 1 and prompts[0].count("12 degrees") == 2
    assert 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}' in prompts[0]


def test_what_is_not_stored_is_not_there_later(tmp_path: Path) -> None:
    chat_model(tmp_path)
    engine = FakeEngine(says(SAYS, end=256))
    with served(engine, tmp_path, AccessPolicy(api_key="sk-test")) as server:
        server.client.headers["authorization"] = "Bearer sk-test"
        kept, lost = body_of(create(server)), body_of(create(server, store=False))
        assert kept["store"] is True and lost["store"] is False
        assert body_of(server.client.get(f"/v1/responses/{kept['id']}")) == kept
        assert server.client.get(f"/v1/responses/{lost['id']}").status_code == 404
        answer = create(server, previous_response_id=lost["id"])
        assert (answer.status_code, answer.json()["error"]["param"]) == (
            404,
            "previous_response_id",
        )
        reference = {"type": "item_reference", "id": lost["output"][0]["id"]}
        error = create(server, [reference]).json()["error"]
        assert error["param"] == "input[0].id" and "store=false" in error["message"]
        gone = server.client.delete(f"/v1/responses/{kept['id']}").json()
        assert gone == {"id": kept["id"], "object": "response", "deleted": True}
        assert create(server, previous_response_id=kept["id"]).status_code == 404


def test_kept_responses_have_a_limit_and_owners() -> None:
    kept = KeptResponses(most_bytes=1000)
    for number in range(20):
        item = {"id": f"i{number}", "text": "x" * 100}
        kept.add("mine", {"id": f"r{number}", "output": [item]}, [])
    assert kept.find("mine", "r19").items[0]["id"] == "i19"
    assert kept.item("mine", "i18", "input[0].id")["text"] == "x" * 100
    for key, id in (("mine", "r0"), ("other", "r19")):
        with pytest.raises(Exception, match="is kept"):
            kept.find(key, id)
        with pytest.raises(Exception, match="is kept"):
            kept.item(key, id.replace("r", "i"), "input[0].id")


def test_an_answer_of_a_schema(server: Served) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "name": "place", "schema": PLACE, "strict": True}
    whole = body_of(create(server, text={"format": form}))
    assert json.loads(whole["output"][0]["content"][0]["text"]) == {"city": "Bonn", "degrees": 12}
    assert '"city"' in server.engine.submitted[-1].sampling.grammar
    answer = create(server, text={"format": {"type": "json_schema", "name": "place"}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "text.format"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"content": "Hi"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"temperature": 9}, "temperature"),
        ({"model": "gpt-5"}, "model"),
    ],
)
def test_what_cannot_be_is_named(server: Served, fields: dict[str, Any], param: str | None) -> None:
    answer = create(server, **fields)
    assert answer.status_code in (400, 404), answer.text
    found = answer.json()["error"]["param"]
    assert found == param or (param is None and found.startswith("input"))


def test_what_clients_send_besides_is_no_error(server: Served) -> None:
    """Fields of the AI SDK, the Agents SDK and Open WebUI that change no answer."""
    answer = create(
        server,
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "low", "summary": "auto"},
        service_tier="auto",
        truncation="disabled",
        prompt_cache_key="a",
        user="b",
        metadata={"a": "b"},
        text={"verbosity": "low"},
        max_tool_calls=3,
        stream_options={"include_obfuscation": False},
    )
    assert body_of(answer)["metadata"] == {"a": "b"}


def test_tools_that_openai_runs_are_left_out(server: Served) -> None:
    """Codex offers them with every request."""
    hosted = [{"type": "web_search"}, {"type": "namespace", "name": "multi_agent_v1", "tools": []}]
    answer = create(server, tools=[*hosted, WEATHER])
    assert answer.headers["x-smolrun-note"] == "left out of tools: web_search, namespace"
    assert [tool["type"] for tool in body_of(answer)["tools"]] == ["function"]
    assert "multi_agent" not in prompt_of(server)
    plain = create(server, tools=hosted)
    assert body_of(plain)["output"][0]["content"][0]["text"] == SAYS


def test_a_failure_in_a_stream_is_its_last_event(tmp_path: Path) -> None:
    chat_model(tmp_path)
    engine = FakeEngine(says("x" * 400, end=256), step_s=0.01)
    with served(engine, tmp_path) as server:
        body = {"input": "Hi", "stream": True}
        with server.client.stream("POST", "/v1/responses", json=body) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if "output_text.delta" in line)
            engine.frontend.fail("rank 1 is lost")
            data = [line[6:] for line in lines if line.startswith("data: ")]
        last = json.loads(data[-1])
        assert last["type"] == "response.failed"
        assert "rank 1 is lost" in last["response"]["error"]["message"]
        engine.say_ready()
        id = last["response"]["id"]
        until(lambda: server.client.get("/readyz").is_success)
        assert server.client.get(f"/v1/responses/{id}").status_code == 404


def test_a_stream_can_be_resumed_and_one_that_is_left_frees_its_slot(server: Served) -> None:
    header = {"x-smolrun-stream": "0123456789abcdef"}
    body = {"input": "Hello?", "stream": True}
    whole = server.client.post("/v1/responses", json=body, headers=header).text
    again = {"last-event-id": "2"}
    rest = server.client.get("/v1/streams/0123456789abcdef", headers=again).text
    assert rest and whole.endswith(rest) and rest.startswith("id: 3\nevent: response.")
    with server.client.stream("POST", "/v1/responses", json=body) as answer:
        next(answer.iter_lines())
    until(server.is_at_rest)


def test_openai_s_client(server: Served) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("llguidance")
    pydantic = pytest.importorskip("pydantic")
    Place = pydantic.create_model("Place", city=(str, ...))
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=SOON_S) as client:
        responses = client.responses
        assert responses.create(model="fake", input="Hello?").output_text == SAYS
        with responses.stream(model="fake", input="Hello?", instructions="Be short.") as stream:
            deltas = [one.delta for one in stream if one.type == "response.output_text.delta"]
            final = stream.get_final_response()
        assert "".join(deltas) == final.output_text == SAYS and final.usage.total_tokens
        first = responses.create(model="fake", input="Weather?", tools=[WEATHER])
        results: Any = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "12 degrees"}
            for item in first.output
            if item.type == "function_call"
        ]
        given = {"model": "fake", "previous_response_id": first.id, "tools": [WEATHER]}
        assert responses.create(input=results, **given).output_text == ANSWER
        parsed = responses.parse(model="fake", input="Where?", text_format=Place)
        assert parsed.output_parsed.city == "Bonn"
        assert responses.retrieve(first.id).id == first.id
        responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            responses.retrieve(first.id)

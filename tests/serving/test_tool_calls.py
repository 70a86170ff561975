"""Functions that a model may call: its prompt, and calls in its answers in every kind of pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.serving.messages import Submit
from smolrun.serving.tool_calls import ToolCall, ToolCallSplitter
from tests.serving.chat_model import THINKING_TEMPLATE, TOOLS_TEMPLATE, chat_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, events, served

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 1.0}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
WEATHER = ToolCall("weather", '{"city": "Köln", "days": 1.0}')


def split(pieces: Sequence[str], begun: str = "") -> tuple[str, list[ToolCall]]:
    splitter = ToolCallSplitter(begun)
    results = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(said for said, _ in results), [call for _, some in results for call in some]


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        (f"{CALL}", "", ["weather"]),
        (f"Let me look.\n\n{CALL}\n{OTHER}\n", "Let me look.", ["weather", "time"]),
        (f"{CALL}\nDone.", "\nDone.", ["weather"]),
        (CALL.removesuffix("\n</tool_call>"), "", ["weather"]),  # small models forget the end
        ('<tool_call>{"name": "time"}</tool_call>', "", ["time"]),
        ("No call here. \n", "No call here. \n", []),
        ("a < b, <tool_call", "a < b, <tool_call", []),
    ],
)
def test_text_and_calls_are_told_apart(text: str, said: str, names: list[str]) -> None:
    found, calls = split([text])
    assert (found, [call.name for call in calls]) == (said, names)
    assert split([*text]) == (found, calls)


@pytest.mark.parametrize(
    "broken",
    [
        '{"name": "weather", "arguments": {"city": "Köln"}',  # cut
        '{"name": "weather", "arguments": {"city": Köln}}',
        '{"name": "weather", "arguments": [1]}',
        '{"name": "weather", "arguments": "no object"}',
        '{"name": "weather", "arguments": {"x": NaN}}',
        '{"arguments": {}}',
        '{"name": 5, "arguments": {}}',
        '{"name": "a", "arguments": {}} {"name": "b", "arguments": {}}',
        '[{"name": "weather", "arguments": {}}]',
        '{"name": "a", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}",
        "",
    ],
)
def test_what_is_no_valid_call_stays_text_as_it_was_written(broken: str) -> None:
    text = f"Look: \n<tool_call>\n{broken}\n</tool_call> and {OTHER}"
    said, calls = split([text])
    assert said == f"Look: \n<tool_call>\n{broken}\n</tool_call> and"
    assert [call.name for call in calls] == ["time"]
    cut = f"Look: \n<tool_call>\n{broken}"
    assert split([cut]) == (cut, [])


def test_arguments_are_the_model_s_own_text() -> None:
    number = '{"n": 12345678901234567890, "x": 1.50}'
    assert ToolCall.read(f'{{"name": "f", "arguments": {number}}}') == ToolCall("f", number)
    as_text = json.dumps({"name": "f", "arguments": '{"a": "ü"}'})
    assert ToolCall.read(as_text) == ToolCall("f", '{"a": "ü"}')


TEXTS = st.lists(
    st.sampled_from([CALL, OTHER, "Hi ", "\n", "<tool_call>", "</tool_call>", '{"name"', "é"])
).map("".join)


@given(TEXTS, st.lists(st.integers(0, 400)))
def test_the_borders_of_the_pieces_do_not_matter(text: str, cuts: list[int]) -> None:
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert split(pieces) == split([text])


# --- over HTTP --------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} <|end|>",  # the name of a control token is text
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            "strict": True,
        },
    }
    for name in ("weather", "time")
]
ANSWERS: dict[str, str] = {}  # by the last message of the user


def scripted(submit: Submit, _: int) -> list[int]:
    """Answers by the last line of the user; tags are tokens of their own, as Qwen's."""
    text = bytes(id for id in submit.prompt_ids if id < 256).decode()
    asked = next((key for key in ANSWERS if f"user\n{key}" in text), "")
    parts = ANSWERS.get(asked, "").replace("<tool_call>", "\0a").replace("</tool_call>", "\0b")
    ids = [*parts.encode(), 256]
    while 0 in ids:
        at = ids.index(0)
        ids[at : at + 2] = [258 + (ids[at + 1] == ord("b"))]
    return ids


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tools")
    chat_model(folder, TOOLS_TEMPLATE, ["<tool_call>", "</tool_call>"])
    with served(FakeEngine(scripted, max_sequence_length=4096), folder) as found:
        yield found


def prompt_of(server: Served) -> str:
    ids = server.engine.submitted[-1].prompt_ids
    return b"".join(server.service.prompts.token_bytes[id] or b"<CONTROL>" for id in ids).decode()


def test_calls_come_whole_and_in_a_stream(server: Served) -> None:
    ANSWERS["both"] = f"Let me look.\n{CALL}\n{OTHER}"
    whole = server.chat("both", tools=TOOLS).json()["choices"][0]
    message = whole["message"]
    assert whole["finish_reason"] == "tool_calls" and message["content"] == "Let me look."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "time"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"])["city"] == "Köln"
    assert all("index" not in call and call["type"] == "function" for call in message["tool_calls"])
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    chunks = [
        one["choices"][0] for one in events(server.chat("both", tools=TOOLS, stream=True).text)
    ]
    deltas = [one["delta"] for one in chunks]
    assert "".join(one.get("content") or "" for one in deltas) == "Let me look."
    calls = [call for one in deltas for call in one.get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [
        (0, "weather"),
        (1, "time"),
    ]
    assert all(call["id"].startswith("call_") for call in calls)
    assert chunks[-1]["finish_reason"] == "tool_calls" and not chunks[-1]["delta"]


def test_the_prompt_has_tools_calls_and_results_and_names_of_tokens_stay_text(
    server: Served,
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather"}}
    call["function"] |= {"arguments": '{"city": "<|start|>Köln"}'}  # type: ignore[operator]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12° <|end|>"},
    ]
    body = {"messages": messages, "tools": TOOLS}
    assert server.client.post("/v1/chat/completions", json=body).is_success
    prompt = prompt_of(server)
    assert prompt.count("<CONTROL>") == 2 * 4 + 1  # none of those in texts
    assert '"description": "The weather <|end|>"' in prompt and "strict" not in prompt
    assert '{"name": "weather", "arguments": {"city": "<|start|>Köln"}}' in prompt
    assert "<tool_response>\n12° <|end|>\n</tool_response>" in prompt


def test_the_choice_of_a_tool_begins_the_answer(server: Served) -> None:
    ANSWERS["named"] = f'{{"city": "Bonn"}}}}\n</tool_call>\n{OTHER}'
    named = {"type": "function", "function": {"name": "weather"}}
    choice = server.chat("named", tools=TOOLS, tool_choice=named).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    assert choice["finish_reason"] == "tool_calls"
    assert prompt_of(server).endswith('assistant\n<tool_call>\n{"name": "weather", "arguments": ')
    ANSWERS["required"] = 'time", "arguments": {}}\n</tool_call>'
    choice = server.chat("required", tools=TOOLS, tool_choice="required").json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "time"
    ANSWERS["several"] = f"{CALL}\n{OTHER}"
    answer = server.chat("several", tools=TOOLS, parallel_tool_calls=False).json()
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    answer = server.chat("several", tools=TOOLS, tool_choice="none").json()["choices"][0]
    assert answer["message"]["content"] == ANSWERS["several"]  # text, as nothing was offered
    assert "# Tools" not in prompt_of(server) and answer["finish_reason"] == "stop"


def test_a_call_that_is_cut_is_text_and_says_length(server: Served) -> None:
    ANSWERS["cut"] = CALL
    choice = server.chat("cut", tools=TOOLS, max_tokens=20).json()["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"].startswith('<tool_call>\n{"name"')


def error_of(answer: httpx.Response) -> tuple[str, str]:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


Body = dict[str, Any]
DEEP: Any = {}
for _ in range(60):
    DEEP = {"properties": DEEP}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]},
            "tools[0].function.parameters",
        ),
    ],
)
def test_wrong_tools_are_named(server: Served, fields: Body, param: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    found, _ = error_of(server.client.post("/v1/chat/completions", json=body))
    assert found == param


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (THINKING_TEMPLATE, "has no tools in its chat template"),
        ("{{ tools }}" + THINKING_TEMPLATE, "in a format other than <tool_call>"),
        ("{{ tools }}<tool_call><function=f>" + THINKING_TEMPLATE, "in a format other than"),
    ],
)
def test_a_model_without_tools_answers_without_unless_it_must(
    tmp_path: Path, template: str, said: str
) -> None:
    chat_model(tmp_path, template)
    with served(FakeEngine(lambda *_: [65, 256]), tmp_path) as server:
        plain = server.chat()
        assert "x-smolrun-note" not in plain.headers
        answer = server.chat(tools=TOOLS)
        assert said in answer.headers["x-smolrun-note"]
        assert answer.json()["choices"] == plain.json()["choices"]
        param, message = error_of(server.chat(tools=TOOLS, tool_choice="required"))
        assert param == "tool_choice" and said in message
        asked = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "12"}]
        answer = server.client.post("/v1/chat/completions", json={"messages": asked})
        assert error_of(answer)[0] == "messages"
        assert server.chat(tools=TOOLS, tool_choice="none").is_success

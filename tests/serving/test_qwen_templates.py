"""Qwen's own chat templates, as TRL has copies of them: prompts as transformers writes them, calls
and thoughts over HTTP."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from smolrun.data.chat_template import TEMPLATE_FILE
from smolrun.data.tokenizer import FILE_NAME, bytes_tokenizer
from smolrun.serving.messages import Submit
from smolrun.serving.text import Prompts
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, events, served

pytestmark = pytest.mark.soak  # TRL is installed on few machines

MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def qwen_model(folder: Path, name: str) -> None:
    """A byte tokenizer with Qwen's added tokens and one of its templates."""
    try:
        found = Path(str(distribution("trl").locate_file(f"trl/chat_templates/{name}.jinja")))
    except PackageNotFoundError:
        pytest.skip("trl is not installed, which has Qwen's templates")
    bytes_tokenizer().save(folder)
    tokenizer = Tokenizer.from_file(str(folder / FILE_NAME))
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in MARKERS])
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in TAGS])
    tokenizer.save(str(folder / FILE_NAME))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / TEMPLATE_FILE).write_text(found.read_text())


def written(folder: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(folder / FILE_NAME)).encode(text).ids
    return ids


def call_of(city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"id": f"call_{city}", "type": "function", "function": function}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": "Weather?"}
ASKED = {"role": "assistant", "content": "", "tool_calls": [call_of("Bonn"), call_of("Köln")]}
RESULTS = [{"role": "tool", "tool_call_id": f"call_{one}", "content": "12"} for one in "ab"]
LATER = [{"role": "assistant", "content": "Mild."}, {"role": "user", "content": "Why?"}]
THOUGHT = {**ASKED, "reasoning_content": "I need both."}


@pytest.mark.parametrize("switches", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_prompts_are_those_of_transformers(
    name: str, switches: dict[str, bool], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    qwen_model(tmp_path, name)
    prompts, theirs = Prompts(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert not prompts.lacks_tools
    for messages in (
        [USER],
        [SYSTEM, USER],
        [SYSTEM, USER, ASKED, *RESULTS],
        [USER, THOUGHT, *RESULTS],
        [USER, THOUGHT, *RESULTS, *LATER],
    ):
        for tools in ([], TOOLS):
            ids, _ = prompts.chat(messages, switches, tools=tools)
            given = {"tools": tools or None, "add_generation_prompt": True, "tokenize": False}
            text = theirs.apply_chat_template(messages, **given, **switches)
            assert ids == written(tmp_path, text)


def conversation(server: Served, **fields: object) -> dict[str, Any]:
    """An answer, which is the same as a stream and whole."""
    choice: dict[str, Any] = server.chat("Weather?", tools=TOOLS, **fields).json()["choices"][0]
    message = choice["message"]
    deltas = [
        one["choices"][0]["delta"]
        for one in events(server.chat("Weather?", tools=TOOLS, stream=True, **fields).text)
    ]
    for key in ("content", "reasoning_content"):
        assert "".join(one.get(key) or "" for one in deltas) == message.get(key, "")
    calls = [call for one in deltas for call in one.get("tool_calls", [])]
    assert [call["function"] for call in calls] == [
        call["function"] for call in message.get("tool_calls", [])
    ]
    return choice


def test_qwen3_thinks_then_calls_and_its_thought_stays_within_the_turn(tmp_path: Path) -> None:
    qwen_model(tmp_path, "qwen3")
    answer = f"<think>\nI look it up.\n</think>\n\nOne moment.\n{CALL}"

    def script(submit: Submit, _: int) -> list[int]:
        end = written(tmp_path, "<|im_end|>")
        is_off = submit.prompt_ids[-2:] == written(tmp_path, "\n\n")
        return written(tmp_path, CALL if is_off else answer) + end

    with served(FakeEngine(script, max_sequence_length=4096), tmp_path) as server:
        choice = conversation(server)
        message = choice["message"]
        assert message["reasoning_content"].strip() == "I look it up."
        assert message["content"].strip() == "One moment."
        (call,) = message["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Köln"}'}
        assert choice["finish_reason"] == "tool_calls"

        off = conversation(server, chat_template_kwargs={"enable_thinking": False})
        assert "reasoning_content" not in off["message"] and off["message"]["tool_calls"]

        result = {"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"}
        body = {"messages": [USER, message, result], "tools": TOOLS}
        assert server.client.post("/v1/chat/completions", json=body).is_success
        prompt = server.engine.submitted[-1].prompt_ids
        thought = written(tmp_path, "<think>\nI look it up.\n</think>")
        places = range(len(prompt))
        assert any(prompt[at : at + len(thought)] == thought for at in places)
        body["messages"] += LATER
        assert server.client.post("/v1/chat/completions", json=body).is_success
        prompt = server.engine.submitted[-1].prompt_ids
        assert not any(prompt[at : at + len(thought)] == thought for at in range(len(prompt)))


def test_a_model_that_writes_calls_as_xml_is_not_offered_tools(tmp_path: Path) -> None:
    qwen_model(tmp_path, "qwen3_5_nothink")
    with served(FakeEngine(lambda *_: [65, 258]), tmp_path) as server:
        note = server.chat(tools=TOOLS).headers["x-smolrun-note"]
        assert "in a format other than <tool_call>" in note

"""Answers that obey a JSON Schema: grammars, the sampler, and what requests are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from smolrun.models.sampling import Sampling
from smolrun.serving import json_grammar as module
from smolrun.serving.batch import Batch, Opened, Row, Sampled
from smolrun.serving.json_grammar import (
    GrammarError,
    Grammars,
    json_grammar,
    lark_rule,
    vocabulary_messages,
)
from smolrun.serving.protocol import ChatRequest
from smolrun.serving.sampler import Sampler
from smolrun.serving.text import Prompts
from smolrun.serving.tool_calls import ToolCall, ToolCallSplitter, ToolUse, tool_use
from tests.serving.chat_model import THINKING_TEMPLATE, TOOLS_TEMPLATE, chat_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import says, served
from tests.serving.test_tool_calls import TOOLS, error_of

pytest.importorskip("llguidance")
END = 256
CHAT = [{"role": "user", "content": "Hi"}]
BYTES = [bytes([id]) for id in range(256)] + [b"", b'{"', b'"name"', b"Hi"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    """Whether the text is JSON of that schema."""
    found = json.loads(text)
    tags = found.pop("tags", [])
    return (
        found.keys() == {"name", "age"}
        and isinstance(found["name"], str)
        and len(found["name"]) <= 6
        and type(found["age"]) is int
        and 0 <= found["age"] <= 120
        and len(tags) <= 2
        and set(tags) <= {"a", "b"}
    )


def grammars() -> Grammars:
    return Grammars(BYTES, len(BYTES) + 4, [END])


def draw(grammar: str, seed: int, temperature: float) -> tuple[list[int], bytes]:
    """Tokens and text of the sampler on logits of noise, to the end."""
    noise = np.random.default_rng(seed).normal(size=(4000, len(BYTES) + 4)).astype(np.float32)
    sampling = Sampling(temperature=temperature, seed=seed, grammar=grammar, top_k=40, top_p=0.9)
    sampler, ids, token = Sampler(grammars()), list[int](), 1
    opened = [Opened(0, sampling, 0, None, [], 1)]
    for place, logits_V in enumerate(noise):
        batch = Batch(place, [Row(0, place, 1, True)], [token], [], opened if not place else [])
        (sampled,) = sampler.sample(batch, logits_V[None]).sampled
        assert sampled.error is None, sampled.error
        token = sampled.token_id
        if token == END:
            return ids, b"".join(BYTES[id] for id in ids)
        ids.append(token)
    raise AssertionError("it did not end")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_of_noise_obeys_its_schema_and_ends(temperature: float) -> None:
    grammar = json_grammar(PERSON)
    texts = {draw(grammar, seed, temperature)[1].decode() for seed in range(12)}
    assert len(texts) == 12 and all(map(is_person, texts))
    assert json.loads(draw(json_grammar(None), 1, temperature)[1]) is not None


def next_ids(sampler: Sampler, opened: Opened, rows: Sequence[tuple[int, list[int]]]) -> Sampled:
    """The last token sampled after the rows, each a start and tokens; logits prefer END."""
    logits_V = np.zeros(len(BYTES) + 4, np.float32)
    logits_V[END] = 9.0
    result = None
    for start, ids in rows:
        new = [opened] if result is None else []
        batch = Batch(0, [Row(0, start, len(ids), True)], ids, [], new)
        (result,) = sampler.sample(batch, logits_V[None]).sampled
    assert result is not None
    return result


def test_a_replayed_answer_goes_on_where_it_was() -> None:
    """After the loss of a stage generated tokens come as history, or as a prompt does."""
    grammar = json_grammar(
        {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"]}
    )
    said = list(b'{"n":1}')
    sampling = Sampling(temperature=0, grammar=grammar)
    for known in range(len(said)):
        # The prompt has two tokens that look like an answer, and count as none.
        history, rest = [123, 123, *said[:known]], said[known:]
        after = next_ids(
            Sampler(grammars()), Opened(0, sampling, 0, None, history, 2), [(2 + known, rest)]
        )
        assert (after.token_id, after.error) == (END, None)
        before = next_ids(
            Sampler(grammars()), Opened(0, sampling, 0, None, [123], 2), [(1, [123, *said[:known]])]
        )
        assert before.token_id != END


def test_errors_end_one_sequence_with_their_reason() -> None:
    sampling = Sampling(temperature=0, grammar=json_grammar(PERSON))
    wrong = next_ids(Sampler(grammars()), Opened(0, sampling, 0, None, [], 0), [(0, [65])])
    assert "left its schema" in (wrong.error or "")
    lacking = next_ids(Sampler(), Opened(0, sampling, 0, None, [], 1), [(0, [65])])
    assert 'pip install "smolrun[json]"' in (lacking.error or "")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"$ref": "https://evil.example/x"}, "not present"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "Unsatisfiable"),
        ({"enum": ["x" * 70_000]}, "larger than 65,536 bytes"),
    ],
)
def test_a_schema_that_cannot_be_obeyed_says_why(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        json_grammar(schema)


def test_the_vocabulary_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VOCABULARY_TOKENS", 100)
    parts = vocabulary_messages(BYTES)
    assert [part.first for part in parts] == [0, 100, 200]
    assert [text for part in parts for text in part.token_bytes] == BYTES
    monkeypatch.setattr(module, "is_installed", lambda: False)
    assert vocabulary_messages(BYTES) == []


# --- calls of functions ------------------------------------------------------------------------


def tool(name: str, parameters: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters, **fields}
    return {"type": "function", "function": function}


def use_of(choice: object, *tools: dict[str, Any], **fields: object) -> ToolUse:
    """What a request with these tools makes of them."""
    body = {"messages": CHAT, "tools": tools, "tool_choice": choice, **fields}
    prompts = SimpleNamespace(lacks_tools="")
    return tool_use(ChatRequest.model_validate(body), cast(Prompts, prompts))


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def calls_of_noise(use: ToolUse, seed: int, temperature: float = 1.0) -> list[ToolCall]:
    """As the server reads them from an answer that is drawn from noise."""
    text = draw(use.grammar(), seed, temperature)[1].decode()
    splitter = ToolCallSplitter(use.begun)
    said, calls = splitter.push(text)
    rest, last = splitter.finish()
    assert not said + rest  # all of it is calls
    return calls + last


def test_arguments_of_noise_obey_the_schema_of_a_named_tool() -> None:
    other = tool("other", {"type": "object", "properties": {}})
    use = use_of(named("save"), other, tool("save", PERSON))
    found = [calls_of_noise(use, seed, temperature) for seed in range(4) for temperature in (0, 1)]
    assert all([one.name for one in calls] == ["save"] for calls in found)
    texts = {calls[0].arguments for calls in found}
    assert len(texts) == 8 and all(map(is_person, texts))


def test_a_required_call_is_of_some_tool_and_obeys_its_schema() -> None:
    count = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    count["additionalProperties"] = False
    tools = tool("save", PERSON), tool("count", count), tool("stop", None)
    several = use_of("required", *tools)
    found = [calls_of_noise(several, seed) for seed in range(20, 32)]
    assert max(map(len, found)) > 1
    single = use_of("required", *tools, parallel_tool_calls=False)
    found += [calls_of_noise(single, seed) for seed in range(6)]
    assert all(len(calls) == 1 for calls in found[-6:])
    calls = [call for calls in found for call in calls]
    assert {call.name for call in calls} == {"save", "count", "stop"}
    for call in calls:
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        assert call.name != "save" or is_person(call.arguments)
        assert call.name != "count" or arguments in ({"n": 1}, {"n": 2})


def test_an_answer_of_a_schema_beside_tools_is_either() -> None:
    use = use_of("auto", tool("save", PERSON))
    grammar = use.grammar(lark_rule({"enum": ["no"]}))
    texts = [draw(grammar, seed, 1.0)[1].decode() for seed in range(12)]
    said = [text for text in texts if text == '"no"']
    calls = [call for text in texts for call in ToolCallSplitter().push(text)[1]]
    assert said and calls and all(is_person(call.arguments) for call in calls)
    assert len(said) + sum("<tool_call>" in text for text in texts) == 12


def test_numbers_that_no_machine_holds_are_arguments_all_the_same() -> None:
    for number in ("1e999", "-1E+400", "9" * 500):
        text = f'{{"name": "f", "arguments": {{"n": {number}}}}}'
        assert ToolCall.read(text) == ToolCall("f", f'{{"n": {number}}}')


def test_what_llguidance_does_not_know_of_a_schema_is_left_out_unless_strict() -> None:
    odd = {"properties": {"a": {"type": "array", "maxItems": 2, "uniqueItems": True}}}
    calls = calls_of_noise(use_of(named("f"), tool("f", odd)), 1)
    assert [call.name for call in calls] == ["f"]
    with pytest.raises(GrammarError, match=r"tools: .*uniqueItems"):
        use_of(named("f"), tool("f", odd, strict=True)).grammar()
    impossible = {"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 2}}}
    impossible["required"] = ["a"]  # type: ignore[assignment]
    with pytest.raises(GrammarError, match="tools: "):
        use_of(named("f"), tool("f", impossible)).grammar()


# --- over HTTP --------------------------------------------------------------------------------


def schema_of(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}


def test_the_engine_gets_the_grammar_and_no_thought_is_begun(tmp_path: Path) -> None:
    chat_model(tmp_path, THINKING_TEMPLATE)
    with served(FakeEngine(says("{}", end=256)), tmp_path) as server:
        thinks = {"chat_template_kwargs": {"enable_thinking": True}}
        assert server.chat(response_format=schema_of(PERSON), **thinks).is_success
        submit = server.engine.submitted[-1]
        assert submit.sampling.grammar == json_grammar(PERSON)
        assert bytes(id for id in submit.prompt_ids if id < 256).endswith(
            b"<think>\n\n</think>\n\n"
        )
        assert server.chat(response_format={"type": "json_object"}).is_success
        assert server.engine.submitted[-1].sampling.grammar == json_grammar(None)
        assert server.chat(response_format={"type": "text"}).is_success
        assert server.engine.submitted[-1].sampling.grammar == ""


def test_a_call_that_must_be_has_a_grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_model(tmp_path, TOOLS_TEMPLATE)
    rest = '{"city": "Bonn"}}\n</tool_call>'
    with served(FakeEngine(says(rest, end=256), max_sequence_length=4096), tmp_path) as server:
        must = {"tools": TOOLS, "tool_choice": named("weather")}
        choice = server.chat(**must).json()["choices"][0]
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bonn"}'
        grammar = server.engine.submitted[-1].sampling.grammar
        assert '"city"' in grammar and "time" not in grammar
        server.chat(tools=TOOLS, tool_choice="required")
        assert "time" in server.engine.submitted[-1].sampling.grammar
        server.chat(tools=TOOLS, response_format=schema_of(PERSON))
        both = server.engine.submitted[-1].sampling.grammar
        assert '"age"' in both and '"city"' in both
        free = {"tools": TOOLS}, {**must, "ignore_eos": True}
        for fields in free:
            server.chat(**fields, max_tokens=4)
            assert server.engine.submitted[-1].sampling.grammar == ""
        odd = [tool("f", {"properties": {"a": {"not": {}}}}, strict=True)]
        param, message = error_of(server.chat(tools=odd, tool_choice="required"))
        assert param == "tools" and "not" in message
        monkeypatch.setattr("smolrun.serving.chat_completions.is_installed", lambda: False)
        assert server.chat(**must).is_success  # begun as a call, its arguments not checked
        assert server.engine.submitted[-1].sampling.grammar == ""


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_model(tmp_path, TOOLS_TEMPLATE)
    with served(FakeEngine(says("{}", end=256), max_sequence_length=4096), tmp_path) as server:

        def refused(wanted: object = schema_of(PERSON), **fields: object) -> tuple[str, str]:
            found = error_of(server.chat(response_format=wanted, **fields))
            assert not server.engine.submitted
            return found

        assert "uniqueItems" in refused(schema_of({"uniqueItems": True}))[1]
        assert refused({"type": "json_schema"})[0] == "response_format"
        assert refused({"type": "xml"})[0] == "response_format.type"
        where = "response_format.json_schema.schema"
        assert refused(schema_of("object"))[0] == where
        body = json.dumps({"messages": CHAT, "response_format": schema_of({"title": "\ud800"})})
        assert error_of(server.client.post("/v1/chat/completions", content=body))[0] == where
        assert "beside ignore_eos" in refused(ignore_eos=True)[1]
        monkeypatch.setattr("smolrun.serving.chat_completions.is_installed", lambda: False)
        assert 'pip install "smolrun[json]"' in refused()[1]

"""Answers that obey a JSON Schema: grammars, the sampler, and what requests are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun.models.sampling import Sampling
from smolrun.serving import json_grammar as module
from smolrun.serving.batch import Batch, Opened, Row, Sampled
from smolrun.serving.json_grammar import (
    GrammarError,
    Grammars,
    json_grammar,
    vocabulary_messages,
)
from smolrun.serving.sampler import Sampler
from tests.serving.chat_model import THINKING_TEMPLATE, TOOLS_TEMPLATE, chat_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import says, served
from tests.serving.test_tool_calls import TOOLS, error_of

pytest.importorskip("llguidance")
END = 256
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


# --- over HTTP --------------------------------------------------------------------------------


CHAT = [{"role": "user", "content": "Hi"}]


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
        assert "beside tools" in refused(tools=TOOLS)[1]
        assert "beside ignore_eos" in refused(ignore_eos=True)[1]
        monkeypatch.setattr("smolrun.serving.chat_completions.is_installed", lambda: False)
        assert 'pip install "smolrun[json]"' in refused()[1]

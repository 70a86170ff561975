"""OpenAI's API over a fake engine, by real sockets."""

from __future__ import annotations

import json
from pathlib import Path

from tests.serving.fake_engine import FakeEngine
from tests.serving.server import says, served
from tests.waiting import until


def events(text: str) -> list[dict]:
    """The JSON of a stream, which must end with [DONE]."""
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def test_a_chat_is_answered_as_a_whole_and_as_a_stream(tmp_path: Path):
    with served(FakeEngine(says("Grüße")), tmp_path) as server:
        with server.client as client:
            until(lambda: client.get("/readyz").status_code == 200)
        whole = server.chat().json()
        assert whole["choices"][0]["message"]["content"] == "Grüße"
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 8,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        chunks = events(server.chat(stream=True).text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert [delta["content"] for delta in deltas[1:-1]] == list("Grüße")
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

"""/chat, /query, /config, /health; the pages; the measurements; the description of the API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from urllib.parse import urljoin

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, echoes, served


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(FakeEngine(echoes), tmp_path_factory.mktemp("echo")) as server:
        yield server


def test_chat_streams_tokens_and_ends_with_the_whole(echo: Served):
    answer = echo.client.post("/chat", json={"text": "Grüße", "max_tokens": 50})
    data = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data:")]
    assert [event["token"] for event in data[:-1]] == list("Grüße")
    assert not any(event["done"] for event in data[:-1])
    last = data[-1]
    assert last["done"] is True and last["full_text"] == "Grüße"
    assert last["num_tokens"] == 8 and last["worker_rank"] == 0
    assert 0 < last["time_to_first_token_ms"] <= last["total_time_ms"]
    assert last["tokens_per_second"] > 0


def test_query_answers_as_a_whole(echo: Served):
    fields = {"text": "abc", "max_tokens": 2, "decoding_strategy": "greedy", "top_k": 5}
    answer = echo.client.post("/query", json=fields).json()
    assert answer["generated_text"] == "ab" and answer["success"] is True
    sampling = echo.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_k) == (0, 5)


@pytest.mark.parametrize("path", ["/chat", "/query"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", 5),
        ("text", None),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.5),
        ("top_p", 2),
        ("top_k", -2),
        ("seed", "1"),
        ("decoding_strategy", "beam"),
    ],
)
def test_a_wrong_field_is_named(echo: Served, path: str, field: str, value: object):
    wrong = echo.client.post(path, json={"text": "Hi", field: value})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == field


def test_config_and_health(echo: Served):
    config = echo.client.get("/config").json()
    assert config["model_name"] == "fake" and config["max_sequence_length"] == 512
    assert config["answers_chats"] is False
    assert echo.client.get("/health").json() == {"status": "connected", "healthy": True}


def test_measurements_are_there_under_both_names(echo: Served):
    echo.chat("abc")
    text = echo.client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def value(name: str, sample: str) -> float:
        return next(s.value for s in families[name].samples if s.name == sample)

    assert value("smolrun_generated_tokens", "smolrun_generated_tokens_total") >= 4
    for ours, theirs, suffix in (
        ("smolrun_generated_tokens", "vllm:generation_tokens", "_total"),
        ("smolrun_time_to_first_token_seconds", "vllm:time_to_first_token_seconds", "_count"),
        ("smolrun_request_seconds", "vllm:e2e_request_latency_seconds", "_sum"),
        ("smolrun_requests_waiting", "vllm:num_requests_waiting", ""),
        ("smolrun_cache_usage_ratio", "vllm:kv_cache_usage_perc", ""),
    ):
        assert value(ours, ours + suffix) == value(theirs, theirs + suffix)
    assert value("smolrun_requests_running", "smolrun_requests_running") == 0


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_pages_need_no_other_server(echo: Served, path: str):
    answer = echo.client.get(path)
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", answer.text)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "smolrun" in answer.text
    scripts = re.findall(r"<script[^>]* src=[\"']([^\"']+)", answer.text)
    texts = [answer.text, *(echo.client.get(urljoin(path, script)).text for script in scripts)]
    assert any("v1/chat/completions" in text for text in texts)


def test_the_description_names_every_path_and_its_errors(echo: Served):
    schema = echo.client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/chat", "/readyz"} <= {
        *schema["paths"]
    }
    answers = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= {*answers}
    assert "422" not in answers

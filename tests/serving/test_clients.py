"""Programs that others wrote talk to the server as they talk to OpenAI's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolrun.serving.access import AccessPolicy
from smolrun.serving.messages import Submit
from tests.serving.chat_model import TOOLS_TEMPLATE, chat_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, says, served
from tests.waiting import SOON_S, until

KEY = "sk-test"
SAYS = "Grüße aus dem Keller €"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A chat model behind a key, which always says the same."""
    folder = tmp_path_factory.mktemp("chat")
    chat_model(folder)
    engine = FakeEngine(says(SAYS, end=256), step_s=0.001)
    with served(engine, folder, AccessPolicy(api_key=KEY)) as found:
        yield found


MESSAGES: Any = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Who are you?"},
]


def test_openai_sync(server: Served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, timeout=SOON_S) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        assert client.models.retrieve("fake").owned_by == "smolrun"
        whole = client.chat.completions.create(
            model="fake", messages=MESSAGES, logprobs=True, top_logprobs=2, seed=1, temperature=0.0
        )
        assert whole.choices[0].message.content == SAYS
        assert whole.choices[0].finish_reason == "stop"
        content = whole.choices[0].logprobs.content
        assert b"".join(bytes(token.bytes) for token in content).decode() == SAYS
        assert whole.usage.completion_tokens == len(SAYS.encode()) + 1
        stream = client.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SAYS
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        text = client.completions.create(model="fake", prompt="Once", max_tokens=2)
        assert text.choices[0].text == "Gr"
        with client.chat.completions.stream(model="fake", messages=MESSAGES) as helper:
            assert helper.get_final_completion().choices[0].message.content == SAYS


def test_openai_knows_our_errors(server: Served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="fake", messages=MESSAGES, temperature=-1)
        assert wrong.value.param == "temperature"
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                model="fake",
                messages=MESSAGES,
                tools=[{"type": "function", "function": {"name": "f"}}],
                tool_choice="required",
            )
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="fake", input="text")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        server.engine.frontend.fail("rank 1 is lost")
        try:
            with pytest.raises(openai.InternalServerError) as lost:
                client.chat.completions.create(model="fake", messages=MESSAGES)
            assert lost.value.status_code == 503
        finally:
            server.engine.say_ready()


WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def calls_then_answers(submit: Submit, _: int) -> list[int]:
    """The script of a model that calls a function, and answers once it has its result."""
    has_result = b"<tool_response>\n12 degrees" in bytes(id for id in submit.prompt_ids if id < 256)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    return [*("It has 12 degrees." if has_result else call).encode(), 256]


@pytest.fixture(scope="module")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tools")
    chat_model(folder, TOOLS_TEMPLATE)
    engine = FakeEngine(calls_then_answers, max_sequence_length=4096)
    with served(engine, folder, AccessPolicy(api_key=KEY)) as found:
        yield found


def test_openai_calls_a_function_and_answers_with_its_result(tool_server: Served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=tool_server.url + "/v1", api_key=KEY, timeout=SOON_S) as client:
        messages: list[Any] = [{"role": "user", "content": "What is the weather in Bonn?"}]
        chat = client.chat.completions
        with chat.stream(model="fake", messages=messages, tools=[WEATHER]) as stream:
            finals = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
            choice = stream.get_final_completion().choices[0]
        assert [(event.name, event.arguments) for event in finals] == [
            ("weather", '{"city": "Bonn"}')
        ]
        assert choice.finish_reason == "tool_calls"
        whole = chat.create(model="fake", messages=messages, tools=[WEATHER]).choices[0].message
        (call,) = whole.tool_calls
        assert call.function.arguments == '{"city": "Bonn"}'
        messages += [whole, {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}]
        answer = chat.create(model="fake", messages=messages, tools=[WEATHER]).choices[0]
        assert (answer.message.content, answer.finish_reason) == ("It has 12 degrees.", "stop")
        assert answer.message.tool_calls is None


def test_openai_raises_the_error_of_a_stream(server: Served):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)
    with client, pytest.raises(openai.APIError, match="rank 1 is lost"):
        for chunk in client.chat.completions.create(model="fake", messages=MESSAGES, stream=True):
            if chunk.choices[0].delta.content:
                server.engine.frontend.fail("rank 1 is lost")
    server.engine.say_ready()


def test_openai_async(server: Served):
    openai = pytest.importorskip("openai")

    async def conversation() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model="fake", messages=MESSAGES, stream=True
                )
                parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
                return "".join(parts)

            return list(await asyncio.gather(*(one() for _ in range(10))))

    assert asyncio.run(conversation()) == [SAYS] * 10


@pytest.mark.soak
def test_litellm(server: Served):
    litellm = pytest.importorskip("litellm")
    given = {"model": "openai/fake", "messages": MESSAGES, "api_base": server.url + "/v1"}
    given["api_key"] = KEY
    assert litellm.completion(**given).choices[0].message.content == SAYS
    chunks = litellm.completion(**given, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAYS


@pytest.mark.soak
def test_langchain(server: Served):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="fake", base_url=server.url + "/v1", api_key=KEY)
    answer = chat.invoke([("system", "Be short."), ("human", "Hello?")])
    assert (
        answer.content == SAYS and answer.usage_metadata["output_tokens"] == len(SAYS.encode()) + 1
    )
    assert "".join(chunk.content for chunk in chat.stream("Hello?")) == SAYS
    assert [one.content for one in chat.batch(["a", "b", "c"])] == [SAYS] * 3


@pytest.mark.soak
def test_llm_on_the_command_line(server: Served, tmp_path: Path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: fake\n  api_base: {server.url}/v1\n  api_key_name: here\n"
    )
    (tmp_path / "keys.json").write_text(f'{{"here": "{KEY}"}}')
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for options in (["--no-stream"], []):
        command = [sys.executable, "-m", "llm", "-m", "here", *options, "Hello?"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == SAYS, done.stderr


@pytest.mark.soak
def test_schemathesis(tmp_path: Path):
    """Every request that its description allows, and many that it forbids."""
    pytest.importorskip("schemathesis")
    engine = FakeEngine(lambda submit, _: submit.prompt_ids[:3])
    with served(engine, tmp_path) as found:
        command = [sys.executable, "-m", "schemathesis.cli", "run", found.url + "/openapi.json"]
        # Two workers at once fail inside hypothesis with CPython 3.11 (recursion depth of its AST).
        command += ["--max-examples", "100", "--workers", "1", "--seed", "1"]
        # Whether a model and its tokens exist, and a prompt fits, no description can say.
        command += ["--exclude-checks", "positive_data_acceptance"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-2000:]
        until(found.is_at_rest)

"""task=chat on a running server: turns, thoughts, Ctrl-C, and what goes wrong."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.cli.run import drive
from smolrun.driver.serving_client import ChatClient
from smolrun.errors import SmolrunError
from smolrun.serving.access import AccessPolicy
from tests.serving.chat_model import THINKING_TEMPLATE, chat_model
from tests.serving.fake_engine import FakeEngine
from tests.serving.server import Served, says, served
from tests.waiting import until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with served(FakeEngine(says("Fine.")), tmp_path) as running:
        yield running


def chat(monkeypatch: pytest.MonkeyPatch, url: str, typed: str, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return drive(compose(["task=chat", f"serving.url={url}", *words]))


def test_every_turn_brings_all_that_was_said(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert chat(monkeypatch, server.url, "How are you?\n\nReally?\n", "chat.system=Be short") == 0
    assert capsys.readouterr().out == "Fine.\nFine.\n"
    prompts = [bytes(one.prompt_ids).decode() for one in server.engine.submitted]
    assert prompts == [
        "Be short\nHow are you?",
        "Be short\nHow are you?\nFine.\nReally?",
    ]


def test_a_running_server_is_asked_with_the_given_temperature_and_length(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["serving.temperature=0", "serving.max_tokens=7"]
    assert chat(monkeypatch, server.url, "How are you?\n", *keys) == 0
    (submitted,) = server.engine.submitted
    assert (submitted.sampling.temperature, submitted.max_tokens) == (0, 7)


@pytest.mark.parametrize("task", ["task=chat", "task=generate"])
def test_an_answer_that_is_cut_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, task: str
) -> None:
    with served(FakeEngine(says("A long answer.")), tmp_path) as server:
        for tokens, is_cut in ((7, True), (100, False)):
            monkeypatch.setattr(sys, "stdin", io.StringIO("Talk\n"))
            words = [task, f"serving.url={server.url}", f"serving.max_tokens={tokens}"]
            assert drive(compose(words)) == 0
            said = capsys.readouterr()
            assert said.out == f"{'A long answer.'[:tokens]}\n"
            assert ("the answer is cut, by serving.max_tokens" in said.err) == is_cut


def test_a_conversation_without_room_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with served(FakeEngine(says("Fine."), max_sequence_length=40), tmp_path) as server:
        typed = ["A first question", "A second question", "x" * 80, "Third?", "/exit", "Fourth?"]
        assert chat(monkeypatch, server.url, "\n".join(typed), "chat.system=Be short") == 0
        prompts = [bytes(one.prompt_ids).decode() for one in server.engine.submitted]
    said = capsys.readouterr()
    assert prompts == [
        "Be short\nA first question",
        "Be short\nA second question",
        "Be short\nThird?",
    ]
    assert said.err.count("it begins anew") == 2
    assert said.err.count("the prompt has ") == 1, "of the one that has no room even alone"


def test_a_line_that_is_no_text_is_not_sent(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nReally?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert drive(compose(["task=chat", f"serving.url={server.url}"])) == 0
    said = capsys.readouterr()
    assert said.out == "Fine.\n"
    assert "smolrun: a line that is not utf-8 is not sent\n" in said.err
    assert [bytes(one.prompt_ids).decode() for one in server.engine.submitted] == ["Really?"]


def test_thoughts_are_no_part_of_what_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    chat_model(tmp_path, THINKING_TEMPLATE)
    with served(FakeEngine(says("<think>Hm.</think>Yes.", 256)), tmp_path) as server:
        assert chat(monkeypatch, server.url, "Do you?\nSure?\n") == 0
        second = bytes(id for id in server.engine.submitted[1].prompt_ids if id < 256).decode()
    assert capsys.readouterr().out.count("Hm.") == 2
    assert "Yes." in second and "Hm." not in second


@pytest.mark.skipif(os.name == "nt", reason="a signal to one's own process ends it there")
def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    engine = FakeEngine(says("x" * 400), step_s=0.02)
    with served(engine, tmp_path) as server:

        def interrupt() -> None:
            until(lambda: engine.generated > 3)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        assert chat(monkeypatch, server.url, "Talk\n") == 0
        thread.join()
        until(server.is_at_rest)
        assert len(engine.cancelled) == 1
    assert capsys.readouterr().out.rstrip().endswith(" ...")


def test_a_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(FakeEngine(says("Hi")), tmp_path, AccessPolicy(api_key="secret")) as server:
        with pytest.raises(SmolrunError, match=r"answered 401: .*; set SMOLRUN_API_KEY to its API"):
            ChatClient(server.url)
        monkeypatch.setenv("SMOLRUN_API_KEY", "secret")
        client = ChatClient(f"{server.url}/v1/")
        assert client.model == "fake"
        answer = client.answer([{"role": "user", "content": "Hello"}])
        assert "".join(text for text, _ in answer) == "Hi"


def test_a_server_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    assert chat(monkeypatch, "http://127.0.0.1:9", "Hi\n") == 3
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err

"""Text that a model writes before and after training; the model here answers by heart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smolrun.data.chat import Chat
from smolrun.data.prepared import Prepared
from smolrun.data.text import TextFiles
from smolrun.data.tokenizer import load_tokenizer
from smolrun.events import TextSample
from smolrun.training.evaluation import TextSampling
from smolrun.training.trainer import TrainOutcome

KEYS: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": 300, "max_mb": None, "eval_fraction": 0.5}


class Parrot:
    """Says the same tokens, whatever is asked, then one token for ever."""

    is_lockstep = True
    steps_begun = 0

    def __init__(self, token_ids: list[int], vocab_size: int) -> None:
        self._rest: Iterator[int] = iter(token_ids)
        self._vocab_size = vocab_size
        self.asked: list[list[int]] = []

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.asked.append(tokens[0].tolist())
        logits = torch.full((1, tokens.shape[1], self._vocab_size), -1e9)
        logits[0, -1, next(self._rest, 65)] = 0.0
        return logits


@pytest.fixture
def chats(tmp_path: Path) -> Prepared:
    lines = [
        {"prompt": f"What is {number}?", "completion": f"A number, {number}."}
        for number in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = str(tmp_path / "chats.jsonl")
    keys = {**KEYS, "subset": None, "split": "train", "template": "auto", "packing": True}
    return Chat(tmp_path, path=path, sequence_length=64, **keys).prepare(lambda *_: None)


def sampled(prepared: Prepared, says: str, *, ends: bool, **keys: Any) -> tuple[TextSample, Parrot]:
    tokenizer = load_tokenizer(str(prepared.tokenizer))
    answer = [*tokenizer.encode(says), *([tokenizer.end_id] if ends else [])]
    parrot, events = Parrot(answer, prepared.num_outputs), list[Any]()
    given: dict[str, Any] = {"prompt": "auto", "num_tokens": 40, "seed": 0, "compares": False}
    sampling = TextSampling(
        algorithm=parrot,  # type: ignore[arg-type]
        prepared=prepared,
        emit=events.append,
        **{**given, **keys},
    )
    sampling.before_training()
    if not events:
        sampling.after_training(TrainOutcome(steps=7))
    (event,) = events
    return event, parrot


@pytest.mark.parametrize("prompt", ["auto", "What is 4?"])
def test_a_question_is_answered_up_to_the_end_token(chats: Prepared, prompt: str) -> None:
    event, parrot = sampled(chats, "A number.", ends=True, prompt=prompt)
    assert (event.step, event.text, event.is_answer) == (7, "A number.", True)
    assert event.prompt.startswith("What is ") and event.prompt.endswith("?")
    # The model saw it as the template writes it, with the beginning of an answer.
    asked = load_tokenizer(str(chats.tokenizer)).decode(parrot.asked[0])
    assert asked == f"user:\n{event.prompt}\nassistant:\n"


def test_an_answer_without_an_end_has_so_many_tokens(chats: Prepared) -> None:
    event, parrot = sampled(chats, "A", ends=False, num_tokens=5)
    assert len(parrot.asked) == 5 and event.text.startswith("A")


def test_a_template_that_cannot_be_read_costs_no_trained_run(chats: Prepared) -> None:
    (Path(str(chats.tokenizer)) / "chat_template.jinja").write_text("{{ nothing() }}")
    event, _ = sampled(chats, "A number.", ends=False, prompt="Hi")
    assert (event.prompt, event.is_answer) == ("Hi", False)


def test_before_the_first_step_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time there was a king. " * 30)
    keys = {**KEYS, "path": str(tmp_path / "a.txt"), "glob": "*", "sequence_length": 16}
    prepared = TextFiles(tmp_path, **keys).prepare(lambda *_: None)
    event, _ = sampled(prepared, " the sea", ends=False, compares=True, prompt="Once upon")
    assert (event.step, event.prompt, event.is_answer) == (0, "Once upon", False)
    assert event.text.startswith(" the sea")


def test_a_resumed_run_is_not_compared_with_its_middle() -> None:
    resumed = SimpleNamespace(is_lockstep=True, steps_begun=3)
    late = SimpleNamespace(is_lockstep=False, steps_begun=0)
    for algorithm in (resumed, late):
        sampling = TextSampling(
            algorithm=algorithm,  # type: ignore[arg-type]
            prepared=None,  # type: ignore[arg-type]
            prompt="",
            num_tokens=1,
            seed=0,
            compares=True,
            emit=pytest.fail,
        )
        sampling.before_training()

"""Evaluation: the loss and accuracy on held-out samples while and after the model trains, and text
that a trained language model generates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolrun.algorithms.base import Algorithm
from smolrun.data.chat_template import ChatTemplate
from smolrun.data.splits import IGNORE_INDEX, Batch, Prepared, open_split
from smolrun.data.tokenizer import TextTokenizer, load_tokenizer
from smolrun.events import EvalDone, Event, TextSample
from smolrun.models.sampling import Sampling, sample
from smolrun.training.trainer import Callback, Periodic, TrainOutcome

_TEMPERATURE, _TOP_K = 0.8, 40
_PROMPT_TOKENS = 8  # of an evaluation sample, where the config has no prompt


class Evaluation(Periodic):
    """Evaluates every `every` updates and after the last one; emits `EvalDone`."""

    def __init__(
        self,
        algorithm: Algorithm,
        batches: Callable[[], Iterable[list[Batch]]],
        every: int,
        emit: Callable[[Event], None],
    ) -> None:
        """`batches` gives this rank's micro-batches of every global batch."""
        super().__init__(every)
        self.on_done: Callable[[], None] = lambda: None  # called after each evaluation
        self._loss: float | None = None  # the latest
        self._algorithm = algorithm
        self._batches = batches
        self._emit = emit
        self._evaluated_at = 0  # updates

    def run(self, step: int, due: int) -> None:
        """Collective between the ranks that evaluate together."""
        total, weight, correct, has_classes = 0.0, 0, 0, True
        for micro_batches in self._batches():
            sums = self._algorithm.eval_step(micro_batches)
            total, weight = total + sums.loss, weight + sums.num_targets
            correct += sums.correct or 0
            has_classes = has_classes and sums.correct is not None
        self._loss = total / weight if weight else float("nan")
        self._evaluated_at = step + 1
        accuracy = correct / max(1, weight) if has_classes else None
        self._emit(EvalDone(step, self._loss, weight, accuracy))
        self.on_done()

    def after_training(self, outcome: TrainOutcome) -> None:
        """Evaluates, unless it did after the last update or the run was stopped."""
        if self._evaluated_at != outcome.steps and not outcome.was_stopped:
            self.run(outcome.steps - 1, outcome.steps)
        outcome.final_eval_loss = self._loss

    def state(self) -> dict[str, Any]:
        """The latest loss and when it was measured."""
        return {"eval_loss": self._loss, "evaluated_at": self._evaluated_at}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues with the latest loss."""
        super().restore(state)
        self._loss = state["eval_loss"]
        self._evaluated_at = int(state["evaluated_at"])


@dataclass(frozen=True)
class _Prompt:
    """Token ids for the model, and the text of them that people read. `stops` end an answer."""

    token_ids: list[int]
    text: str
    is_question: bool = False
    stops: Collection[int] = ()


@dataclass(frozen=True, kw_only=True)
class TextSampling(Callback):
    """Emits a `TextSample` of the trained model at the end of a run that was not stopped: a text
    that it continues or, where the data are conversations, its answer to a question. With
    `compares` also one before the first step."""

    algorithm: Algorithm
    prepared: Prepared
    prompt: str  # "auto": the beginning of the first evaluation sample
    num_tokens: int
    seed: int
    compares: bool
    emit: Callable[[Event], None]

    def before_training(self) -> None:
        """Collective where the model is split between ranks."""
        # Where ranks do not begin together, workers would wait for the server.
        if self.compares and self.algorithm.is_lockstep and not self.algorithm.steps_begun:
            self._sample(0)

    def after_training(self, outcome: TrainOutcome) -> None:
        """Collective where the model is split between ranks."""
        if not outcome.was_stopped:
            self._sample(outcome.steps)

    def _sample(self, step: int) -> None:
        tokenizer = load_tokenizer(self.prepared.tokenizer or "")
        prompt = self._question(tokenizer) if self.prepared.masked else self._beginning(tokenizer)
        token_ids = generate(
            self.algorithm.logits,
            prompt.token_ids or [0],
            self.num_tokens,
            context_length=self.prepared.sequence_length or 1,
            seed=self.seed,
            stops=prompt.stops,
        )
        text = tokenizer.decode([one for one in token_ids if one not in prompt.stops])
        self.emit(TextSample(step, prompt.text, text, prompt.is_question))

    def _beginning(self, tokenizer: TextTokenizer) -> _Prompt:
        text = self.prompt
        if text == "auto":
            sample = open_split(self.prepared, "eval", verify=False).batch([0])
            text = tokenizer.decode(sample.inputs[0, :_PROMPT_TOKENS].tolist())
        return _Prompt(tokenizer.encode(text), text)

    def _question(self, tokenizer: TextTokenizer) -> _Prompt:
        """As the chat template writes it, up to the place where the answer begins."""
        special = tokenizer.special_tokens().values()
        if self.prompt == "auto":
            sample = open_split(self.prepared, "eval", verify=False).batch([0])
            answer = int((sample.targets[0] != IGNORE_INDEX).int().argmax())
            token_ids = sample.inputs[0, : answer + 1].tolist()
            text = _last_question(tokenizer, token_ids, special)
        else:
            text = self.prompt
            try:
                template = ChatTemplate(Path(self.prepared.tokenizer or ""), tokenizer)
                whole = template.write([{"role": "user", "content": text}], asks=True)
            except Exception:  # of a template: no reason to lose a run that is trained
                return _Prompt(tokenizer.encode(text), text)
            (token_ids,) = tokenizer.encode_markup([whole])
        return _Prompt(token_ids, text, True, {tokenizer.end_id, *special})


def _last_question(
    tokenizer: TextTokenizer, token_ids: Sequence[int], special: Collection[int]
) -> str:
    """What the user says last in a conversation as ChatML or our plain template writes it; all of
    the text in other templates."""
    messages: list[list[int]] = [[]]
    for token_id in token_ids:
        if token_id in special:
            messages.append([])
        else:
            messages[-1].append(token_id)
    texts = [tokenizer.decode(ids) for ids in messages]
    for text in reversed(texts):
        if text.startswith("user\n"):
            return text.removeprefix("user\n").strip()
    text = "".join(texts)
    return text.rpartition("user:\n")[2].removesuffix("assistant:\n").strip()


@torch.no_grad()
def generate(
    logits: Callable[[torch.Tensor], torch.Tensor],
    prompt: list[int],
    num_tokens: int,
    *,
    context_length: int,
    seed: int,
    stops: Collection[int] = (),
) -> list[int]:
    """Token ids that the model samples after `prompt`, up to one of `stops`; collective where
    `logits` is, and equal on all ranks.

    Runs the whole context for every token, without a KV cache: so it works for every way of
    splitting a model.
    """
    sampling = Sampling(temperature=_TEMPERATURE, top_k=_TOP_K, seed=seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-context_length:]])
        last_V = logits(window)[0, -1].float().cpu().numpy()
        tokens.append(sample(last_V, sampling, position=len(tokens)).token_id)
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]

"""POST /v1/completions: texts or token ids in, their continuations out, in OpenAI's older shapes.

Several prompts are one request each for the engine; a choice has the number
`prompt * n + choice`.
"""

from __future__ import annotations

import codecs
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from smolrun.serving.api_errors import ApiError, refuse
from smolrun.serving.generation import Generation, Piece, Service
from smolrun.serving.messages import Score
from smolrun.serving.protocol import CompletionRequest
from smolrun.serving.responses import Completion
from smolrun.serving.text import Delta, TokenText, token_text

_DEFAULT_MAX_TOKENS = 16  # of OpenAI's API


@dataclass
class _Echo:
    """A prompt that is to be repeated; its log-probabilities come in parts, before any token."""

    text: str
    ids: list[int]
    scores: list[Score | None] = field(default_factory=list)
    is_sent: set[int] = field(default_factory=set)


class _Offsets:
    """Where the tokens of a choice begin, in characters: one that several tokens make up counts
    once, as in the text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0

    def add(self, token: TokenText) -> int:
        """The offset of the next token."""
        offset = self._end
        self._end += len(self._decoder.decode(token.bytes))
        return offset


class TextCompletion(Completion[CompletionRequest]):
    """One request."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, body: CompletionRequest, request: Request) -> None:
        super().__init__(service, body, request)
        self._echoes: list[_Echo] = []
        self._offsets: defaultdict[int, _Offsets] = defaultdict(_Offsets)  # of every choice

    async def begin(self) -> list[Generation]:
        """One a prompt."""
        body, service = self.body, self.service
        prompts = _prompts(body.prompt)
        service.check(body.model, self.n * len(prompts), body.worker_rank)
        refuse(
            suffix=bool(body.suffix),
            best_of=body.best_of is not None and body.best_of != self.n,
        )
        encoded = [await self._encoded(prompt) for prompt in prompts]
        return service.begin(
            encoded,
            body,
            max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
            request_id=self.request_id,
            param="prompt",
            top_logprobs=body.logprobs,
            echo_logprobs=bool(body.echo) and body.logprobs is not None,
        )

    async def _encoded(self, prompt: str | list[int]) -> list[int]:
        prompts = self.service.prompts
        if isinstance(prompt, str):
            text = prompt
            ids = await self.service.encoded(len(text), lambda: prompts.text(text), "prompt")
        else:
            ids = prompt
            outside = [id for id in ids if id >= prompts.tokenizer.vocab_size]
            if outside:
                message = f"prompt: the model has no token {outside[0]}"
                raise ApiError(400, message, param="prompt", code="invalid_value")
            data = b"".join(prompts.token_bytes[id] for id in ids)
            text = data.decode("utf-8", "replace")
        if self.body.echo:
            self._echoes.append(_Echo(text, ids))
        return ids

    def entries(self, prompt: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """The text, with the end in its last entry."""
        if piece.prefill is not None and self._echoes and piece.prefill.logprobs:
            self._echoes[prompt].scores += piece.prefill.logprobs
        if piece.is_progress:
            return
        index, delta = prompt * self.n + piece.choice, self._delta(prompt, piece)
        logprobs = None if self.body.logprobs is None else self._logprobs(index, delta)
        reason = piece.reason
        yield {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, prompt: int, piece: Piece) -> Delta:
        """With the prompt before the first piece of a choice, if it is to be repeated."""
        if not self._echoes or piece.choice in self._echoes[prompt].is_sent:
            return piece.delta
        echo = self._echoes[prompt]
        echo.is_sent.add(piece.choice)
        scores = [*echo.scores, *[None] * len(echo.ids)]
        every = self.service.prompts.token_bytes
        tokens = [
            token_text(every, id, *(score or ()))
            for id, score in zip(echo.ids, scores, strict=False)
        ]
        return Delta(echo.text + piece.delta.text, [*tokens, *piece.delta.tokens])

    def _logprobs(self, number: int, delta: Delta) -> dict[str, Any]:
        offsets = self._offsets[number]
        return {
            "tokens": [token.text for token in delta.tokens],
            "token_logprobs": [token.logprob for token in delta.tokens],
            "top_logprobs": [
                None if token.top is None else {t.text: t.logprob for t in [*token.top, token]}
                for token in delta.tokens
            ],
            "text_offset": [offsets.add(token) for token in delta.tokens],
        }


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One entry a prompt, of what a request may give as one."""
    if isinstance(given, str):
        return [given]
    prompts: list[str | list[int]] = []
    numbers: list[int] = []
    for item in given:
        if isinstance(item, int):
            numbers.append(item)
        else:
            prompts.append(item)
    return [numbers] if numbers else prompts

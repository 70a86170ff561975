"""A stage whose next token is a function of all tokens before it, so that text shows every mistake
of scheduling, caching and sending. Keeps a cache per slot, as a real stage does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolrun.serving.batch import Batch, BatchResult, Opened, PromptLogprobs, Row, Sampled

VOCAB = 1000
POISON = 13  # a prompt that ends with it makes logits that are not finite
_PRIME = 2**31 - 1


def _mixed(values: Sequence[int], stage: int) -> int:
    result = stage + 1
    for value in values:
        result = (result * 31 + value + 7) % _PRIME
    return result


def expected_text(prompt: Sequence[int], count: int, *, stages: int, choice: int = 0) -> list[int]:
    """What `stages` fake stages generate for one sequence that is alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(expected_next(tokens, stages=stages, choice=choice))
    return tokens[len(prompt) :]


def expected_next(tokens: Sequence[int], *, stages: int, choice: int = 0) -> int:
    """The token after `tokens`."""
    hidden = list(tokens)
    for stage in range(stages):
        hidden = [_mixed(hidden[: index + 1], stage) for index in range(len(hidden))]
    return (hidden[-1] + choice) % VOCAB


class FakeStage:
    """Stage `index` of `stages`; satisfies StageRunner."""

    width = 1
    dtype = torch.int64

    def __init__(self, index: int, stages: int, *, slots: int, capacity: int) -> None:
        self.max_tokens = 10_000
        self.batches: list[Batch] = []
        self._index, self._stages, self._capacity = index, stages, capacity
        self._cache: list[list[int]] = [[] for _ in range(slots)]  # what came in, by position
        self._opened: dict[int, Opened] = {}

    def run(self, batch: Batch, hidden_TD: Tensor | None) -> Tensor | BatchResult:
        self.batches.append(batch)
        for fork in batch.forks:
            assert len(self._cache[fork.source]) >= fork.length, "a fork of tokens not computed"
            self._cache[fork.target] = self._cache[fork.source][: fork.length]
        for opened in batch.opened:
            self._opened[opened.slot] = opened
        assert len({row.slot for row in batch.rows}) == len(batch.rows), "a slot twice in a batch"
        given = batch.token_ids if hidden_TD is None else hidden_TD[:, 0].tolist()
        assert len(given) == sum(row.count for row in batch.rows)
        outputs, result, position = [], BatchResult(batch.number), 0
        for row in batch.rows:
            cache = self._cache[row.slot]
            assert len(cache) >= row.start, "a hole in the cache"
            del cache[row.start :]
            values = given[position : position + row.count]
            tokens = batch.token_ids[position : position + row.count]
            position += row.count
            cache.extend(values)
            assert len(cache) <= self._capacity
            ends = range(row.start + 1, row.start + row.count + 1)
            mixed = [_mixed(cache[:end], self._index) for end in ends]
            outputs.extend(mixed)
            if row.is_sampled:
                result.sampled.append(self._sample(row, mixed[-1], tokens[-1]))
            if row.logprobs:
                following = [*tokens[1:], *([] if row.next_id is None else [row.next_id])]
                result.prompt_logprobs.append(
                    PromptLogprobs(row.slot, [(-token / VOCAB, []) for token in following])
                )
        if self._index == self._stages - 1:
            return result
        return torch.tensor(outputs, dtype=self.dtype)[:, None]

    def _sample(self, row: Row, value: int, last: int) -> Sampled:
        slot, opened = row.slot, self._opened[row.slot]
        if last == POISON and row.start + row.count == opened.prompt_tokens:
            return Sampled(slot, 0, error="the logits are not finite")
        token = (value + opened.choice) % VOCAB
        return Sampled(slot, token, None if opened.top_logprobs is None else -0.5)

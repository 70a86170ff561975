"""One pass of tokens through all stages: the plan that rides in front of the hidden states.

    rows       slot 3: 1 token (decode)   slot 0: 5 tokens (a chunk of a prompt)   ...
    token_ids  a                          b c d e f                                 flat, no padding

Every stage keeps the keys and values of its own layers in numbered slots, one sequence each. The
last stage samples, so it learns from the same plan how (`opened`) and what was seen before
(`token_ids` of all passes); only a BatchResult travels back. Pure data.
"""

from __future__ import annotations

import msgspec

from smolrun.models.sampling import Sampling
from smolrun.serving.messages import Score, StageStats


class Row(msgspec.Struct, frozen=True, array_like=True):
    """`count` new tokens of the sequence in `slot`, which holds `start` already.

    `is_sampled`: the last of them decides the next token. `logprobs`: of the token after each of
    them, within the prompt, as PromptLogprobs; the one after the last is `next_id` (None: there is
    none in the prompt)."""

    slot: int
    start: int
    count: int
    is_sampled: bool
    logprobs: bool = False
    next_id: int | None = None

    @property
    def num_logprobs(self) -> int:
        """Of a row with `logprobs`."""
        return self.count - (self.next_id is None)


class Fork(msgspec.Struct, frozen=True, array_like=True):
    """Copy the first `length` tokens of a slot into another one, before anything else."""

    source: int
    target: int
    length: int


class Opened(msgspec.Struct, frozen=True, array_like=True):
    """A sequence begins in a slot. `history` are its tokens that no pass will bring, as they come
    by a fork or are there already; penalties count them. Its first `prompt_tokens` tokens are the
    prompt, the others are generated."""

    slot: int
    sampling: Sampling
    choice: int
    top_logprobs: int | None
    history: list[int]
    prompt_tokens: int


class Batch(msgspec.Struct, frozen=True):
    """Rows in the order of their tokens; forks and opened sequences come first."""

    number: int
    rows: list[Row]
    token_ids: list[int]
    forks: list[Fork] = []
    opened: list[Opened] = []

    def logit_tokens(self) -> list[int]:
        """The places in `token_ids` whose logits the last stage computes: all tokens of a row with
        `logprobs`, else the last one of a sampled row."""
        places: list[int] = []
        first = 0
        for row in self.rows:
            after = first + row.count
            if row.logprobs:
                places += range(first, after)
            elif row.is_sampled:
                places.append(after - 1)
            first = after
        return places


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """The next token of a row with `is_sampled`, and its log-probabilities if asked for. `error`:
    why there is none (logits that are not finite); then the other fields mean nothing."""

    slot: int
    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    error: str | None = None


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of the prompt's tokens after each token of a row with `logprobs`."""

    slot: int
    values: list[Score]


class BatchResult(msgspec.Struct, frozen=True):
    """What the last stage reports of a batch. `stages`, if they were asked for: of all stages."""

    number: int
    sampled: list[Sampled] = []
    prompt_logprobs: list[PromptLogprobs] = []
    stages: list[StageStats] = []

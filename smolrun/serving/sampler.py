"""Samples the rows of a batch on the last stage: what it knows of each slot comes with the batches.

Shape suffixes: R rows of logits, in the order of `Batch.logit_tokens`; V vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import NonFiniteLogits
from smolrun.models.sampling import TokenHistory, sample, score
from smolrun.serving.batch import Batch, BatchResult, Opened, PromptLogprobs, Row, Sampled
from smolrun.serving.json_grammar import INSTALL, GrammarError, Grammars


class _Sequence:
    """A sequence in a slot: how it is sampled, and its tokens so far."""

    def __init__(self, opened: Opened, grammars: Grammars | None) -> None:
        self.opened = opened
        self.history = TokenHistory()
        grammar = opened.sampling.grammar
        self.matcher = grammars.matcher(grammar) if grammar and grammars is not None else None
        self.add(0, opened.history)

    def add(self, start: int, token_ids: list[int]) -> None:
        """Tokens at positions `start` and after."""
        if self.opened.sampling.has_penalties:
            prompt = max(0, self.opened.prompt_tokens - start)
            self.history.add(token_ids[:prompt], is_generated=False)
            self.history.add(token_ids[prompt:], is_generated=True)
        if self.matcher is not None:
            self.matcher.add(token_ids[max(0, self.opened.prompt_tokens - start) :])

    def next_token(self, row: Row, logits_V: NDArray[np.float32]) -> Sampled:
        """The token after the row's last one."""
        if self.opened.sampling.grammar and self.matcher is None:
            what = f"the host of the last layers has no llguidance: {INSTALL}"
            return Sampled(row.slot, 0, error=what)
        try:
            allowed_V = self.matcher.allowed() if self.matcher is not None else None
            drawn = sample(
                logits_V,
                self.opened.sampling,
                position=row.start + row.count,
                choice=self.opened.choice,
                history=self.history,
                top_logprobs=self.opened.top_logprobs,
                allowed_V=allowed_V,
            )
        except (NonFiniteLogits, GrammarError) as error:
            return Sampled(row.slot, 0, error=str(error))
        return Sampled(row.slot, *drawn)

    def prompt_logprobs(
        self, row: Row, token_ids: list[int], logits_TV: NDArray[np.float32]
    ) -> PromptLogprobs:
        """Of the prompt's token after each of the row's tokens."""
        following = token_ids[1:] + ([] if row.next_id is None else [row.next_id])
        pairs = zip(following, logits_TV, strict=False)  # the last token may have none after it
        count = self.opened.top_logprobs or 0
        return PromptLogprobs(row.slot, [score(id, row_V, count) for id, row_V in pairs])


class Sampler:
    """The sequences in the slots of a server, as sampling needs them."""

    def __init__(self, grammars: Grammars | None = None) -> None:
        """Without `grammars` a sequence that has one gets an error."""
        self._grammars = grammars
        self._sequences: dict[int, _Sequence] = {}

    def sample(self, batch: Batch, logits_RV: NDArray[np.float32]) -> BatchResult:
        """The next tokens of a batch's rows, and log-probabilities of its prompts where asked for.

        Batches must come in the order in which they ran. A row whose logits are not finite gets
        an error; the others are sampled.
        """
        for opened in batch.opened:
            self._sequences[opened.slot] = _Sequence(opened, self._grammars)
        result = BatchResult(batch.number)
        token, done = 0, 0  # of the batch's tokens and of the rows of logits
        for row in batch.rows:
            token_ids = batch.token_ids[token : token + row.count]
            token += row.count
            sequence = self._sequences[row.slot]
            sequence.add(row.start, token_ids)
            count = row.count if row.logprobs else int(row.is_sampled)
            logits_TV = logits_RV[done : done + count]
            done += count
            if row.logprobs:
                result.prompt_logprobs.append(sequence.prompt_logprobs(row, token_ids, logits_TV))
            if row.is_sampled:
                result.sampled.append(sequence.next_token(row, logits_TV[-1]))
        return result

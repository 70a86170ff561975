"""Samples the rows of a batch on the last stage: what it knows of each slot comes with the batches.

Shape suffixes: R rows of logits, in the order of `Batch.logit_tokens`; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from smolrun.errors import NonFiniteLogits
from smolrun.models.sampling import TokenHistory, log_softmax, sample
from smolrun.serving.batch import Batch, BatchOutput, Opened, Row, RowError, Sampled, Scored


@dataclass
class _Sequence:
    opened: Opened
    history: TokenHistory = field(default_factory=TokenHistory)
    # Of the token after the last one given, for rows with `logprobs`.
    next_logprobs_V: NDArray[np.float64] | None = None

    def add(self, start: int, token_ids: list[int]) -> None:
        """Tokens at positions `start` and after."""
        if self.opened.sampling.has_penalties:
            prompt = max(0, self.opened.prompt_tokens - start)
            self.history.add(token_ids[:prompt], is_generated=False)
            self.history.add(token_ids[prompt:], is_generated=True)


class Sampler:
    """The sequences in the slots of a server, as sampling needs them."""

    def __init__(self) -> None:
        self._sequences: dict[int, _Sequence] = {}

    def sample(self, batch: Batch, logits_RV: NDArray[np.float32]) -> BatchOutput:
        """The next tokens of a batch's rows. Batches must come in the order in which they ran.

        A row whose logits are not finite is reported in `errors`; the others are sampled.
        """
        for opened in batch.opened:
            self._sequences[opened.slot] = sequence = _Sequence(opened)
            sequence.add(0, opened.history)
        output = BatchOutput(batch.number, [])
        token, logits = 0, 0  # how many of the batch, and rows of logits, are done
        for row in batch.rows:
            token_ids = batch.token_ids[token : token + row.count]
            token += row.count
            self._sequences[row.slot].add(row.start, token_ids)
            count = row.count if row.logprobs else int(row.is_sampled)
            if count:
                self._run(row, token_ids, logits_RV[logits : logits + count], output)
            logits += count
        return output

    def _run(
        self, row: Row, token_ids: list[int], logits_TV: NDArray[np.float32], output: BatchOutput
    ) -> None:
        sequence = self._sequences[row.slot]
        if not row.logprobs:
            sequence.next_logprobs_V = None
        else:
            output.scored.append(Scored(row.slot, _score(sequence, token_ids, logits_TV)))
        if not row.is_sampled:
            return
        opened = sequence.opened
        try:
            drawn = sample(
                logits_TV[-1],
                opened.sampling,
                position=row.start + row.count,
                choice=opened.choice,
                history=sequence.history,
                top_logprobs=opened.top_logprobs,
            )
        except NonFiniteLogits as error:
            output.errors.append(RowError(row.slot, str(error)))
        else:
            output.sampled.append(Sampled(row.slot, *drawn))


def _score(
    sequence: _Sequence, token_ids: list[int], logits_TV: NDArray[np.float32]
) -> list[float | None]:
    """Log-probabilities of the tokens given: each by the logits of the token before it."""
    before = sequence.next_logprobs_V
    scores: list[float | None] = []
    for token_id, logits_V in zip(token_ids, logits_TV, strict=True):
        scores.append(None if before is None else float(before[token_id]))
        before = log_softmax(logits_V)
    sequence.next_logprobs_V = before
    return scores

"""The sampler of the last stage: what it knows of slots, from batches and logits made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from smolrun.models.sampling import Sampling, sample
from smolrun.serving.batch import Batch, BatchResult, Opened, Row
from smolrun.serving.sampler import Sampler

FLAT = np.zeros(1000, np.float32)


def step(
    sampler: Sampler,
    rows: Sequence[Row],
    token_ids: Sequence[int],
    logits: Sequence[NDArray[np.float32]],
    opened: Sequence[Opened] = (),
) -> BatchResult:
    batch = Batch(3, list(rows), list(token_ids), [], list(opened))
    assert len(batch.logit_tokens()) == len(logits)
    return sampler.sample(batch, np.stack(logits) if logits else np.empty((0, 4), np.float32))


def test_a_token_depends_on_seed_choice_and_position_only() -> None:
    sampling = Sampling(seed=5)
    expected = sample(FLAT, sampling, position=4, choice=2).token_id
    alone = Sampler()
    opened = Opened(7, sampling, 2, None, [], 4)
    step(alone, [Row(7, 0, 3, False)], [1, 2, 3], [], [opened])
    assert step(alone, [Row(7, 3, 1, True)], [4], [FLAT]).sampled[0].token_id == expected
    # Another slot, behind a neighbour, its prompt by a fork.
    other = Sampler()
    opened = Opened(0, sampling, 2, None, [1, 2, 3], 4)
    neighbour = Opened(1, Sampling(seed=5), 0, None, [], 2)
    rows = [Row(1, 0, 2, True), Row(0, 3, 1, True)]
    result = step(other, rows, [9, 9, 4], [FLAT, FLAT], [opened, neighbour])
    assert [sampled.slot for sampled in result.sampled] == [1, 0]
    assert result.number == 3
    assert result.sampled[1].token_id == expected != result.sampled[0].token_id


def test_penalties_know_prompt_and_generated_tokens_of_this_sequence() -> None:
    presence = Sampling(temperature=0, presence_penalty=1.0)
    repetition = Sampling(temperature=0, repetition_penalty=4.0)
    logits = np.array([3.0, 2.5, 0.0, 0.0], np.float32)
    for sampling, after_prompt, later in ((presence, 0, 1), (repetition, 1, 0)):
        sampler = Sampler()
        opened = [Opened(0, sampling, 0, None, [], 2)]
        result = step(sampler, [Row(0, 0, 2, True)], [0, 2], [logits], opened)
        assert result.sampled[0].token_id == after_prompt  # token 0 is of the prompt
        result = step(sampler, [Row(0, 2, 1, True)], [after_prompt], [logits])
        assert result.sampled[0].token_id == later
        # A new sequence in the slot knows nothing of the last one.
        opened = [Opened(0, presence, 0, None, [], 1)]
        assert step(sampler, [Row(0, 0, 1, True)], [3], [logits], opened).sampled[0].token_id == 0


def test_a_replayed_sequence_is_penalised_as_before() -> None:
    sampling = Sampling(temperature=0, frequency_penalty=1.0)
    logits = np.array([3.0, 2.5, 0.0], np.float32)
    # A prompt of 2 tokens, 2 generated ones; the first three come by a fork, the last by a pass.
    opened = [Opened(0, sampling, 0, None, [1, 1, 0], 2)]
    sampler = Sampler()
    assert step(sampler, [Row(0, 3, 1, True)], [0], [logits], opened).sampled[0].token_id == 1
    opened = [Opened(0, sampling, 0, None, [1, 1, 0], 4)]
    assert step(sampler, [Row(0, 3, 1, True)], [0], [logits], opened).sampled[0].token_id == 0


def test_logits_that_are_no_numbers_are_an_error_of_their_row_only() -> None:
    sampler = Sampler()
    opened = [Opened(slot, Sampling(temperature=0), 0, 2, [], 1) for slot in (0, 1)]
    bad, good = FLAT.copy(), FLAT.copy()
    bad[3], good[5] = math.nan, 9.0
    rows = [Row(0, 0, 1, True), Row(1, 0, 1, True)]
    first, second = step(sampler, rows, [1, 1], [bad, good], opened).sampled
    assert first.error is not None and "position 1" in first.error
    assert (second.token_id, second.error) == (5, None)
    assert second.top is not None and second.top[0] == (5, second.logprob)
    assert len(second.top) == 2


def test_log_probabilities_of_a_prompt() -> None:
    rows = [np.log(np.array(values, np.float32)) for values in ([0.5, 0.5], [0.25, 0.75])]
    opened = [Opened(0, Sampling(), 0, 1, [], 3)]
    row = Row(0, 0, 2, False, True, 0)
    (scores,) = step(Sampler(), [row], [0, 1], rows, opened).prompt_logprobs
    assert [logprob for logprob, _ in scores.values] == pytest.approx(
        [math.log(0.5), math.log(0.25)]
    )
    assert scores.values[1][1] == [(1, pytest.approx(math.log(0.75)))]
    row = Row(0, 0, 2, True, True)  # the last tokens of the prompt: none is after them
    result = step(Sampler(), [row], [0, 0], rows, opened)
    assert len(result.prompt_logprobs[0].values) == 1
    assert len(result.sampled) == 1

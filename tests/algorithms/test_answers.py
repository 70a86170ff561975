"""What a model answers and what a data set asks for fit each other, or a sentence says what does
not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from smolrun.algorithms.contract import check_answer
from smolrun.data.splits import IGNORE_INDEX, Batch
from smolrun.errors import ConfigError, DataError
from tests.algorithms import worlds

LOGITS = torch.zeros(4, 10, requires_grad=True)
FEATURES = Batch(torch.zeros(4, 7), torch.tensor([0, 1, 9, IGNORE_INDEX]))
TOKENS = Batch(torch.zeros(4, 6, dtype=torch.int64), torch.full((4, 6), 9))


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ({"loss": 1, "logits": LOGITS}, "a dict with the keys 'loss', 'logits'"),
        ((LOGITS, LOGITS), "a tuple of 2"),
        (None, "a NoneType"),
        (LOGITS.argmax(-1), "int64 numbers"),
        (LOGITS > 0, "bool numbers"),
        (LOGITS[:, 0], r"a tensor \[4\] for inputs \[4, 7\] and targets \[4\]"),
        (LOGITS.sum(), r"a tensor \[\]"),
        (LOGITS[:1], r"a tensor \[1, 10\]"),
        (LOGITS.detach(), "does not depend on any parameter"),
        (LOGITS[:, :3], "3 outputs .* 10 classes"),
        (torch.zeros(4, 32, requires_grad=True), "32 outputs .* 10 classes"),
    ],
)
def test_outputs_that_cannot_be_logits(output: Any, what: str) -> None:
    check_answer(LOGITS, FEATURES, 10)
    with pytest.raises(ConfigError, match=what):
        check_answer(output, FEATURES, 10)


@pytest.mark.parametrize(
    ("targets", "what"),
    [
        (torch.rand(4), "float32"),
        (torch.tensor([True] * 4), "bool"),
        (torch.tensor([0, 1, 2, 10]), r"0 \.\. 10, .* 10 classes"),
        (torch.tensor([0, 1, 2, -1]), r"-1 \.\. 2"),
    ],
)
def test_targets_that_cannot_be_classes(targets: torch.Tensor, what: str) -> None:
    with pytest.raises(DataError, match=what):
        check_answer(LOGITS, Batch(FEATURES.inputs, targets), 10)


def test_a_vocabulary_may_be_padded_but_not_cut() -> None:
    check_answer(torch.zeros(4, 6, 64, requires_grad=True), TOKENS, 10)
    with pytest.raises(ConfigError, match=r"9 outputs .* 10 tokens"):
        check_answer(torch.zeros(4, 6, 9, requires_grad=True), TOKENS, 10)
    with pytest.raises(DataError, match=r"9 \.\. 9"):
        check_answer(torch.zeros(4, 6, 64, requires_grad=True), TOKENS, 9)


@pytest.mark.parametrize("algorithm", worlds.ALGORITHMS)
def test_every_algorithm_looks_before_anything_is_learnt(algorithm: str) -> None:
    worlds.train(algorithm, "mlp", 1, steps=1, more={"num_outputs": 5})
    with pytest.raises(ConfigError, match=r"5 outputs .* 6 classes"):
        worlds.train(algorithm, "mlp", 1, steps=1, more={"num_outputs": 6})

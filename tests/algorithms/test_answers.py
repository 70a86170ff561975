"""What a model answers and what a data set asks for fit each other, or a sentence says what does
not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from smolrun.algorithms.contract import check_answer, loss_sum, own_loss_sum
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


def smooth(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    assert logits.shape[:1] == targets.shape
    assert targets.min() >= 0, "what is ignored would be an index"
    return cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)


def test_an_own_loss_sees_the_targets_that_are_learnt_alone() -> None:
    logits = torch.randn(4, 6, 9, requires_grad=True)
    targets = torch.randint(9, (4, 6))
    targets[1:, 2:5] = IGNORE_INDEX
    wanted = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.2
    )
    found = own_loss_sum(smooth, "x:smooth")(logits, targets)
    assert torch.allclose(found, wanted)
    assert not torch.allclose(found, loss_sum(logits, targets))
    nothing = own_loss_sum(smooth, "x:smooth")(logits, torch.full((4, 6), IGNORE_INDEX))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert nothing == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (cross_entropy, r"a tensor \[\] for 3 targets; .* a tensor \[3\]"),
        (lambda logits, targets: logits, r"a tensor \[3, 10\]"),
        (lambda logits, targets: 1.0, "a float"),
        (lambda logits, targets: (logits.argmax(-1) - targets).float(), "do not depend on the"),
    ],
)
def test_an_own_loss_that_is_none_of_each_target(loss: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.loss = x:y returned .*{what}"):
        own_loss_sum(loss, "x:y")(LOGITS, FEATURES.targets)


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        *(("classicdp", None), ("fsdp", {"stage": 3}), ("syncps", None)),
        *(("mp", None), ("mp_pipeline", None)),
    ],
)
def test_an_own_loss_gives_the_same_on_any_number_of_ranks(
    algorithm: str, overrides: dict[str, int] | None
) -> None:
    model = "language_model" if algorithm not in worlds.SPLIT else next(iter(worlds.DECODERS))
    own = {"loss_sum": own_loss_sum(smooth, "x:smooth")}
    reference = worlds.train("single", model, 1, steps=3, more=own)[0]
    plain = worlds.train("single", model, 1, steps=3)[0]
    assert abs(plain.losses[0] - reference.losses[0]) > 1e-3, "a negative control"
    for trace in worlds.train(algorithm, model, 2, steps=3, more=own, overrides=overrides):
        assert trace.losses == pytest.approx(reference.losses, abs=1e-12)
        if trace.eval is not None and reference.eval is not None:
            assert trace.eval.loss == pytest.approx(reference.eval.loss, abs=1e-10)

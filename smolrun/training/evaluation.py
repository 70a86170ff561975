"""Looking at a model while or after it trains: its loss on samples it does not learn from, and text
it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from smolrun.algorithms.base import Algorithm, EvalSums
from smolrun.data.base import Batch


def evaluate(algorithm: Algorithm, batches: Callable[[], Iterable[list[Batch]]]) -> EvalSums:
    """Sums over all samples of all ranks; collective."""
    loss, weight, correct = 0.0, 0, 0
    has_classes = True
    for micro_batches in batches():
        sums = algorithm.eval_step(micro_batches)
        loss, weight, correct = (
            loss + sums.loss,
            weight + sums.weight,
            correct + (sums.correct or 0),
        )
        has_classes = has_classes and sums.correct is not None
    return EvalSums(loss, weight, correct if has_classes else None)


@torch.no_grad()
def write_text(
    logits: Callable[[torch.Tensor], torch.Tensor],
    prompt: list[int],
    num_tokens: int,
    *,
    context_length: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 40,
) -> list[int]:
    """Token ids that the model writes after `prompt`; collective where `logits` is, and equal on
    all ranks.

    Every token runs the whole context again, so that it works for every way of splitting a model.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-context_length:]])
        last = logits(window)[0, -1]
        values, ids = last.topk(min(top_k, len(last)))
        choice = torch.multinomial(torch.softmax(values / temperature, 0), 1, generator=generator)
        tokens.append(int(ids[choice]))
    return tokens[len(prompt) :]

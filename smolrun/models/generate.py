"""Generation token by token, with a key/value cache so that each token is computed once.

Knows token ids only. For one whole model in one process: serving has its own scheduler, and
algorithms that shard a model have `logits`.
Shape suffixes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smolrun.models.decoder import Decoder
from smolrun.models.sampling import Sampling, sample


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[int]:
    """The token ids after the prompt, for one prompt; arguments as of `generate_batch`."""
    return generate_batch(
        model, [prompt_ids], max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )[0]


@torch.no_grad()
def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[list[int]]:
    """Continues prompts of different lengths side by side.

    temperature 0 takes the likeliest token each time; top_k 0 allows every token. A row ends early
    where it reaches the model's max_sequence_length. A row's noise depends on the seed, the row's
    number and the position, so its text does not depend on its neighbours. Raises ValueError for an
    empty or too long prompt.
    """
    limit = model.shape.max_sequence_length
    for prompt in prompts:
        if not 1 <= len(prompt) < limit:
            allowed = f"1 to {limit - 1} tokens (max_sequence_length={limit})"
            raise ValueError(f"a prompt needs {allowed}, got {len(prompt)}")
    device = next(model.parameters()).device
    budgets = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    capacity = max(len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True))
    cache = model.new_cache(len(prompts), capacity)
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    new_ids: list[list[int]] = [[] for _ in prompts]
    pending = [list(prompt) for prompt in prompts]
    while any(len(ids) < budget for ids, budget in zip(new_ids, budgets, strict=True)):
        counts = [len(ids) for ids in pending]
        padded = [ids + [0] * (max(counts) - len(ids)) for ids in pending]
        tokens_BT = torch.tensor(padded, device=device)
        logits_BTV = model(tokens_BT, cache, counts)
        for row, ids in enumerate(new_ids):
            if len(ids) == budgets[row]:
                pending[row] = []
                continue
            last_V = logits_BTV[row, counts[row] - 1].float().cpu().numpy()
            position = len(prompts[row]) + len(ids)
            ids.append(sample(last_V, sampling, position=position, choice=row).token_id)
            pending[row] = ids[-1:]
    return new_ids

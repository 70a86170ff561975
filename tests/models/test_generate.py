"""Generation with a key/value cache against computing everything again for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.models.decoder import Decoder
from smolrun.models.generate import generate, generate_batch
from tests.models.tiny import KINDS, MakeDecoder, enliven, make_tiny_decoder

PROMPTS = [[1], [5, 9, 2, 44, 7, 7, 0, 12], [60, 3, 3]]


def by_full_recomputation(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("keys", KINDS)
def test_a_ragged_greedy_batch_equals_full_recomputation(
    make_decoder: MakeDecoder, keys: dict[str, Any]
) -> None:
    model = enliven(make_decoder(**keys))
    ours = generate_batch(model, PROMPTS, 20, temperature=0, top_k=0, seed=0)
    assert ours == [by_full_recomputation(model, prompt, 20) for prompt in PROMPTS]
    assert len(set(map(tuple, ours))) == 3


def test_stretches_with_their_own_caches_equal_the_whole(make_decoder: MakeDecoder) -> None:
    whole = make_decoder(seed=2)
    first, last = (
        make_decoder((0, 1, True, False), seed=2),
        make_decoder((2, 3, False, True), seed=2),
    )
    caches = [stage.new_cache(1, 12) for stage in (first, last)]
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 4), (4, 6)):  # a prompt in chunks of 3, 1 and 2 tokens
            logits = last(first(ids[:, start:stop], caches[0]), caches[1])
            torch.testing.assert_close(logits, whole(ids[:, :stop])[:, start:], atol=1e-6, rtol=0)
    assert caches[0].lengths == caches[1].lengths == [6]


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=4),
    window=st.sampled_from([None, 3]),
)
def test_any_ragged_chunks_equal_the_whole(
    chunks: list[tuple[int, int, int]], window: int | None
) -> None:
    model = enliven(make_tiny_decoder(layers=2, kv_heads=2, sliding_window=window))
    rows = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(9))
    cache = model.new_cache(3, 16)
    with torch.no_grad():
        exact = model(rows)
        for counts in chunks:
            starts = list(cache.lengths)
            width = max(1, *counts)
            padded = torch.zeros(3, width, dtype=torch.long)
            for row, count in enumerate(counts):
                padded[row, :count] = rows[row, starts[row] : starts[row] + count]
            logits = model(padded, cache, counts)
            for row, count in enumerate(counts):
                expected = exact[row, starts[row] : starts[row] + count]
                torch.testing.assert_close(logits[row, :count], expected, atol=1e-5, rtol=0)
    assert cache.lengths == [sum(counts) for counts in zip(*chunks, strict=True)]


def test_a_full_cache_is_refused(make_decoder: MakeDecoder) -> None:
    model = make_decoder()
    cache = model.new_cache(2, 4)
    with torch.no_grad():
        model(torch.zeros(2, 4, dtype=torch.long), cache, [4, 1])
        with pytest.raises(ValueError, match="row 0 needs 5 slots, the cache holds 4"):
            model(torch.zeros(2, 1, dtype=torch.long), cache)
    assert cache.lengths == [4, 1]
    with pytest.raises(ValueError, match="passes max_sequence_length=48"):
        model.new_cache(1, 49)


def test_text_ends_where_the_context_is_full(make_decoder: MakeDecoder) -> None:
    assert len(generate(make_decoder(), [1] * 40, 20, temperature=0, top_k=0, seed=0)) == 8


@pytest.mark.parametrize("prompt", [[], [1] * 48])
def test_prompts_that_leave_nothing_to_do_are_refused(
    make_decoder: MakeDecoder, prompt: list[int]
) -> None:
    with pytest.raises(ValueError, match="a prompt needs 1 to 47 tokens"):
        generate(make_decoder(), prompt, 5, temperature=0, top_k=0, seed=0)


def test_a_row_does_not_depend_on_its_neighbours_and_follows_the_seed(
    make_decoder: MakeDecoder,
) -> None:
    model = enliven(make_decoder())
    alone = generate(model, PROMPTS[0], 12, temperature=1.0, top_k=8, seed=4)
    together = generate_batch(model, PROMPTS, 12, temperature=1.0, top_k=8, seed=4)
    assert together[0] == alone == generate(model, PROMPTS[0], 12, temperature=1.0, top_k=8, seed=4)
    assert alone != generate(model, PROMPTS[0], 12, temperature=1.0, top_k=8, seed=5)

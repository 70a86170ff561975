"""SmolLM2-135M-Instruct in stages against transformers (in `make soak`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from smolrun.data.cache import cache_folder
from smolrun.models import smollm2
from tests.serving.chain import Chain
from tests.serving.references import LEAST_MARGIN

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "Why is the sky blue?",
]
NUM_TOKENS = 48


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_stages", [1, 3])
def test_smollm2_writes_the_text_of_transformers(num_stages: int) -> None:
    keys = {"pretrained": True, "attention": "auto", "dropout": 0.0}
    ready = smollm2.prepare(cache_folder("models"), lambda *_: None, "smollm2_135m", **keys)
    folder = Path(ready.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = theirs.generate(
            **asked,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(made.logits).topk(2).values
        length = asked["input_ids"].shape[1]
        ids = made.sequences[0].tolist()
        texts.append((ids[:length], ids[length:], (best[:, 0] - best[:, 1]).tolist()))
    chain, forced, compared = Chain(folder, num_stages, slots=4, capacity=256), 0, 0
    lengths = {slot: len(ids) for slot, (ids, _, _) in enumerate(texts)}
    tokens = {slot: chain.prefill(slot, ids, chunk=16) for slot, (ids, _, _) in enumerate(texts)}
    for step in range(NUM_TOKENS):
        for slot in list(tokens):
            _, expected, margins = texts[slot]
            if step >= len(expected):
                del tokens[slot]
                continue
            compared += 1
            if tokens[slot] != expected[step]:
                assert margins[step] < LEAST_MARGIN, (slot, step)
                forced += 1
            tokens[slot] = expected[step]
        if not tokens:
            break
        next_tokens = chain.decode(lengths, tokens)
        lengths = {slot: length + 1 for slot, length in lengths.items()}
        tokens = next_tokens
    assert compared > 100
    assert forced <= 0.01 * compared

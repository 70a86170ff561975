"""Stages against transformers' own text (GOALS S1, without an engine), and against themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from smolrun.models.sampling import Sampling
from smolrun.serving import stage as stage_module
from smolrun.serving.batch import Batch, Fork, Opened, Row
from smolrun.serving.messages import ServingDtype
from smolrun.serving.source import load_stage, source_of_folder
from smolrun.serving.stage import Stage
from smolrun.serving.weight_quantization import dequantize
from smolrun.serving.weight_types import serving_bytes
from tests.serving.chain import Chain
from tests.serving.references import FAMILIES, LEAST_MARGIN, Text, save_model, texts_of

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Text]]]:
    """Of each family a folder, and eight texts of it."""
    found = {}
    for kind in FAMILIES:
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = (folder, texts_of(save_model(folder, kind), 8, NUM_TOKENS))
    return found


def compare(text: Text, step: int, token: int) -> bool:
    """Whether the reference had to be forced, because rounding may decide there."""
    if token == text.tokens[step]:
        return False
    assert text.margins[step] < LEAST_MARGIN, (step, token, text.tokens[step], text.margins[step])
    return True


def forced_tokens(chain: Chain, texts: Sequence[Text], chunk: int) -> int:
    """Generates all texts side by side, each after its own prompt."""
    forced = 0
    lengths, tokens = {}, {}
    for slot, text in enumerate(texts):
        tokens[slot] = chain.prefill(slot, text.prompt, chunk=chunk)
        lengths[slot] = len(text.prompt)
    for step in range(NUM_TOKENS):
        for slot, text in enumerate(texts):
            forced += compare(text, step, tokens[slot])
            tokens[slot] = text.tokens[step]
        if step + 1 < NUM_TOKENS:
            tokens = chain.decode(lengths, tokens)
            lengths = {slot: length + 1 for slot, length in lengths.items()}
    return forced


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_text_equals_that_of_transformers(
    references: dict[str, tuple[Path, list[Text]]], kind: str, num_stages: int
) -> None:
    folder, texts = references[kind]
    together = forced_tokens(
        Chain(folder, num_stages), texts, chunk=(1000, 7, 16, 1)[num_stages - 1]
    )
    alone = forced_tokens(Chain(folder, num_stages), texts[:1], chunk=1000)
    assert together + alone <= 0.01 * NUM_TOKENS * (len(texts) + 1)


def test_the_references_are_real_texts(references: dict[str, tuple[Path, list[Text]]]) -> None:
    for _, texts in references.values():
        assert len({token for text in texts for token in text.tokens}) > 40
        margins = torch.tensor([text.margins for text in texts])
        assert margins.median() > 0.2


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "mistral"])
def test_a_long_prompt_and_a_decode_row_share_a_batch(
    references: dict[str, tuple[Path, list[Text]]], kind: str
) -> None:
    folder, texts = references[kind]
    chain = Chain(folder, 2)
    first, second = texts[0], texts[3]
    token = chain.prefill(5, first.prompt)
    assert not compare(first, 0, token)
    half = len(second.prompt) // 2
    rows = [Row(5, len(first.prompt), 1, True), Row(2, 0, half, False)]
    opened = chain.open(2, second.prompt)
    result = chain.run(rows, [token, *second.prompt[:half]], opened=[opened])
    assert [sampled.slot for sampled in result.sampled] == [5]
    assert not compare(first, 1, result.sampled[0].token_id)
    rest = second.prompt[half:]
    rows = [Row(2, half, len(rest), True), Row(5, len(first.prompt) + 1, 1, True)]
    result = chain.run(rows, [*rest, first.tokens[1]])
    assert [sampled.slot for sampled in result.sampled] == [2, 5]
    assert not compare(second, 0, result.sampled[0].token_id)
    assert not compare(first, 2, result.sampled[1].token_id)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_a_forked_prefix_equals_a_computed_one(
    references: dict[str, tuple[Path, list[Text]]], kind: str
) -> None:
    folder, texts = references[kind]
    chain = Chain(folder, 2, slots=3)
    text = max(texts, key=lambda text: len(text.prompt))
    chain.prefill(0, text.prompt)
    # Other texts in the slots before: nothing of them may remain.
    chain.prefill(2, texts[1].prompt)
    for length in (1, len(text.prompt) // 2, len(text.prompt) - 1):
        rest = text.prompt[length:]
        opened = Opened(2, Sampling(temperature=0), 0, None, text.prompt[:length], len(text.prompt))
        row = Row(2, length, len(rest), True)
        result = chain.run([row], rest, [Fork(0, 2, length)], [opened])
        assert not compare(text, 0, result.sampled[0].token_id)
        lengths, tokens = {2: len(text.prompt)}, {2: text.tokens[0]}
        for step in range(1, 8):
            tokens = chain.decode(lengths, tokens)
            lengths[2] += 1
            assert not compare(text, step, tokens[2])


@pytest.mark.parametrize("slots", [(0, 1, 2), (2, 0, 1), (1, 3, 4)])
def test_rows_that_attend_together_see_nothing_of_each_other(
    references: dict[str, tuple[Path, list[Text]]], slots: tuple[int, ...]
) -> None:
    folder, texts = references["smollm"]
    texts = sorted(texts, key=lambda text: len(text.prompt))[::3]
    chain = Chain(folder, 2)
    # An earlier sequence left values that are not numbers; slots are cleared as they are opened.
    for stage in chain.stages:
        stage._cache.fill_(float("nan"))
        stage._written = [stage.capacity] * stage.slots
    tokens = {
        slot: chain.prefill(slot, text.prompt) for slot, text in zip(slots, texts, strict=True)
    }
    lengths = {slot: len(text.prompt) for slot, text in zip(slots, texts, strict=True)}
    assert max(lengths.values()) > min(lengths.values()) + 20
    for step in range(8):
        for slot, text in zip(slots, texts, strict=True):
            assert not compare(text, step, tokens[slot])
        tokens = chain.decode(lengths, tokens)
        lengths = {slot: length + 1 for slot, length in lengths.items()}


def test_rows_attend_together_where_that_saves_time(
    references: dict[str, tuple[Path, list[Text]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(references["llama"][0])
    monkeypatch.setattr(stage_module, "_SPARE_PRODUCTS", 4 * 16 * 10)  # ten keys of four heads
    rows = [Row(0, 20, 1, True), Row(1, 30, 1, True), Row(2, 60, 1, True), Row(4, 60, 1, True)]
    rows += [Row(5, 60, 2, True), Row(6, 60, 1, True), Row(7, 62, 1, True)]
    joined = [(one.slot, one.slots, one.first, one.after) for one in stage._attentions(rows)]
    assert joined == [(0, 2, 0, 2), (2, 1, 2, 3), (4, 1, 3, 4), (5, 1, 4, 6), (6, 2, 6, 8)]


def stage_of(folder: Path, **keys: int) -> Stage:
    return Chain(folder, **keys).stages[0]


def test_logits_of_all_tokens_where_a_row_wants_them(
    references: dict[str, tuple[Path, list[Text]]],
) -> None:
    folder, texts = references["qwen2"]
    prompt = texts[3].prompt
    expected = stage_of(folder).run(Batch(0, [Row(1, 0, len(prompt), True, True)], prompt), None)
    assert expected.shape == (len(prompt), 211)
    stage, other = stage_of(folder), texts[1].prompt
    rows = [Row(0, 0, len(other), False), Row(1, 0, 5, False, True)]
    first = stage.run(Batch(0, rows, [*other, *prompt[:5]]), None)
    torch.testing.assert_close(first, expected[:5], atol=1e-5, rtol=0)
    rows = [Row(1, 5, len(prompt) - 5, True)]
    last = stage.run(Batch(1, rows, prompt[5:]), None)
    torch.testing.assert_close(last, expected[-1:], atol=1e-5, rtol=0)
    assert stage.run(Batch(2, [Row(3, 0, 1, False)], [4]), None).shape == (0, 211)


def test_prompt_logprobs_are_those_of_the_next_tokens(
    references: dict[str, tuple[Path, list[Text]]],
) -> None:
    folder, texts = references["qwen2"]
    prompt = texts[3].prompt
    chain = Chain(folder)
    logits = chain.stages[0].run(Batch(0, [Row(1, 0, len(prompt), True, True)], prompt), None)
    expected = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), prompt[1:]]
    values: list[float] = []
    opened = [chain.open(0, prompt)]
    for first in range(0, len(prompt), 9):
        ids = prompt[first : first + 9]
        following = prompt[first + 9] if first + 9 < len(prompt) else None
        row = Row(0, first, len(ids), following is None, True, following)
        result = chain.run([row], ids, opened=opened if first == 0 else [])
        values += [logprob for logprob, _ in result.prompt_logprobs[0].values]
    torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=0)


# Layers before and after a rank is lost: none is taken over, some, all; embedding and head too.
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((0, 1), (0, 2)),
        ((2, 3), (1, 3)),
        ((1, 2), (2, 3)),
        ((0, 1), (0, 3)),
        ((3, 3), (0, 3)),
        ((0, 3), (0, 0)),
        ((0, 1), (2, 3)),
    ],
)
@pytest.mark.parametrize("kind", ["smollm", "gpt2"])
def test_a_stage_with_kept_weights_equals_one_that_loads_them_all(
    kind: str,
    old: tuple[int, int],
    new: tuple[int, int],
    references: dict[str, tuple[Path, list[Text]]],
) -> None:
    source = source_of_folder(references[kind][0], kind)
    size = {"slots": 2, "capacity": 20, "dtype": torch.float32}

    def made(layers: tuple[int, int], kept: Stage | None) -> tuple[Stage, int]:
        part = (*layers, layers[0] == 0, layers[1] == source.shape.layers - 1)
        held = kept.parameter_names() if kept else set()
        parameters = load_stage(source, *part, "float32", held=held)
        count = len(parameters)
        shape, vocab = source.shape, source.vocab_size
        return Stage(shape, vocab, *part, parameters, kept=kept, **size), count  # type: ignore[arg-type]

    earlier, _ = made(old, None)
    earlier.shrink(range(new[0], new[1] + 1))
    whole, num_tensors = made(new, None)
    again, num_loaded = made(new, earlier)
    assert num_loaded == num_tensors - len(whole.parameter_names() & earlier.parameter_names())
    assert again.weight_bytes == whole.weight_bytes
    assert again.parameter_names() == whole.parameter_names()
    ids = [5, 6, 7, 8]
    batch = Batch(0, [Row(0, 0, 4, True)], ids, opened=[Opened(0, Sampling(), 0, None, [], 4)])
    hidden = None if new[0] == 0 else torch.randn(4, source.shape.width)
    assert torch.equal(again.run(batch, hidden), whole.run(batch, hidden))


def test_the_memory_of_stages_is_that_of_their_parts(
    references: dict[str, tuple[Path, list[Text]]],
) -> None:
    folder, _ = references["smollm"]
    source = source_of_folder(folder, "smollm")
    chain = Chain(folder, 4, slots=3, capacity=50)
    for layer, stage in enumerate(chain.stages):
        has_ends = (layer == 0, layer == 3)
        assert stage.weight_bytes == 4 * source.num_parameters(layer, layer, *has_ends)
        assert stage.bytes_per_token == 2 * 1 * 16 * 4  # keys and values of one head
        assert stage.cache_bytes == 3 * 50 * stage.bytes_per_token


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_cache_takes_memory_only_where_tokens_are(
    references: dict[str, tuple[Path, list[Text]]], dtype: ServingDtype
) -> None:
    folder, texts = references["smollm"]
    process = psutil.Process()
    before = process.memory_info().rss
    chain = Chain(folder, slots=10_000, dtype=dtype)
    assert chain.stages[0].cache_bytes > 300e6
    chain.prefill(7_000, texts[0].prompt)
    assert process.memory_info().rss - before < 50e6


def test_bf16_follows_float32(references: dict[str, tuple[Path, list[Text]]]) -> None:
    folder, texts = references["qwen3"]
    batch = Batch(0, [Row(0, 0, len(texts[3].prompt), True, True)], texts[3].prompt)
    exact = stage_of(folder).run(batch, None)
    stage = Chain(folder, dtype="bf16").stages[0]
    rough = stage.run(batch, None)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.1
    assert stage.weight_bytes * 2 == stage_of(folder).weight_bytes


@pytest.mark.parametrize("dtype", ["float32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "mistral", "llama3", "mixtral"])
def test_a_batch_invariant_stage_gives_equal_bits(
    references: dict[str, tuple[Path, list[Text]]], kind: str, dtype: ServingDtype
) -> None:
    folder, texts = references[kind]
    prompt, others = (texts[3].prompt + texts[3].tokens)[:60], texts[1].prompt + texts[1].tokens
    stage = Chain(folder, dtype=dtype, batch_invariant=True).stages[0]
    alone = Batch(0, [Row(7, 0, len(prompt), True, True)], prompt)
    expected, exact = stage.run(alone, None), stage_of(folder).run(alone, None)
    if dtype in ("float32", "bf16"):  # others: below
        assert (expected - exact).abs().mean() < (0.2 if dtype == "bf16" else 1e-4)
    seen, start = [], 0
    for number, count in enumerate((7, 1, 1, 20, 1, 30)):  # chunks beside ever more neighbours
        neighbours = [Row(slot, 0, 3, False) for slot in range(1, 1 + number)]
        rows = [*neighbours[::2], Row(0, start, count, True, True), *neighbours[1::2]]
        before = 3 * len(neighbours[::2])
        ids = others[: 3 * number]
        ids[before:before] = prompt[start : start + count]
        seen.append(stage.run(Batch(number, rows, ids), None))
        start += count
    assert torch.equal(torch.cat(seen), expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["gpt2", "smollm", "qwen3"])
def test_a_quantized_stage_computes_with_the_values_of_its_codes(
    references: dict[str, tuple[Path, list[Text]]], kind: str, dtype: ServingDtype
) -> None:
    folder, texts = references[kind]
    source = source_of_folder(folder, kind)
    stored = load_stage(source, 0, 3, True, True, dtype)
    values: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        module, _, kind_of_tensor = name.rpartition(".")
        if kind_of_tensor in ("weight", "bias"):
            values[name] = tensor.float()
        if kind_of_tensor == "weight" and f"{module}.scales" in stored:
            scales, zeros = stored[f"{module}.scales"], stored.get(f"{module}.zeros")
            values[name] = dequantize(tensor, scales, zeros)
    counts = {"int8": {torch.int8}, "int4": {torch.int8, torch.uint8}}
    codes = {tensor.dtype for tensor in stored.values() if not tensor.is_floating_point()}
    assert codes == counts[dtype]
    sizes = {"slots": 1, "capacity": 128}
    whole = (source.shape, source.vocab_size, 0, 3, True, True)
    exact = Stage(*whole, values, **sizes, dtype=torch.float32)
    stage = Stage(*whole, stored, **sizes, dtype=torch.bfloat16)
    prompt = (texts[3].prompt + texts[3].tokens)[:90]
    for count in (1, 7, 30, len(prompt)):  # each by another routine
        batch = Batch(0, [Row(0, 0, count, True, True)], prompt[:count])
        error = (stage.run(batch, None) - exact.run(batch, None)).abs().mean()
        assert error < 0.2, "as bf16 rounds"


@pytest.mark.parametrize("dtype", ["float32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["gpt2", "mistral"])  # tied, and with a head
def test_planned_bytes_are_those_of_the_stages(
    references: dict[str, tuple[Path, list[Text]]], kind: str, dtype: ServingDtype
) -> None:
    folder, _ = references[kind]
    source = source_of_folder(folder, kind)
    sizes = serving_bytes(source.shape, source.vocab_size, dtype)
    whole, (first, last) = Chain(folder, dtype=dtype), Chain(folder, 2, dtype=dtype).stages
    assert whole.stages[0].weight_bytes == sizes.weights
    assert first.weight_bytes == sizes.embedding + 2 * sizes.layer
    assert last.weight_bytes == sizes.head + 2 * sizes.layer
    assert first.bytes_per_token == 2 * sizes.cache_per_token


def test_a_batch_invariant_stage_gives_equal_bits_on_several_threads(tmp_path: Path) -> None:
    """Three threads share the activations of these rows in the middle of a row."""
    torch.set_num_threads(3)  # until the fixture `one_thread` ends
    save_model(tmp_path, "gpt2", n_inner=8192)
    stage = Chain(tmp_path, slots=2, batch_invariant=True).stages[0]
    ids = list(range(1, 33))
    alone = [stage.run(Batch(at, [Row(0, at, 1, True)], [id]), None) for at, id in enumerate(ids)]
    for count in (10, 11, 13, 32):
        together = stage.run(Batch(99, [Row(1, 0, count, True, True)], ids[:count]), None)
        assert torch.equal(together, torch.cat(alone[:count])), count


def test_rows_beyond_the_slots_are_refused(
    references: dict[str, tuple[Path, list[Text]]],
) -> None:
    folder, _ = references["llama"]
    stage = stage_of(folder, slots=2, capacity=8)
    with pytest.raises(ValueError, match="slot 1 to token 9 is beyond the 2 slots of 8 tokens"):
        stage.run(Batch(0, [Row(1, 4, 5, True)], [1] * 5), None)
    with pytest.raises(ValueError, match="slot 2 to token 1"):
        stage.run(Batch(0, [Row(2, 0, 1, True)], [1]), None)
    with pytest.raises(ValueError, match="slots of 161 tokens pass max_sequence_length=160"):
        stage_of(folder, capacity=161)

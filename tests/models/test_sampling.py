"""The sampler: its distribution, its limits, and numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smolrun.errors import NonFiniteLogits
from smolrun.models.sampling import Sampling, TokenHistory, gumbel_noise, log_softmax, sample

LOGITS = np.array([0.0, 3.0, -1.0, 2.9, 2.8, 1.0], np.float32)
DRAWS = 6000
# Of ids 0, 1 and 49151 at seed, choice and position 0.
NOISE = [0.4023417539302211, -0.7143951177675684, -0.8373532151519704]


def draw(logits: NDArray[np.float32], position: int = 0, **keys: Any) -> int:
    return sample(logits, Sampling(**keys), position=position).token_id


def drawn(logits: NDArray[np.float32], **keys: Any) -> NDArray[np.int64]:
    """How often each id is drawn, over many positions of one seed."""
    ids = [draw(logits, position, **keys) for position in range(DRAWS)]
    return np.bincount(ids, minlength=len(logits))


def chi_square(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vary", ["position", "seed", "choice"])
def test_the_distribution_is_the_softmax_over_the_temperature(
    temperature: float, vary: str
) -> None:
    ids = []
    for number in range(DRAWS):
        arguments: dict[str, Any] = {"position": 7, "seed": 3, "choice": 1, vary: number}
        sampling = Sampling(temperature=temperature, seed=arguments.pop("seed"))
        ids.append(sample(LOGITS, sampling, **arguments).token_id)
    expected = np.exp(log_softmax(LOGITS / np.float32(temperature)))
    # 5 degrees of freedom: 20.5 is passed by one fair sampler in 1,000; the seeds are fixed.
    assert chi_square(np.bincount(ids, minlength=6), expected) < 20.5


def test_the_noise_of_neighbours_is_independent() -> None:
    ids = np.arange(20_000)
    rows = np.stack([gumbel_noise(ids, seed, 0, p) for seed in (0, 1) for p in (0, 1, 2)])
    correlation = np.corrcoef(np.vstack([rows, np.roll(rows[:1], 1)]))
    assert np.abs(correlation - np.eye(7)).max() < 4 / math.sqrt(20_000)
    assert rows.mean() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert rows.var() == pytest.approx(math.pi**2 / 6, abs=0.05)


def test_the_noise_is_the_same_on_every_machine() -> None:
    noise = gumbel_noise(np.array([0, 1, 49151]), 0, 0, 0)
    assert noise.tolist() == pytest.approx(NOISE, rel=1e-12)
    assert gumbel_noise(np.array([49151]), 0, 0, 0)[0] == noise[2]


def test_a_draw_is_repeated_and_depends_on_seed_choice_and_position() -> None:
    flat = np.zeros(50_000, np.float32)
    first = draw(flat, 5, seed=0)
    assert first == draw(flat, 5, seed=0)
    others = {draw(flat, 6, seed=0), draw(flat, 5, seed=1), draw(flat, 5, seed=-1)}
    others.add(sample(flat, Sampling(seed=0), position=5, choice=1).token_id)
    assert len(others | {first}) == 5
    draw(flat, 0, seed=2**80)  # any integer is a seed


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6, 1e-4])
def test_tiny_temperatures_take_the_likeliest(temperature: float) -> None:
    assert {draw(LOGITS, p, temperature=temperature, seed=p) for p in range(200)} == {1}


@pytest.mark.parametrize(
    ("keys", "allowed"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
        # Probabilities .345, .312, .283, .047, ...: the first two reach .6.
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.9}, {1, 3}),  # exp(2.9 - 3) = 0.905, exp(2.8 - 3) = 0.819
        ({"min_p": 1.0}, {1}),
        ({"top_k": 2, "top_p": 0.99}, {1, 3}),
    ],
)
def test_what_may_be_drawn(keys: dict[str, Any], allowed: set[int]) -> None:
    counts = drawn(LOGITS, **keys)
    assert set(np.flatnonzero(counts).tolist()) == allowed
    kept = np.where(np.isin(np.arange(6), list(allowed)), LOGITS, -np.inf).astype(np.float32)
    probabilities = np.exp(log_softmax(kept))[sorted(allowed)]
    assert chi_square(counts[sorted(allowed)], probabilities) < 20.5


def test_top_p_is_taken_after_the_temperature() -> None:
    assert set(np.flatnonzero(drawn(LOGITS, top_p=0.6, temperature=100.0))) != {1, 3}


def test_penalties_by_hand() -> None:
    history = TokenHistory()
    history.add([1, 2], is_generated=False)
    history.add([1, 3, 3], is_generated=True)

    def best(logits: list[float], **keys: Any) -> int:
        array, sampling = np.array(logits, np.float32), Sampling(temperature=0.0, **keys)
        return sample(array, sampling, position=5, history=history).token_id

    # repetition: 3 / 1.5 = 2 and -1 * 1.5 = -1.5, also for a token of the prompt only.
    assert best([1.9, 3.0, 0.0, 0.0], repetition_penalty=1.5) == 1
    assert best([2.1, 3.0, 0.0, 0.0], repetition_penalty=1.5) == 0
    assert best([2.1, 0.0, 3.0, 0.0], repetition_penalty=1.5) == 0
    assert best([-1.6, -1.0, -9.0, -9.0], repetition_penalty=1.5) == 1
    assert best([-1.4, -1.0, -9.0, -9.0], repetition_penalty=1.5) == 0
    # presence: once, of generated tokens only.
    assert best([2.4, 0.0, 0.0, 3.0], presence_penalty=0.5) == 3
    assert best([2.6, 0.0, 0.0, 3.0], presence_penalty=0.5) == 0
    assert best([2.6, 0.0, 3.0, 0.0], presence_penalty=0.5) == 2
    # frequency: twice for token 3, once for token 1.
    assert best([2.1, 0.0, 0.0, 3.0], frequency_penalty=0.5) == 0
    assert best([2.1, 3.0, 0.0, 0.0], frequency_penalty=0.5) == 1
    # negative ones reward.
    assert best([3.0, 2.6, 0.0, 0.0], presence_penalty=-0.5) == 1


@pytest.mark.parametrize("keys", [{}, {"min_p": 0.1}, {"top_p": 0.5}, {"temperature": 0.0}])
@pytest.mark.parametrize("penalty", [1e-308, 5e-324])
def test_the_smallest_repetition_penalty_takes_what_was_there(
    keys: dict[str, float], penalty: float
) -> None:
    history = TokenHistory()
    history.add([3], is_generated=False)
    sampling = Sampling(repetition_penalty=penalty, **keys)
    assert sample(LOGITS, sampling, position=5, history=history).token_id == 3


def test_bias_forces_and_forbids() -> None:
    assert draw(LOGITS, temperature=0.0, logit_bias={2: 100.0}) == 2
    assert draw(LOGITS, temperature=0.0, logit_bias={1: -100.0}) == 3
    assert 1 not in {draw(LOGITS, p, logit_bias={1: -100.0}) for p in range(500)}


def test_logprobs_are_of_the_model_and_not_of_the_sampling() -> None:
    sampling = Sampling(temperature=0.0, top_k=1, logit_bias={2: 100.0})
    chosen = sample(LOGITS, sampling, position=0, top_logprobs=3)
    total = math.log(sum(math.exp(float(value)) for value in LOGITS))
    assert chosen.token_id == 2
    assert chosen.logprob == pytest.approx(-1.0 - total)
    assert chosen.top is not None
    assert [token for token, _ in chosen.top] == [1, 3, 4]
    assert chosen.top[0][1] == pytest.approx(3.0 - total)
    alone = sample(LOGITS, sampling, position=0, top_logprobs=0)
    assert (alone.top, alone.logprob) == ([], chosen.logprob)
    assert sample(LOGITS, sampling, position=0).logprob is None


def test_equal_logits_report_the_smaller_id_first() -> None:
    top = sample(np.zeros(9, np.float32), Sampling(temperature=0), position=0, top_logprobs=2).top
    assert top is not None
    assert [token for token, _ in top] == [0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[4] = bad
    with pytest.raises(NonFiniteLogits, match="position 12"):
        draw(logits, 12, temperature=temperature)
    with pytest.raises(NonFiniteLogits):
        draw(np.full(4, -np.inf, np.float32), temperature=temperature)


def test_a_forbidden_token_of_minus_infinity_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.1], np.float32)
    assert {draw(logits, position) for position in range(300)} == {1, 3}

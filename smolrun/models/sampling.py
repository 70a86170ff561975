"""The sampler: one token id from the logits of one position. Serving, generation and the trainer's
text sample use it.

    logits -> bias, penalties -> / temperature -> min_p, top_k, top_p -> + Gumbel noise -> argmax

The noise of a token id is a hash of (seed, choice, position, id): no generator has a state, so
neither neighbours in a batch nor a replay change a text. Plain numpy on the CPU in float64, so that
the device and the dtype of the model do not matter.
Shape suffix: V vocabulary, C candidates.
Source: arXiv:1611.01144 (Gumbel-max), 1904.09751 (top_p), 2407.01082 (min_p), 1909.05858
(repetition penalty), Steele, Lea and Flood 2014 (SplitMix64); order and penalties as in vLLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from smolrun.errors import NonFiniteLogits

# Below it the likeliest token is taken, as in vLLM: noise must not decide between equal logits.
_SMALLEST_TEMPERATURE = 1e-5
# As good as 0, and logits that it divides stay finite.
_SMALLEST_PENALTY = 1e-30
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2**64 / golden ratio


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a token is drawn from logits; the defaults leave the distribution as it is.

    temperature 0 takes the likeliest token; top_k 0 allows every token. repetition_penalty counts
    the prompt too, presence_penalty and frequency_penalty the generated tokens only. `grammar`: of
    llguidance, which the generated text obeys; empty for any text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    grammar: str = ""

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens matter."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class TokenHistory:
    """The tokens of a sequence so far, as penalties count them."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.generated: Counter[int] = Counter()

    def add(self, token_ids: Iterable[int], *, is_generated: bool) -> None:
        """The next tokens, of the prompt or generated ones."""
        token_ids = list(token_ids)
        self.seen.update(token_ids)
        if is_generated:
            self.generated.update(token_ids)


class Draw(NamedTuple):
    """A token; `logprob` and `top` (ids, best first) are of the model's own distribution, before
    bias, penalties and temperature, as OpenAI and vLLM report them. None where not asked for."""

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


def sample(
    logits_V: NDArray[np.float32],
    sampling: Sampling,
    *,
    position: int,
    choice: int = 0,
    history: TokenHistory | None = None,
    top_logprobs: int | None = None,
    allowed_V: NDArray[np.bool_] | None = None,
) -> Draw:
    """Draw the token at `position` of a sequence, one of those that are allowed.

    Raises NonFiniteLogits for logits of which one is NaN, or none is finite.
    """
    if not np.isfinite(logits_V.max()):  # max is NaN where any logit is
        raise NonFiniteLogits(f"the model's logits for position {position} are not finite numbers")
    adjusted_V = _adjusted(logits_V, sampling, history)
    if allowed_V is not None:
        adjusted_V = np.where(allowed_V, adjusted_V, -np.inf)
    token_id = _draw(adjusted_V, sampling, choice, position)
    if top_logprobs is None:
        return Draw(token_id)
    return Draw(token_id, *score(token_id, logits_V, top_logprobs))


def score(
    token_id: int, logits_V: NDArray[np.float32], top_logprobs: int
) -> tuple[float, list[tuple[int, float]]]:
    """`logprob` and `top` of a token as in Draw, which need not be drawn here."""
    logprobs_V = log_softmax(logits_V)
    top = [(int(i), float(logprobs_V[i])) for i in likeliest(logprobs_V, top_logprobs)]
    return float(logprobs_V[token_id]), top


def log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the probabilities [..., V]."""
    shifted: NDArray[np.float64] = logits_V.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def likeliest(logprobs_V: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` ids of the largest values, best first; of equal ones the smaller id is first."""
    count = min(count, len(logprobs_V))
    if count == 0:
        return np.empty(0, np.int64)
    ids = np.flatnonzero(logprobs_V >= np.partition(logprobs_V, -count)[-count])
    order: NDArray[np.int64] = ids[np.argsort(-logprobs_V[ids], kind="stable")][:count]
    return order


def _adjusted(
    logits_V: NDArray[np.float32], sampling: Sampling, history: TokenHistory | None
) -> NDArray[np.float32] | NDArray[np.float64]:
    """Logits with bias and penalties; the given ones where there are none."""
    if not sampling.logit_bias and not sampling.has_penalties:
        return logits_V
    logits = logits_V.astype(np.float64)
    for token_id, bias in sampling.logit_bias.items():
        logits[token_id] += bias
    if history is None or not sampling.has_penalties:
        return logits
    seen = np.fromiter(history.seen, np.int64, len(history.seen))
    penalty = max(sampling.repetition_penalty, _SMALLEST_PENALTY)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    generated = np.fromiter(history.generated.keys(), np.int64, len(history.generated))
    counts = np.fromiter(history.generated.values(), np.float64, len(history.generated))
    logits[generated] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return logits


def _draw(
    logits_V: NDArray[np.float32] | NDArray[np.float64],
    sampling: Sampling,
    choice: int,
    position: int,
) -> int:
    if sampling.temperature < _SMALLEST_TEMPERATURE:
        return int(logits_V.argmax())
    ids_C, scaled_C = _candidates(logits_V, sampling)
    noise_C = gumbel_noise(ids_C, sampling.seed, choice, position)
    return int(ids_C[(scaled_C + noise_C).argmax()])


def _candidates(
    logits_V: NDArray[np.float32] | NDArray[np.float64], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids that may be drawn, and their logits over the temperature, less the largest one.

    Of tokens as likely as the last one allowed, all are allowed: no order of ids decides.
    """
    scaled = (logits_V.astype(np.float64) - logits_V.max()) / sampling.temperature
    lowest = -np.inf
    if sampling.min_p > 0:
        lowest = min(0.0, float(np.log(sampling.min_p)))
    if 0 < sampling.top_k < len(scaled):
        lowest = max(lowest, float(np.partition(scaled, -sampling.top_k)[-sampling.top_k]))
    ids = np.flatnonzero(scaled >= lowest)
    scaled = scaled[ids]
    if sampling.top_p < 1:
        kept = scaled >= _top_p_threshold(scaled, sampling.top_p)
        ids, scaled = ids[kept], scaled[kept]
    return ids, scaled


def _top_p_threshold(scaled_C: NDArray[np.float64], top_p: float) -> float:
    """The logit of the last token of the smallest set whose probability reaches `top_p`."""
    descending = np.sort(scaled_C)[::-1]
    reached = np.cumsum(np.exp(descending))
    last = int(np.searchsorted(reached, top_p * reached[-1]))
    return float(descending[min(last, len(descending) - 1)])


def gumbel_noise(
    ids: NDArray[np.int64], seed: int, choice: int, position: int
) -> NDArray[np.float64]:
    """Gumbel(0, 1) noise of each id: equal arguments give equal noise, on every machine."""
    key = 0
    for part in (seed, choice, position):
        key = _mixed((key + part) & _MASK)
    # SplitMix64 of stream `key`, entered at the id's place.
    bits = ids.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _mixed(word: int) -> int:
    """SplitMix64's next number after the state `word`."""
    word = (word + _GOLDEN) & _MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)

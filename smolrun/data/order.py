"""Which sample comes at which position of the whole run: shuffled anew every epoch, the same on
every machine.

    position   0 1 2 3 | 4 5 6 7 | 8 ...        size 4: epoch = position // size
    sample     2 0 3 1 | 1 3 0 2 | 3 ...

A position's sample follows from (size, seed, position) alone, so the order cannot depend on the
world size, a resumed run continues at its position, and no list of the whole data is ever made. It
uses whole numbers only, no library's random generator, so hosts with different numpy or torch
versions agree.
Source: format-preserving encryption, a Feistel network with cycle walking (Black and Rogaway 2002).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

# Four rounds look random (Luby and Rackoff 1988); two more, because the halves are small numbers.
ROUNDS = 6


class SampleOrder:
    """The order of `size` samples over any number of epochs."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one sample, got {size}")
        self.size = size
        self.seed = seed
        # The network permutes 2 ** (2 * half) numbers, the smallest such count that is >= size.
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1

    def index(self, position: int) -> int:
        """The sample, 0 .. size - 1, at a global position >= 0."""
        if position < 0:
            raise ValueError(f"a position counts from 0, got {position}")
        epoch, value = divmod(position, self.size)
        keys = _round_keys(self.seed, epoch)
        # Walking on from numbers that are no samples keeps it a permutation; at most 4 steps on
        # average.
        value = self._permute(value, keys)
        while value >= self.size:
            value = self._permute(value, keys)
        return value

    def indices(self, start: int, stop: int) -> list[int]:
        """The samples at positions start .. stop - 1."""
        return [self.index(position) for position in range(start, stop)]

    def _permute(self, value: int, keys: tuple[int, ...]) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """Scatters 64 bits; the constants are those of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """One 64-bit key a round, from (seed, epoch) only."""
    digest = hashlib.sha512(f"{seed}:{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))

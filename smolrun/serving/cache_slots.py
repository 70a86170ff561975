"""Slots of the key/value cache: which are free, and which tokens each holds. The same slots exist
on every stage, and the batches keep them alike, so this one account is true for all.

A slot that is given back keeps its tokens. The next sequence that begins with the same ones, such
as the next turn of a chat, computes the rest only:

    slot 2   S S S S a a a a       free, holds a conversation
    prompt   S S S S a a a a b b   taken as it is; 2 tokens left to compute
    prompt   S S S S c c           4 tokens are copied into another slot (fork); slot 2 is kept

Pure. Source: SGLang's prefix reuse (arXiv:2312.07104), with slots in place of a tree of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from smolrun.serving.batch import Fork


class TakenSlot(NamedTuple):
    """A slot for a new sequence, which holds its first `cached` tokens, after the fork if any."""

    slot: int
    cached: int
    fork: Fork | None


class CacheSlots:
    """`slots` sequences of up to `capacity` tokens.

    `tokens[slot]` are those that the slot holds once every batch scheduled so far has run; stages
    run batches in order, so a fork may copy them in the next one."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._free = dict.fromkeys(range(slots))  # least recently used first

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, prompt: Sequence[int], *, reuse: bool) -> TakenSlot:
        """A free slot (there must be one), with as much of the prompt as some slot holds if
        `reuse`; never all of it, as the last token must be computed for its logits."""
        slot, fork, cached = next(iter(self._free)), None, 0
        if reuse:
            most, cached = self._longest_prefix(prompt[:-1])
            # The rest of a slot taken in place is lost, so that is done where little is.
            if most in self._free and (most == slot or 2 * cached >= len(self.tokens[most])):
                slot = most
            elif cached:
                fork = Fork(most, slot, cached)
                if most in self._free:  # used just now
                    self._free[most] = self._free.pop(most)
        del self._free[slot]
        self.tokens[slot] = list(prompt[:cached])
        return TakenSlot(slot, cached, fork)

    def append(self, slot: int, tokens: Sequence[int]) -> None:
        """The next batch brings these tokens to a slot."""
        self.tokens[slot].extend(tokens)

    def release(self, slot: int, *, keep: bool = True) -> None:
        """Give a slot back; its tokens may be reused if `keep`."""
        if not keep:
            self.tokens[slot].clear()
        self._free[slot] = None

    def _longest_prefix(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The slot that begins with the most tokens of `prompt`, a free one before others; and
        their number."""
        lengths = [common_prefix(tokens, prompt) for tokens in self.tokens]
        longest = max(range(len(self)), key=lambda slot: (lengths[slot], slot in self._free))
        return longest, lengths[longest]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists begin with alike. Halves the range and compares slices, which is
    far faster in Python than token by token."""
    alike, end = 0, min(len(one), len(other))
    while alike < end:
        middle = (alike + end + 1) // 2
        if one[alike:middle] == other[alike:middle]:
            alike = middle
        else:
            end = middle - 1
    return alike

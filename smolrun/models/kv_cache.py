"""Keys and values of the tokens seen so far, for a batch of sequences of different lengths (a
ragged batch).

One call of the model appends up to T tokens to every sequence. Rows with fewer new tokens are
padded on the right:

    row 0 (5 known, 1 new)   k k k k k n . .        k known   n new   . not yet written
    row 1 (2 known, 3 new)   k k n n n . . .

Shape suffixes: B batch, T new tokens, S slots looked at, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheStep:
    """Where the new tokens of one call go and what they may look at; made once, used by every
    layer.
    """

    positions_BT: Tensor
    slots_BT: Tensor
    mask_B1TS: Tensor
    counts: list[int]


class KVCache:
    """Room for `capacity` tokens of each of `batch_size` sequences, for the layers given.

    `lengths[row]` is how many tokens the row holds; set it to 0 to reuse a row for another
    sequence.
    """

    def __init__(
        self,
        layers: Iterable[int],
        batch_size: int,
        capacity: int,
        *,
        kv_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.lengths = [0] * batch_size
        # One slot more than the capacity: what padding tokens write goes there and is never looked
        # at.
        shape = (batch_size, capacity + 1, kv_heads, head_width)
        self._keys = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self._values = {
            layer: torch.zeros(shape, dtype=dtype, device=device) for layer in self._keys
        }
        self._device = device

    def plan(self, num_tokens: int, counts: Sequence[int] | None, window: int | None) -> CacheStep:
        """The step that appends `counts[row]` of the `num_tokens` given tokens to each row (None:
        all of them).

        Raises ValueError if a row would grow past the capacity.
        """
        counts = [num_tokens] * len(self.lengths) if counts is None else list(counts)
        if len(counts) != len(self.lengths) or not all(
            0 <= count <= num_tokens for count in counts
        ):
            raise ValueError(
                f"counts {counts} do not fit {len(self.lengths)} rows of {num_tokens} tokens"
            )
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if max(ends) > self.capacity:
            raise ValueError(
                f"row {ends.index(max(ends))} needs {max(ends)} slots, the cache holds {self.capacity}"
            )
        starts_B1 = torch.tensor(self.lengths, device=self._device)[:, None]
        new_T = torch.arange(num_tokens, device=self._device)
        is_real_BT = new_T < torch.tensor(counts, device=self._device)[:, None]
        # Padding gets position 0, which every position table has; what it computes is thrown away.
        positions_BT = torch.where(is_real_BT, starts_B1 + new_T, 0)
        slots_BT = torch.where(is_real_BT, positions_BT, self.capacity)
        mask_BTS = may_look(
            positions_BT[:, :, None], torch.arange(max(1, *ends), device=self._device), window
        )
        return CacheStep(positions_BT, slots_BT, mask_BTS[:, None], counts)

    def append(
        self, layer: int, step: CacheStep, key_BGTK: Tensor, value_BGTK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values; returns all that the step may look at, [B, G, S,
        K] each.
        """
        keys, values = self._keys[layer], self._values[layer]
        rows_B1 = torch.arange(len(self.lengths), device=self._device)[:, None]
        keys[rows_B1, step.slots_BT] = key_BGTK.transpose(1, 2).to(keys.dtype)
        values[rows_B1, step.slots_BT] = value_BGTK.transpose(1, 2).to(values.dtype)
        span = step.mask_B1TS.shape[-1]
        return keys[:, :span].transpose(1, 2), values[:, :span].transpose(1, 2)

    def advance(self, step: CacheStep) -> None:
        """Counts the tokens of a step as known, after the last layer has stored them."""
        self.lengths = [
            length + count for length, count in zip(self.lengths, step.counts, strict=True)
        ]


def may_look(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """True where a query may look at a key: never ahead, and at most `window` tokens back, itself
    included.
    """
    mask = key_positions <= query_positions
    return mask if window is None else mask & (key_positions > query_positions - window)

"""Keys and values of the tokens seen so far, for sequences of different lengths (a ragged batch).

One call of the model appends up to T tokens to every row; rows with fewer are padded on the right:

    row 0 (5 known, 1 new)   k k k k k n . .        k known   n new   . not yet written
    row 1 (2 known, 3 new)   k k n n n . . .

Shape suffixes: B batch, T new tokens, S slots looked at, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class KVCache:
    """Keys and values of up to `capacity` tokens of each of `batch_size` sequences, for the layers
    given.

    `lengths[row]` is how many tokens a row holds; set it to 0 to use the row for a new sequence.
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
        self.device = device
        # One slot more than the capacity: padding tokens write there, and it is masked.
        shape = (batch_size, capacity + 1, kv_heads, head_width)
        self.keys = {layer: torch.zeros(shape, dtype=dtype, device=device) for layer in layers}
        self.values = {layer: torch.zeros_like(keys) for layer, keys in self.keys.items()}

    def plan(self, num_tokens: int, counts: Sequence[int] | None, window: int | None) -> CacheStep:
        """The step that appends `counts[row]` of the `num_tokens` given tokens to each row.

        Raises ValueError if a row would grow past the capacity, or if counts do not fit.
        """
        counts = [num_tokens] * len(self.lengths) if counts is None else list(counts)
        is_possible = all(0 <= count <= num_tokens for count in counts)
        if len(counts) != len(self.lengths) or not is_possible:
            rows = len(self.lengths)
            raise ValueError(f"counts {counts} do not fit {rows} rows of {num_tokens} tokens")
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        longest = max(ends)
        if longest > self.capacity:
            row, room = ends.index(longest), self.capacity
            raise ValueError(f"row {row} needs {longest} slots, the cache holds {room}")
        starts_B1 = torch.tensor(self.lengths, device=self.device)[:, None]
        new_T = torch.arange(num_tokens, device=self.device)
        is_real_BT = new_T < torch.tensor(counts, device=self.device)[:, None]
        # Padding stands at position 0, which every table has; what it computes is thrown away.
        positions_BT = torch.where(is_real_BT, starts_B1 + new_T, 0)
        slots_BT = torch.where(is_real_BT, positions_BT, self.capacity)
        slots_S = torch.arange(max(1, longest), device=self.device)
        mask_BTS = may_look(positions_BT[:, :, None], slots_S, window)
        return CacheStep(self, counts, positions_BT, slots_BT, mask_BTS[:, None])


@dataclass(frozen=True)
class CacheStep:
    """One call's new tokens: their slots and their mask, the same for every layer."""

    cache: KVCache
    counts: list[int]
    positions_BT: Tensor
    slots_BT: Tensor
    mask_B1TS: Tensor

    def append(self, layer: int, key_BGTK: Tensor, value_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values; returns all cached ones, [B, G, S, K] each."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        rows_B1 = torch.arange(len(self.counts), device=keys.device)[:, None]
        keys[rows_B1, self.slots_BT] = key_BGTK.transpose(1, 2).to(keys.dtype)
        values[rows_B1, self.slots_BT] = value_BGTK.transpose(1, 2).to(values.dtype)
        span = self.mask_B1TS.shape[-1]
        return keys[:, :span].transpose(1, 2), values[:, :span].transpose(1, 2)

    def finish(self) -> None:
        """Counts the new tokens as known, after the last layer has stored them."""
        lengths = self.cache.lengths
        self.cache.lengths = [a + b for a, b in zip(lengths, self.counts, strict=True)]


def may_look(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """True where a query attends to a key: not ahead, at most `window` back, itself included."""
    mask = key_positions <= query_positions
    return mask if window is None else mask & (key_positions > query_positions - window)

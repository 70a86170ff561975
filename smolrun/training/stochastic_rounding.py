"""Stochastic rounding: parameters kept in bfloat16 and updated in float32.

bfloat16 has 8 significant bits: adding less than 1/512 of a number and rounding to the nearest
changes nothing, and late in training most updates are smaller than that. Here a number between two
neighbours becomes the upper one with the probability that keeps its mean: 16 random bits are added
below the last bit that is kept, then the lower half is cut off. Small updates are then exact on
average. The optimizer's state is kept in the same way.

    bfloat16 piece --> float32 --> the optimizer's update --> + random bits --> cut --> bfloat16

The random bits depend on the seed, the number of the update and the name of the parameter, and are
drawn on the CPU for every device: all replicas round alike, and so does a resumed run.

Source: Gupta et al., "Deep Learning with Limited Numerical Precision", 2015; Zamirai et al.,
"Revisiting BFloat16 Training", 2020.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from smolrun.parts.optimizer_state import UPDATES

# Numbers that are in float32 at one time: half a MB a tensor. An update of AdamW takes 4 ns per
# parameter on one core, 11 with pieces of 2^15, 5 with pieces of 2^20 (and 0.6 in plain float32).
PIECE = 1 << 17

Groups = list[dict[str, Any]]


class StochasticRounding(torch.optim.Optimizer):
    """Runs the optimizer that `make(groups)` gives on float32 copies of pieces of the parameters.

    An optimizer that is not elementwise gets whole parameters instead of pieces.
    """

    def __init__(
        self,
        groups: Groups,
        make: Callable[[Groups], torch.optim.Optimizer],
        *,
        names: Mapping[torch.nn.Parameter, str],
        seed: int,
        is_elementwise: bool,
    ) -> None:
        # The inner optimizer's only parameter: the current piece, in float32.
        self._work = torch.nn.Parameter(torch.zeros(1, device=groups[0]["params"][0].device))
        self.inner = make([{"params": [self._work]}])
        super().__init__(groups, self.inner.defaults)
        self._names = names
        self._bits = _RandomBits(seed, self._work.device)
        self._is_elementwise = is_elementwise

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            self.inner.param_groups[0].update(settings)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad)
        self._release()

    def _update(self, parameter: torch.nn.Parameter, gradient: Tensor) -> None:
        state = self.state[parameter]
        before = dict(state)
        updates = before.pop(UPDATES, torch.zeros((), dtype=torch.int64)) + 1
        self._bits.begin(int(updates), self._names[parameter])
        for start, stop in self._pieces(parameter):
            values = _window(parameter.data, start, stop)
            # The optimizer's state of this piece; empty before its first update.
            memory = {
                key: _window(value, start, stop).float()
                if value.dtype == values.dtype
                else value.clone()
                for key, value in before.items()
            }
            self._run(values, _window(gradient, start, stop), memory)
            self._bits.round_into(values, self._work.data, f"{start}")
            for key, value in memory.items():
                if value.shape == values.shape:
                    kept = state.setdefault(key, torch.zeros_like(parameter))
                    self._bits.round_into(_window(kept, start, stop), value, f"{start}/{key}")
                else:
                    # A counter, or Adafactor's sums: small, kept in its own dtype.
                    state[key] = value
        state[UPDATES] = updates

    def _pieces(self, parameter: Tensor) -> list[tuple[int, int | None]]:
        """Ranges of the flat parameter; (0, None): all of it in its own shape."""
        if not (self._is_elementwise and parameter.is_contiguous()):
            return [(0, None)]
        size = parameter.numel()
        return [(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]

    def _run(self, values: Tensor, gradient: Tensor, memory: dict[str, Tensor]) -> None:
        """One update of the float32 copy; reads and writes the optimizer's state in `memory`."""
        self._work.grad = None  # the last piece may have another shape
        self._work.data = values.float()
        self._work.grad = gradient.float()
        self.inner.state[self._work] = memory
        self.inner.step()

    def _release(self) -> None:
        self.inner.state.clear()
        self._work.grad = None
        self._work.data = self._work.data.new_zeros(1)


def _window(tensor: Tensor, start: int, stop: int | None) -> Tensor:
    if stop is not None:
        return tensor.view(-1)[start:stop]
    return tensor.view(1) if tensor.ndim == 0 else tensor


class _RandomBits:
    """16 random bits for every number. One block is drawn per update, and every piece reads it from
    its own offset: a number needs new bits in each update, not bits unlike its neighbours'."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._drawn_for = -1
        self._block = torch.empty(0)
        self._name = ""

    def begin(self, update: int, name: str) -> None:
        """Selects the bits for one update of one parameter."""
        self._name = name
        if update != self._drawn_for:
            generator = torch.Generator().manual_seed(_number(f"{self._seed}:{update}"))
            bits = torch.randint(0, 1 << 16, (2 * PIECE,), generator=generator, dtype=torch.int32)
            self._block, self._drawn_for = bits.to(self._device), update

    def round_into(self, target: Tensor, source: Tensor, what: str) -> None:
        """Writes float32 `source` into bfloat16 `target`; overwrites the source."""
        size = source.numel()
        start = _number(f"{self._name}/{what}") % PIECE
        repeats = -(-size // PIECE)
        block = self._block if repeats == 1 else self._block[:PIECE].repeat(repeats + 1)
        bits = block[start : start + size].view(source.shape)
        # bfloat16 is the upper half of a float32; a carry reaches the bits that are kept.
        cut = source.view(torch.int32).add_(bits).bitwise_and_(-(1 << 16))
        target.copy_(cut.view(torch.float32))


def _number(text: str) -> int:
    """A 56-bit hash of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")

"""The average of the weights over the last updates, which is quieter than the newest weights.

    average = decay * average + (1 - decay) * weights        after every update

With decay 0 it is the weights themselves, and costs nothing. Knows nothing of who asks for it.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class PolyakAverage:
    """Of these parameters, by name; the model keeps the newest weights."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.values: dict[str, torch.Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begins with the weights as they are."""
        if self._decay:
            self.values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the newest weights into the average."""
        for name, value in self.values.items():
            value.lerp_(self._parameters[name], 1 - self._decay)

    @contextmanager
    def in_use(self, is_wanted: bool = True) -> Iterator[None]:
        """While it is open, the model has the average for its weights; nothing is copied."""
        self._exchange(is_wanted)
        try:
            yield
        finally:
            self._exchange(is_wanted)

    def _exchange(self, is_wanted: bool) -> None:
        for name in self.values if is_wanted else ():
            parameter = self._parameters[name]
            parameter.data, self.values[name] = self.values[name], parameter.data

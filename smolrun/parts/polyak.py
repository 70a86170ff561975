"""The average of the weights over the last updates, which is quieter than the newest weights.

    average = decay * average + (1 - decay) * weights        after every update

Knows nothing of who asks for it.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class PolyakAverage:
    """Of these parameters; `values` are in their order."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the newest weights into the average."""
        for value, parameter in zip(self.values, self._parameters, strict=True):
            value.lerp_(parameter, 1 - self._decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begins with the weights as they are."""
        for value, parameter in zip(self.values, self._parameters, strict=True):
            value.copy_(parameter)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While it is open, the model has the average for its weights; nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self.values[index] = self.values[index], parameter.data

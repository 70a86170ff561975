"""smolrun: train and serve neural networks across your own machines. In Python:

model, tokenizer = smolrun.load("latest")

What it refuses is a smolrun.SmolrunError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smolrun.errors import SmolrunError as SmolrunError

if TYPE_CHECKING:
    from smolrun.driver.load import load as load

__all__ = ["SmolrunError", "load"]


def __getattr__(name: str) -> Any:
    """`load` is imported on use: it imports torch, which takes seconds."""
    if name == "load":
        from smolrun.driver.load import load

        return load
    raise AttributeError(f"module 'smolrun' has no attribute {name!r}")

"""What the driver sends to every rank once the data is ready: its path, its hash, and what a
model must fit.

Knows no torch, so that the driver can prepare data without loading it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from smolrun.errors import DataError

Kind = Literal["tokens", "features"]

# Called as progress(what is being done, how much is done, how much there is) while data is
# prepared.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Data in one safetensors file at `path`, whose sha256 every rank can check.

    kind "tokens": num_outputs is the vocabulary size, sequence_length the tokens of one sample,
    `tokenizer` a folder with tokenizer.json (None: not text). kind "features": num_outputs is the
    number of classes, num_inputs the number of features. train_size and eval_size count samples.
    `masked`: each token has a loss mask (chat). `stream`: how the
    train part, which is then no file and has no size (0), is read and fetched.
    """

    kind: Kind
    path: str
    sha256: str
    num_outputs: int
    num_inputs: int | None
    sequence_length: int | None
    tokenizer: str | None
    train_size: int
    eval_size: int
    description: str
    masked: bool = False
    model_folder: str | None = None
    stream: dict[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prepared:
        """What `to_json` made; raises DataError naming what is missing, unknown or wrong."""
        allowed: dict[str, tuple[type, ...]] = {
            "kind": (str,),
            "path": (str,),
            "sha256": (str,),
            "num_outputs": (int,),
            "num_inputs": (int, type(None)),
            "sequence_length": (int, type(None)),
            "tokenizer": (str, type(None)),
            "train_size": (int,),
            "eval_size": (int,),
            "description": (str,),
            "masked": (bool,),
            "model_folder": (str, type(None)),
            "stream": (dict, type(None)),
        }
        wrong = sorted(set(allowed) ^ set(data))
        wrong += [key for key in allowed if key in data and type(data[key]) not in allowed[key]]
        if not wrong and data["kind"] not in ("tokens", "features"):
            wrong = ["kind"]
        if not wrong:
            needed = "sequence_length" if data["kind"] == "tokens" else "num_inputs"
            sizes = ("num_outputs", "train_size", "eval_size", needed)
            wrong = [key for key in sizes if data[key] is None or data[key] < 1]
            if data["stream"] is not None:
                wrong = [key for key in wrong if key != "train_size"]
                wrong += [] if _is_stream(data["stream"]) else ["stream"]
        if wrong:
            names = ", ".join(wrong)
            raise DataError(
                f"the description of prepared data is damaged: wrong or missing {names}"
            )
        return cls(**data)


def _is_stream(facts: Mapping[str, Any]) -> bool:
    """From which document on it is read, in blocks of how many, and how many steps ahead."""
    lowest = {"first_document": 0, "block_documents": 1, "prefetch_steps": 0}
    return set(facts) == set(lowest) and all(
        type(facts[key]) is int and facts[key] >= limit for key, limit in lowest.items()
    )

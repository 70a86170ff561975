"""What the driver sends to every rank once the data is ready: its path, its hash, and what a
model must fit.

Knows no torch, so that the driver can prepare data without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from smolrun.errors import DataError

Kind = Literal["tokens", "features"]
Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]

# Called as progress(what is being done, how much is done, how much there is) while data is
# prepared.
Progress = Callable[[str, int, int], None]


class StreamKeys(TypedDict):
    """From which document on a stream is read, in blocks of how many, and how many steps ahead."""

    first_document: Natural
    block_documents: Count
    prefetch_steps: Natural


class Prepared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    num_outputs: Count
    num_inputs: Count | None
    sequence_length: Count | None
    tokenizer: str | None
    train_size: Natural
    eval_size: Count
    description: str
    masked: bool = False
    model_folder: str | None = None
    stream: StreamKeys | None = None

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prepared:
        """What `to_json` made; raises DataError naming what is missing, unknown or wrong."""
        try:
            found = msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise DataError(f"the description of prepared data is damaged: {error}") from None
        needed = "sequence_length" if found.kind == "tokens" else "num_inputs"
        sizes = (needed,) if found.stream is not None else (needed, "train_size")
        for name in sizes:
            if not getattr(found, name):
                raise DataError(f"the description of prepared data is damaged: no {name}")
        return found

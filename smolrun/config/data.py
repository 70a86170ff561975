"""Group `data`: what to learn from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from smolrun.config.base import Count, Name, Natural, NotNegative, Positive, Target
from smolrun.config.targets import Custom, Kind, own_target


class _Text(Target):
    """Keys of every data set made of text."""

    produces: ClassVar[Kind | None] = "tokens"
    tokenizer: Literal["bpe", "bytes"] = Field(
        description="bpe is trained on the text, once; bytes needs no training"
    )
    vocab_size: Annotated[int, Field(ge=257)] = Field(
        description="Tokens to learn for bpe, the 256 bytes included"
    )
    sequence_length: Count = Field(description="Tokens in one training sample")
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Share of the text kept for evaluation"
    )
    max_mb: Positive | None = Field(
        description="Stop reading after so many megabytes; null = read all"
    )


class PythonStdlib(_Text):
    """The source code of Python's own standard library: text that every machine already has."""

    target: Literal["smolrun.data.python_stdlib:PythonStdlib"]


class TextFiles(_Text):
    """Your own text files."""

    target: Literal["smolrun.data.text:TextFiles"]
    path: Name | Annotated[list[Name], Field(min_length=1)] = Field(
        description="A file or folder, or a list of them",
        json_schema_extra={
            "absent": "say where the text is: data.path=FILE or FOLDER, or a list of them"
        },
    )
    glob: Name = Field(description="Which files of a folder, such as **/*.txt")


class Digits(Target):
    """Little drawn digits with noise, made on the spot: ten classes for `model=mlp`."""

    produces: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.data.digits:Digits"]
    train_size: Count = Field(description="Samples to train on")
    eval_size: Count = Field(description="Samples to evaluate on")
    noise: NotNegative = Field(description="Standard deviation of the noise; 0 = clean pictures")
    seed: Natural = Field(description="Another seed makes other pictures")


Data = Annotated[
    Annotated[PythonStdlib, Tag("PythonStdlib")]
    | Annotated[TextFiles, Tag("TextFiles")]
    | Annotated[Digits, Tag("Digits")]
    | Custom,
    own_target(PythonStdlib, TextFiles, Digits),
]

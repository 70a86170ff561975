"""Group `data`: what to train on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from smolrun.config.base import (
    Count,
    CustomTargetConfig,
    Kind,
    Name,
    Natural,
    NotNegative,
    Positive,
    TargetConfig,
    chosen_by_target,
)

Part = Annotated[float, Field(gt=0, lt=1)]


class DataConfig(TargetConfig):
    """What the checks ask of a data set. The defaults are those of the user's own."""

    produces: ClassVar[Kind | None] = None  # None: not known before it is loaded

    @property
    def is_stream(self) -> bool:
        """Whether rows are read while training."""
        return False


class _TextConfig(DataConfig):
    """Keys of every data set made of text."""

    produces: ClassVar[Kind | None] = "tokens"
    tokenizer: Name = Field(
        json_schema_extra={"allowed": "auto, bpe, bytes, or a tokenizer's folder or hub name"}
    )
    vocab_size: Annotated[int, Field(ge=257)]
    sequence_length: Count
    eval_fraction: Part
    max_mb: Positive | None


class PythonStdlibConfig(_TextConfig):
    """The source code of Python's own standard library: text that every machine already has."""

    target: Literal["smolrun.data.python_stdlib:PythonStdlib"]


class TextFilesConfig(_TextConfig):
    """Your own text files."""

    target: Literal["smolrun.data.text:TextFiles"]
    path: Name | Annotated[list[Name], Field(min_length=1)] = Field(
        json_schema_extra={"absent": "set data.path=FILE or FOLDER, or a list of them"}
    )
    glob: Name | Annotated[list[Name], Field(min_length=1)]


class ShakespeareConfig(_TextConfig):
    """Shakespeare's complete works."""

    target: Literal["smolrun.data.shakespeare:Shakespeare"]
    path: Name | None


class HuggingFaceDataConfig(_TextConfig):
    """Any dataset of Hugging Face's library: text, or images with classes."""

    produces: ClassVar[Kind | None] = None
    target: Literal["smolrun.data.huggingface:HuggingFaceData"]
    path: Name = Field(json_schema_extra={"absent": "set data.path=NAME, FOLDER or FILE"})
    subset: Name | None
    split: Name
    eval_split: Name | None
    streaming: bool
    eval_documents: Count
    block_documents: Count
    prefetch_steps: Annotated[int, Field(ge=0, le=100)]
    text_column: Name | None
    image_column: Name | None
    label_column: Name | None
    image_size: Annotated[int, Field(ge=1, le=4096)] | None
    image_mode: Literal["grey", "rgb"]
    packing: bool

    @property
    def is_stream(self) -> bool:
        return self.streaming


class ChatConfig(_TextConfig):
    """Conversations; the loss covers the assistant's answers only."""

    target: Literal["smolrun.data.chat:Chat"]
    path: Name = Field(json_schema_extra={"absent": "set data.path=FILE.jsonl, or a dataset"})
    subset: Name | None
    split: Name
    template: Name = Field(json_schema_extra={"allowed": "auto, plain, or a .jinja file"})
    packing: bool


class FashionMnistConfig(DataConfig):
    """70,000 images of clothes in ten classes, for `model=mlp`."""

    produces: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.data.mnist:FashionMnist"]
    path: Name | None


class MnistConfig(DataConfig):
    """Handwritten digits, for `model=mlp`."""

    produces: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.data.mnist:Mnist"]
    path: Name | None
    eval_fraction: Part


class DigitsConfig(DataConfig):
    """Generated images of digits with noise: ten classes for `model=mlp`."""

    produces: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.data.digits:Digits"]
    train_size: Count
    eval_size: Count
    noise: NotNegative
    seed: Natural


class CustomDataConfig(CustomTargetConfig, DataConfig, extra="allow"):
    """The user's own data set."""


if TYPE_CHECKING:
    AnyData = DataConfig
else:
    AnyData = chosen_by_target(
        CustomDataConfig,
        PythonStdlibConfig,
        TextFilesConfig,
        ShakespeareConfig,
        HuggingFaceDataConfig,
        ChatConfig,
        FashionMnistConfig,
        MnistConfig,
        DigitsConfig,
    )

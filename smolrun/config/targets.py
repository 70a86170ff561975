"""Groups that name something to build: model, data, algorithm. Ours are checked key by key, yours
pass through.

A class here lists exactly the keyword-only parameters of its target, so a wrong key is told before
anything loads.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag

from smolrun.config.base import Count, Name, Natural, NotNegative, Positive, Target

Kind = Literal["tokens", "features"]


def _module_and_name(target: str) -> str:
    module, _, name = target.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError("not of the form module:name, such as my_code.model:build")
    if module.split(".")[0] == "smolrun":
        raise ValueError("smolrun has no such target")
    return target


class CustomTarget(Target):
    """Your own class or function.

    Its keys are handed to it as they are, and checked when it is built.
    """

    model_config = ConfigDict(extra="allow")
    consumes: ClassVar[Kind | None] = None
    produces: ClassVar[Kind | None] = None
    target: Annotated[Name, AfterValidator(_module_and_name)] = Field(
        description="Your code, as module:name",
        json_schema_extra={"allowed": "module:name, of your own code"},
    )


class Decoder(Target):
    """A GPT-like decoder: the models `gpt_*`."""

    consumes: ClassVar[Kind | None] = "tokens"
    target: Literal["smolrun.models.decoder:build"]
    layers: Count = Field(description="Blocks, each one attention and one feed-forward layer")
    width: Count = Field(description="Size of the hidden vectors")
    heads: Count = Field(description="Query heads")
    kv_heads: Count | None = Field(
        description="Key and value heads, shared by groups of query heads; null = heads"
    )
    head_width: Count | None = Field(description="Size of one head; null = width / heads")
    ffn_width: Count | None = Field(
        description="Hidden size of the feed-forward layer; null = the usual multiple"
    )
    max_sequence_length: Count = Field(description="Longest sequence it can read, in tokens")
    position: Literal["rope", "learned"] = Field(description="How it knows the order of tokens")
    norm: Literal["rmsnorm", "layernorm"] = Field(
        description="Normalisation in front of each layer"
    )
    activation: Literal["swiglu", "gelu"] = Field(description="Inside the feed-forward layer")
    tie_embeddings: bool = Field(
        description="One matrix for reading tokens and for predicting them"
    )
    attention_bias: bool | Literal["qkv"] = Field(
        description="Biases in the attention projections; qkv = not in the last"
    )
    mlp_bias: bool = Field(description="Biases in the feed-forward layers")
    qk_norm: bool = Field(description="Normalise queries and keys per head")
    sliding_window: Count | None = Field(description="Tokens each one may look back at; null = all")
    rope_theta: Positive = Field(description="Base of the rotary angles")
    norm_eps: Positive = Field(description="Keeps the normalisation away from a division by zero")


class Mlp(Target):
    """A plain multi-layer perceptron for feature vectors."""

    consumes: ClassVar[Kind | None] = "features"
    target: Literal["smolrun.models.mlp:build"]
    widths: list[Count] = Field(description="Sizes of the hidden layers, first to last")
    activation: Literal["relu", "gelu"] = Field(description="Between the layers")


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


class Single(Target):
    """One rank that holds everything: the reference that all others must equal."""

    target: Literal["smolrun.algorithms.single:Single"]


class ClassicDP(Target):
    """A replica on every rank; a ring all_reduce averages gradients while backward still runs."""

    target: Literal["smolrun.algorithms.classicdp:ClassicDP"]
    bucket_mb: Positive = Field(
        description="Gradients travel in buckets of this size; smaller overlaps more"
    )


def _own_target(*classes: type[Target]) -> Discriminator:
    known = {get_args(cls.model_fields["target"].annotation)[0]: cls.__name__ for cls in classes}

    def choose(value: Any) -> str:
        if isinstance(value, Target):
            return type(value).__name__
        target = value.get("target") if isinstance(value, dict) else None
        return known.get(target, "CustomTarget") if isinstance(target, str) else "CustomTarget"

    return Discriminator(choose)


Custom = Annotated[CustomTarget, Tag("CustomTarget")]
Model = Annotated[
    Annotated[Decoder, Tag("Decoder")] | Annotated[Mlp, Tag("Mlp")] | Custom,
    _own_target(Decoder, Mlp),
]
Data = Annotated[
    Annotated[PythonStdlib, Tag("PythonStdlib")]
    | Annotated[TextFiles, Tag("TextFiles")]
    | Annotated[Digits, Tag("Digits")]
    | Custom,
    _own_target(PythonStdlib, TextFiles, Digits),
]
Algorithm = Annotated[
    Annotated[Single, Tag("Single")] | Annotated[ClassicDP, Tag("ClassicDP")] | Custom,
    _own_target(Single, ClassicDP),
]

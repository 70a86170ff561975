"""What the classes of the configuration share: strict types, named ranges, and groups that name
something to build (model, data, algorithm).

What a key means stands beside it in conf/; docs/configuration.md takes it from there.

A class of `models.py`, `data.py` or `algorithms.py` lists exactly the keyword-only parameters of
its target, so that a wrong key is an error before anything loads. Keys of the user's own targets
pass through unchecked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
Device = Literal["auto", "cpu", "mps", "cuda"]
TorchBuild = Literal["auto", "cpu", "cuda"]
Ports = Annotated[str, Field(pattern=r"^\d{1,5}-\d{1,5}$")]
Kind = Literal["tokens", "features"]
SHIPPED_TARGETS: set[str] = set()
"""Every `target` that comes with smolrun."""


class Section(BaseModel):
    """One group of keys. Unknown keys, silent conversions, nan and inf are errors.

    Values never change later.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _integral_floats_are_integers(cls, data: Any) -> Any:
        """1e3 is 1000 where an integer is wanted; YAML and Hydra know it as a float only."""
        if not isinstance(data, Mapping):
            return data
        return {k: _integer(v) if k in cls.model_fields else v for k, v in data.items()}


def _integer(value: Any) -> Any:
    if isinstance(value, list):
        return [_integer(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class TargetConfig(Section):
    """A group whose keys become the keyword arguments of a shipped class or function, or of one of
    the user's.
    """

    name: Name
    target: Name

    def keywords(self) -> dict[str, Any]:
        """The keyword-only arguments for the target: every key but `name` and `target`."""
        return self.model_dump(exclude={"name", "target"})


def module_and_name(target: str) -> str:
    """A target as it is; ValueError where it cannot name anything."""
    module, _, name = target.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError("not of the form module:name, such as my_code.model:build")
    # In a shipped module the name is wrong.
    is_shipped = any(shipped.startswith(f"{module}:") for shipped in SHIPPED_TARGETS)
    if module.split(".")[0] == "smolrun" and (is_shipped or not _is_module(module)):
        raise ValueError("smolrun has no such target")
    return target


def _is_module(module: str) -> bool:
    """Whether the module exists, without importing it; a user may add files beside the shipped."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package does not exist either
        return False


class CustomTargetConfig(TargetConfig):
    """The user's own class or function: its keys are passed to it unchanged and unchecked.

    A group's class of it says `extra="allow"` again, as pydantic takes that from the last base.
    """

    target: Annotated[Name, AfterValidator(module_and_name)] = Field(
        json_schema_extra={"allowed": "module:name, of your own code"}
    )


def chosen_by_target(custom: type[CustomTargetConfig], *shipped: type[TargetConfig]) -> Any:
    """The union of these classes: `target` chooses one of the shipped, every other value is the
    user's own code.
    """
    known = {get_args(cls.model_fields["target"].annotation)[0]: cls.__name__ for cls in shipped}
    SHIPPED_TARGETS.update(known)

    def choose(value: Any) -> str:
        if isinstance(value, TargetConfig):
            return type(value).__name__
        target = value.get("target") if isinstance(value, dict) else None
        return known.get(target, custom.__name__) if isinstance(target, str) else custom.__name__

    members = [Annotated[cls, Tag(cls.__name__)] for cls in (*shipped, custom)]
    return Annotated[Union[tuple(members)], Discriminator(choose)]  # noqa: UP007  (made at run time)

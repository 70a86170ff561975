"""What every class of the configuration shares.

Strict types, ranges with a name, and no unknown keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class Target(Section):
    """A group whose keys become the keyword arguments of a class or function of ours or of the
    user.
    """

    name: Name = Field(description="A short name, used in tables and file names")
    target: Name = Field(description="What to build, as module:name; your own code works too")

    def keywords(self) -> dict[str, Any]:
        """The keyword-only arguments for the target: every key but `name` and `target`."""
        return self.model_dump(exclude={"name", "target"})

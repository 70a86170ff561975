"""What every class of the configuration shares.

Strict types, ranges with a name, and no unknown keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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


class Target(Section):
    """A group whose keys become the keyword arguments of a class or function of ours or of the
    user.
    """

    name: Name = Field(description="A short name, used in tables and file names")
    target: Name = Field(description="What to build, as module:name; your own code works too")

    def keywords(self) -> dict[str, Any]:
        """The keyword-only arguments for the target: every key but `name` and `target`."""
        return self.model_dump(exclude={"name", "target"})

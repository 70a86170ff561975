"""Groups that name something to build: model, data, algorithm. Ours are checked key by key, yours
pass through.

A class of `models.py`, `data.py` or `algorithms.py` lists exactly the keyword-only parameters of
its target, so a wrong key is told before anything loads.
"""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag

from smolrun.config.base import Name, Target

Kind = Literal["tokens", "features"]
_SHIPPED_MODULES: set[str] = set()


def _module_and_name(target: str) -> str:
    module, _, name = target.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError("not of the form module:name, such as my_code.model:build")
    is_shipped = module in _SHIPPED_MODULES  # then the name in it is wrong
    if module.split(".")[0] == "smolrun" and (is_shipped or not _is_module(module)):
        raise ValueError("smolrun has no such target")
    return target


def _is_module(module: str) -> bool:
    """Whether it is there, found without running it: a file beside the shipped ones is yours."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package around it
        return False


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


def own_target(*classes: type[Target]) -> Discriminator:
    """Tells a group's own classes apart by `target`; everything else is the user's."""
    known = {get_args(cls.model_fields["target"].annotation)[0]: cls.__name__ for cls in classes}
    _SHIPPED_MODULES.update(target.partition(":")[0] for target in known)

    def choose(value: Any) -> str:
        if isinstance(value, Target):
            return type(value).__name__
        target = value.get("target") if isinstance(value, dict) else None
        return known.get(target, "CustomTarget") if isinstance(target, str) else "CustomTarget"

    return Discriminator(choose)


Custom = Annotated[CustomTarget, Tag("CustomTarget")]

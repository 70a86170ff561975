"""What was found out about a host, and what that makes of it: fine, usable, or not. Pure.

A finding is one sentence with the command that mends it. `findings.py` and `links.py` make them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Weight = Literal["blocks", "limits", "note"]
State = Literal["fine", "usable", "cannot run"]

_ORDER: dict[Weight, int] = {"blocks": 0, "limits": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """`blocks`: no run can use the host. `limits`: it can, worse than it could. `note`: to know.

    `todo` is what mends it, a command where there is one.
    """

    weight: Weight
    what: str
    todo: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What a host is good for, and why, the gravest first."""

    state: State
    findings: tuple[Finding, ...]

    @property
    def sentence(self) -> str:
        """fine | usable, but ... | cannot run: ..."""
        if self.state == "fine":
            return "fine"
        weight: Weight = "blocks" if self.state == "cannot run" else "limits"
        reasons = [one.what for one in self.findings if one.weight == weight]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        lead = "cannot run: " if weight == "blocks" else "usable, but "
        return f"{lead}{reasons[0]}{more}"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "state": self.state,
            "sentence": self.sentence,
            "findings": [one.to_json() for one in self.findings],
        }


def verdict(findings: Iterable[Finding]) -> Verdict:
    """What these findings make of a host; equal ones count once."""
    sorted_ = sorted(dict.fromkeys(findings), key=lambda one: _ORDER[one.weight])
    return Verdict(_state(sorted_), tuple(sorted_))


def _state(findings: Sequence[Finding]) -> State:
    weights = {one.weight for one in findings}
    if "blocks" in weights:
        return "cannot run"
    return "usable" if "limits" in weights else "fine"

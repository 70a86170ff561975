"""What the folders of conf/ offer, read from the file names and their first comment.

No YAML, no Hydra: it is instant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

Groups = dict[str, dict[str, str]]
"""Group -> choice -> its description."""

DEFAULT = re.compile(r"^\s*-\s*(\w+):\s*(\w+)", re.MULTILINE)


def shipped_folder() -> Path:
    """The conf/ that comes with smolrun."""
    spec = find_spec("smolrun.conf")
    if spec is None or spec.origin is None:
        raise RuntimeError("smolrun.conf is missing; install smolrun again")
    return Path(spec.origin).parent


def own_folder(beside: Path) -> Path | None:
    """The user's ./conf, or None where there is none or where it is the shipped one."""
    folder = beside / "conf"
    return folder if folder.is_dir() and folder.resolve() != shipped_folder().resolve() else None


def groups(folders: Iterable[Path]) -> Groups:
    """Every group with its choices.

    A choice may lie one folder deeper, as `sim/pi3` of cluster. Where two folders have one file,
    the folder named first counts.
    """
    found: Groups = {}
    for folder in folders:
        for file in files(folder):
            group, *names = file.relative_to(folder).with_suffix("").parts
            if group != "hydra":
                found.setdefault(group, {}).setdefault("/".join(names), description(file))
    return found


def files(folder: Path) -> list[Path]:
    """The files of all choices in a folder, sorted."""
    return sorted([*folder.glob("*/*.yaml"), *folder.glob("*/*/*.yaml")])


def defaults(folders: Iterable[Path]) -> dict[str, str]:
    """Group -> choice of config.yaml's defaults list, in its order."""
    for folder in folders:
        file = folder / "config.yaml"
        if file.is_file():
            return dict(DEFAULT.findall(file.read_text(encoding="utf-8", errors="replace")))
    return {}


def description(file: Path) -> str:
    """The first comment line of a choice, without Hydra's own header lines."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.startswith("#"):
                break
            if not line.startswith("# @"):
                return line.lstrip("# ").rstrip()
    return ""

"""The command line as data: flags apart from `key=value`, and `key=value` in the form Hydra takes.

Pure.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from smolrun.config.synonyms import CHOICE_ALIASES, KEY_ALIASES, TASK_KEY_ALIASES
from smolrun.errors import ConfigError

COMPLETING = ("--shell-completion", "-sc")
SHOWING = ("--cfg", "-c", "--info", "-i", "--hydra-help", *COMPLETING)
SWEEPING = ("--multirun", "-m")
IGNORED = ("--run", "-r")
FOLDER = ("--config-dir", "-cd")
NAME = ("--config-name", "-cn")
REFUSED = {
    "--experimental-rerun": "reads a pickle, which could run anything",
    "--config-path": "the shipped folder is always there; add yours with --config-dir",
    "-cp": "the shipped folder is always there; add yours with --config-dir",
}
HOME = re.compile(r"(?<=[=,\[])~((?:/[^,\]]*)?)(?=[,\]]|$)")
PLAIN = re.compile(r"^[\w./-]+$", re.ASCII)  # Hydra reads this as it is
VALUE = re.compile(r"^[A-Za-z_][\w.]*=")
# Whatever is typed is text.
VERBATIM = ("chat.system", "compare.runs", "compare.sweep", "generate.prompt", "logs.since")
RUNS = (  # names of runs
    *("attach.run", "checkpoint.resume", "logs.run", "model.run", "stop.run", "sweep.resume"),
    "watch.run",
)
# Hydra's marks of calls, mappings, quotes, escapes and interpolations.
MARKS = re.compile(r"""[(){}'"\\$]""")
ENTRY = re.compile(r"[^\[\],\s](?:[^\[\],]*[^\[\],\s])?")  # between the marks of a list
# What Hydra reads as something else than text: true, 4, 1e-3, inf, {a: 1}.
NO_TEXT = re.compile(r"^(?i:true|false|[+-]?(?:inf|nan|[\d.][\d_.]*(?:e[+-]?\d+)?)|\{.*\})$")


@dataclass
class Arguments:
    """What was asked for. `overrides` are the `key=value` as typed."""

    overrides: list[str] = field(default_factory=list)
    is_sweep: bool = False
    config_dir: Path | None = None
    config_name: str = "config"

    def flags(self) -> list[str]:
        """The flags that a job of a sweep needs too."""
        folder = ["--config-dir", str(self.config_dir)] if self.config_dir else []
        return [*folder, "--config-name", self.config_name]


def is_showing(argv: Iterable[str]) -> bool:
    """Whether Hydra shall only show or print something."""
    return any(word.partition("=")[0] in SHOWING for word in argv)


def is_completing(argv: Iterable[str]) -> bool:
    """Whether the shell asks how a word could go on, or for its part of that."""
    return any(word in COMPLETING for word in argv)


def refuse(argv: Iterable[str]) -> None:
    """ConfigError for flags of Hydra that are not for us, also where they are cut short."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("-")]
    wrong = [flag for flag in flags for name in REFUSED if name == flag or _is_short(flag, name)]
    if wrong:
        raise ConfigError([_unknown(flag, flag) for flag in wrong])


def _is_short(flag: str, name: str) -> bool:
    return len(flag) > 3 and name.startswith(flag)


def read(argv: Sequence[str]) -> Arguments:
    """Sort the words of the command line; ConfigError for every flag that does not exist."""
    found, problems, words = Arguments(), [], list(argv)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        if word in SWEEPING:
            found.is_sweep = True
        elif flag in FOLDER or flag in NAME:
            value = value if has_value else (words.pop(0) if words else "")
            if flag in NAME:
                found.config_name = value.removesuffix(".yaml")
            elif Path(value).is_dir():
                found.config_dir = Path(value).resolve()
            else:
                problems.append(f"{flag} {value}: there is no such folder")
        elif word.startswith("-"):
            problems += [] if word in IGNORED else [_unknown(flag, word)]
        else:
            found.overrides.append(word)
    if problems:
        raise ConfigError(problems)
    return found


def _unknown(flag: str, word: str) -> str:
    reason = next(
        (why for name, why in REFUSED.items() if flag == name or _is_short(flag, name)), ""
    )
    if reason:
        return f"{flag}: {reason}"
    hint = f"; did you mean {word.lstrip('-')}?" if "=" in word else ""
    return f"{word}: no such flag; settings are written key=value, without dashes{hint}"


def without_aliases(argv: Sequence[str]) -> list[str]:
    """`algorithm=ddp` as `algorithm=classicdp`, `task=stop run=x` as `task=stop stop.run=x`,
    `--json` as `status.format=json`. A short name that the task lacks stays, as an unknown key.
    """
    tasks = [word.partition("=")[2] for word in argv if word.lstrip("+").startswith("task=")]
    keys = {**KEY_ALIASES, **TASK_KEY_ALIASES.get(tasks[-1] if tasks else "train", {})}
    words = []
    for word in argv:
        key, equals, value = ("format=json" if word == "--json" else word).partition("=")
        name = key.lstrip("+")
        if same := CHOICE_ALIASES.get(name):
            value = ",".join(same.get(choice, choice) for choice in value.split(","))
        name, key = keys.get(name, name), key.removesuffix(name)
        if name in VERBATIM and equals:
            value = verbatim(value)
        elif name in RUNS:
            value = run_names(value)
        words.append(f"{key}{name}{equals}{value}")
    return words


def run_names(value: str) -> str:
    """A value that names runs, as text where Hydra would read something else: a part of a name such
    as 5e11 or 20260131, and jobs of sweeps, SWEEP/algorithm=fsdp,seed=1."""
    names = value.split(",")
    # Each name of a list has its own sweep: what follows without one belongs to the name before.
    if any("=" in name and "/" not in name for name in names):
        names = [value]
    if MARKS.search(value):
        return value
    return ",".join(quoted(n) if "," in n or NO_TEXT.match(n) else n for n in names)


def _implied(words: Sequence[str]) -> list[str]:
    """`model.run=RUN` means the model of a run: model=trained."""
    names = {word.lstrip("+").partition("=")[0] for word in words}
    return ["model=trained"] if "model.run" in names and "model" not in names else []


def verbatim(text: str) -> str:
    """A text of many words as a value: commas, quotes, brackets, `${` and line ends are its own."""
    return quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def at_home(word: str) -> str:
    """`key=~/x` with the home folder in place of the tilde, which no shell does within a word."""
    key, _, value = word.partition("=")
    if not VALUE.match(key.lstrip("+") + "=") or "'" in value or '"' in value:
        return word
    return HOME.sub(lambda found: _if_needed(Path.home().as_posix() + found[1]), word)


def readable(override: str) -> str:
    """`key=value` with quotes where Hydra's grammar needs them and the meaning is clear.

    The grammar knows ASCII letters and few signs, so `größe.txt`, `a=b.txt` and `~x` can only be
    text, also as entries of a list. Values with marks of their own (quotes, parentheses, ...)
    stay as they are.
    """
    key, _, value = override.partition("=")
    if not VALUE.match(override.lstrip("+")) or PLAIN.match(value) or MARKS.search(value):
        return override
    return f"{key}={ENTRY.sub(lambda entry: _if_needed(entry[0]), value)}"


def _if_needed(text: str) -> str:
    """Quoted where Hydra could not read it otherwise."""
    try:
        OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return quoted(text)
    return text


def typed_as_text(key: str, text: str) -> str:
    """What to type into this system's shell, so that the value is exactly this text."""
    if os.name == "nt":  # cmd and PowerShell: one pair of double quotes around all of it
        return '"' + f"{key}={quoted(text)}".replace('"', '\\"') + '"'
    return shlex.quote(f"{key}={QuotedString(text, Quote.double).with_quotes()}")


def quoted(text: str) -> str:
    """A text as a value that Hydra reads as exactly this text."""
    return str(QuotedString(text, Quote.single).with_quotes())


def for_hydra(overrides: Iterable[str], groups: Iterable[str]) -> list[str]:
    """Values as `++key=value`, so that a key missing in the files is judged by our classes, all
    of them at once. The choice of a group is always text: Hydra ends in a ValueError for others.
    """
    known = set(groups)

    def form(override: str) -> str:
        override = readable(override)
        key, _, value = override.partition("=")
        if key.lstrip("+") in known and NO_TEXT.match(value):
            return f"{key}={quoted(value)}"
        is_value = VALUE.match(override) and key not in known and not key.startswith("hydra.")
        return f"++{override}" if is_value else override

    overrides = list(overrides)
    implied = _implied(overrides) if "model" in known else []
    return [form(override) for override in (*implied, *overrides)]

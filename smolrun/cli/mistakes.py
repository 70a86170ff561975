"""Explains errors of the command line.

Unknown groups and choices, forgotten `=`, and Hydra's own complaints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smolrun.cli.arguments import quoted, readable, typed_as_text
from smolrun.cli.choices import Groups
from smolrun.config.describe import NOT_BUILT, allowed_values
from smolrun.config.problems import known_keys, takes_text
from smolrun.config.suggest import absent, closest, problem

COMPLAINTS = (HydraException, OmegaConfBaseException, YAMLError)
"""What composing raises when a file or the command line is wrong."""

OVERRIDE = re.compile(
    r"^(?:\+\+|\+|~)?(?P<key>[^=@]+)(?:@[^=]*)?(?P<equals>=?)(?P<value>.*)$", re.DOTALL
)

# Extras of smolrun that bring launchers and sweepers of Hydra.
PLUGINS = {
    "optuna": "optuna",
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
}
# What a number is meant for where a choice is asked for.
NUMBERS = {"cluster": "cluster.ranks", "staleness": "staleness.bound", "training": "training.steps"}


def find(
    overrides: Iterable[str], groups: Groups, *, is_sweep: bool
) -> tuple[list[str], list[str]]:
    """Problems that can be seen in the overrides themselves, and the overrides that have none.

    Among these stand, as text, values that Hydra cannot read: their keys have been given.
    """
    problems: list[str] = []
    sound: list[str] = []
    for override in overrides:
        found = list(_problems(override, groups, is_sweep))
        problems += found
        key, _, value = override.partition("=")
        if not found:
            sound.append(override)
        elif key not in groups and takes_text(key, value):
            sound.append(f"{key}={quoted(value)}")
    return problems, sound


def explain(error: Exception) -> str:
    """One line for an error of Hydra, OmegaConf or the YAML reader."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read ({error.message.splitlines()[0]})"
    if isinstance(error, MissingConfigException):
        return f"{error.missing_cfg_file or 'conf'}: {str(error).splitlines()[0]}"
    if isinstance(error, YAMLError):
        return f"a YAML file cannot be read: {' '.join(str(error).split())}"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error
    key = getattr(cause, "full_key", None)
    text = " ".join(
        line.strip() for line in (str(error) or str(cause)).splitlines() if "full_key:" not in line
    )
    text = re.sub(r"\s*object_type=\w+", "", text)
    return f"{key}: {text}" if key and str(key) not in text else text


def missing_plugin(error: Exception) -> str | None:
    """A sentence if the error is about a launcher or sweeper that Hydra does not have."""
    wanted = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    group, _, name = (wanted or "").rpartition("/")
    if group not in ("hydra/launcher", "hydra/sweeper"):
        return None
    found = sorted(getattr(error, "options", None) or ())
    if (extra := PLUGINS.get(name)) is not None:
        return problem(group, name, f"not installed; to install it: pip install 'smolrun[{extra}]'")
    what = f"no such plugin; installed: {', '.join(found)}"
    return problem(group, name, what, meant=closest(name, [*found, *PLUGINS]))


def _problems(override: str, groups: Groups, is_sweep: bool) -> Iterable[str]:
    match = OVERRIDE.match(override)
    if match is None or override.startswith("~"):
        return
    key, value = match["key"], match["value"]
    if not match["equals"]:
        yield _word(override, groups)
    elif key in groups and (wrong := _wrong_choices(key, value, groups)):
        yield from wrong
    else:
        try:
            parsed = OverridesParser.create().parse_override(readable(override))
        except HydraException as error:
            reason = str(error).splitlines()[0].partition(" expecting {")[0]
            hint = "; quote the texts in it" if value[:1] in ("[", "{") else _as_text(key, value)
            yield f"{override}: cannot be read ({reason}){hint}"
        else:
            if parsed.is_sweep_override() and not is_sweep:
                hint = "" if key in groups else _as_list(key, value) + _as_text(key, value)
                yield f"{override}: several values; add -m to run them all{hint}"


def _wrong_choices(group: str, value: str, groups: Groups) -> list[str]:
    if re.search(r"[(\[]", value):
        return []
    listed = [value] if value.startswith("{") else value.split(",")
    named = [choice.strip("'\" ") for choice in listed]
    return [_choice(group, name, groups) for name in named if name not in (*groups[group], "null")]


def _as_text(key: str, value: str) -> str:
    return f"; for one text type {typed_as_text(key, value)}" if takes_text(key, value) else ""


def _as_list(key: str, value: str) -> str:
    field = known_keys().get(key)
    takes_list = field is None or "list" in allowed_values(field)
    return f"; for one list type {key}=[{value}]" if takes_list else ""


def _word(word: str, groups: Groups) -> str:
    """A word without `=`, such as `train`."""
    named = [f"{group}={word}" for group, names in groups.items() if word in names]
    if named:
        return absent(word, "is not of the form key=value", meant=" or ".join(named))
    key = closest(word, [*groups, *known_keys()])
    return absent(word, "is not of the form key=value", meant=f"{key}=..." if key else None)


def _choice(group: str, choice: str, groups: Groups) -> str:
    allowed = ", ".join(groups[group])
    if choice in NOT_BUILT.get(group, ()):
        return problem(group, choice, "not built yet", allowed=allowed)
    is_home = (group, choice) == ("cluster", "home")  # the cluster file of the first steps
    meant = None if is_home else _meant(group, choice, groups)
    text = problem(group, choice, "no such choice", allowed=allowed, meant=meant)
    return f"{text}; `smolrun task=init` writes conf/cluster/home.yaml" if is_home else text


def _meant(group: str, choice: str, groups: Groups) -> str | None:
    """The existing choice that an unknown one resembles most."""
    names = groups[group]
    if choice.isdigit() and group in NUMBERS:
        return f"{NUMBERS[group]}={choice}"
    # Also by the last part alone: pi3 for sim/pi3.
    by_word = {name.rpartition("/")[2]: name for name in names} | {name: name for name in names}
    if near := closest(choice, by_word):
        return by_word.get(near, near)
    elsewhere = [f"{other}={choice}" for other, named in groups.items() if choice in named]
    begun = [name for word, name in by_word.items() if word.startswith(choice)]
    return " or ".join(elsewhere or list(dict.fromkeys(begun))) or None

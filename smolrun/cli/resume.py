"""checkpoint.resume: the configuration of the run being resumed, with what was typed on top; and
model.run of a new run: the model and the data that the earlier run had.

So `smolrun checkpoint.resume=latest` needs no more words: everything else is as the run had it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from smolrun.checkpoints.run_names import named, run_folder, what_exists
from smolrun.cli import compose, mistakes
from smolrun.cli.arguments import Arguments
from smolrun.config import resume
from smolrun.config.base import SHIPPED_TARGETS
from smolrun.config.suggest import problem
from smolrun.errors import CheckpointError, ConfigError
from smolrun.files import read_yaml
from smolrun.sanitize import HIDDEN, echo, one_line, without_credentials
from smolrun.tracking.run_folder import RunFolder

OUTPUTS = Path("outputs")
# An experiment sets many groups at once: with one, everything typed now counts, and is compared.
WHOLE = ("experiment",)
TRAINED = "smolrun.models.trained:find"
_TRUST = "checkpoint.trust_run_folder"
# Keys of `cluster` and of its hosts that decide what is run, where, and with which variables.
_OF_CLUSTER = ("ssh", "ssh_config", "python", "workdir", "env")
_MOST_SHOWN = 300
_MOST_NAMED = 20


def resumed(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` as it is, or, where it asks to resume, what the run had, with `overrides` on top.

    ConfigError where there is no such run, for every key that must not differ from it, and for a
    run folder of another account or machine that is not trusted.
    """
    wanted = (data.get("checkpoint") or {}).get("resume")
    if not isinstance(wanted, str):
        return dict(data)
    try:
        folder = RunFolder(run_folder(wanted, OUTPUTS))
        stored = _stored(folder.config)
        folder.refuse_links_outside()
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.resume = {wanted}: {error}") from None
    stored = resume.completed(stored, data)
    keys = [line.partition("=")[0].lstrip("+~") for line in overrides]
    if any(key in WHOLE for key in keys):
        merged = dict(data)
    else:
        merged = resume.on_top(stored, data, [key.partition("@")[0] for key in keys])
    merged["checkpoint"]["resume"] = wanted
    resume.keep_commit(stored, merged)
    if problems := list(resume.differences(stored, merged)):
        raise ConfigError(problems)
    _add_credentials(merged.get("cluster"))
    # Of `data`, not of `merged`: a run folder cannot declare itself trusted.
    is_trusted = data["checkpoint"].get("trust_run_folder") is True
    require_trust("checkpoint.resume", folder.path, {folder: stored}, is_trusted=is_trusted)
    merged["checkpoint"]["trust_run_folder"] = False
    return merged


def trained_further(
    data: Mapping[str, Any], overrides: Sequence[str], choice: Callable[[str], Any]
) -> dict[str, Any]:
    """`data` as it is, or, where a new run trains a model of an earlier one, with that run's model
    and its weights, and with its data unless `data` was typed. `choice(name)` composes a model.

    ConfigError where there is no such run, and for own code in the folder of another account or
    machine that is not trusted.
    """
    model = data.get("model") or {}
    wanted = model.get("run")
    is_new = data.get("task") == "train" and not (data.get("checkpoint") or {}).get("resume")
    if not is_new or model.get("target") != TRAINED or not isinstance(wanted, str):
        return dict(data)
    try:
        weights = named(wanted, OUTPUTS)
        folder = RunFolder(run_folder(wanted, OUTPUTS))
        stored = resume.with_current_keys(_stored(folder.config))
    except CheckpointError as error:
        raise ConfigError(problem("model.run", wanted, str(error))) from None
    before = {key: stored[key] for key in ("model", "data") if isinstance(stored.get(key), dict)}
    keys = [line.partition("=")[0].lstrip("+~") for line in overrides]
    if "data" in keys or any(key in WHOLE for key in keys):
        before.pop("data", None)
    if any(_runs_or_connects(before)):
        is_trusted = data["checkpoint"].get("trust_run_folder") is True
        require_trust("model.run", folder.path, {folder: before}, is_trusted=is_trusted)
    now = {"model": choice(before["model"].get("name")), "data": data.get("data")}
    groups = tuple(f"{group}." for group in before)
    typed = [key for key in keys if key.startswith(groups) and key != "model.run"]
    merged = resume.on_top(resume.completed(before, {k: now[k] for k in before}), data, typed)
    if "pretrained" in merged["model"]:
        merged["model"]["pretrained"] = False  # its weights come from the checkpoint
    is_here = weights.is_relative_to(OUTPUTS.resolve())
    # As a path: later another run may be the latest, or have that part in its name.
    place = weights.relative_to(OUTPUTS.resolve()) if is_here else weights
    checkpoint = {**data["checkpoint"], "weights": place.as_posix()}
    return {**data, **merged, "checkpoint": checkpoint}


def other_version(data: Mapping[str, Any]) -> Iterator[str]:
    """A line for a configuration of an earlier run, if another version of smolrun wrote it."""
    checkpoint = data.get("checkpoint") or {}
    wanted = checkpoint.get("resume") or checkpoint.get("weights")
    if isinstance(wanted, str):
        with contextlib.suppress(CheckpointError):
            folder = RunFolder(run_folder(wanted, OUTPUTS))
            before = (folder.summary().get("versions") or {}).get("smolrun")
            if before is not None and before != (now := version("smolrun")):
                where = one_line(str(folder.config))
                yield f"{where} was written by smolrun {one_line(str(before))}, this is {now}"


def of_folder(folder: RunFolder, data: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a run folder, under the keys of this version; `data` is the composed
    one that has what is missing. ConfigError where it cannot be used."""
    try:
        stored = resume.completed(_stored(folder.config), data)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    _add_credentials(stored.get("cluster"))
    return stored


def require_trust(
    key: str, path: Path, configs: Mapping[RunFolder, Mapping[str, Any]], *, is_trusted: bool
) -> None:
    """Ask for trust in the run folders that this account did not write, all at once; `path` is
    what `key` names. A yes signs each config.yaml as it is. ConfigError without one."""
    reasons = {folder: reason for folder in configs if (reason := folder.why_foreign())}
    if not reasons:
        return
    named = list(
        dict.fromkeys(line for folder in reasons for line in _runs_or_connects(configs[folder]))
    )
    _ask_for_trust(key, path, next(iter(reasons.values())), named, is_trusted=is_trusted)
    for folder in reasons:
        folder.write_config(folder.config.read_text(encoding="utf-8"))


def _ask_for_trust(
    key: str, path: Path, reason: str, named: Sequence[str], *, is_trusted: bool
) -> None:
    """ConfigError without a yes or the key: nothing that the folder names was imported, run or
    connected to."""
    if not is_trusted:
        more = [f"and {len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
        loads = "; ".join([*named[:_MOST_NAMED], *more]) or "only what comes with smolrun"
        what = f"{reason}; it names what the run loads and connects to ({loads})"
        message = problem(key, str(path), what)
        if not is_interactive():
            raise ConfigError(f"{message}; if you trust its author, add {_TRUST}=true")
        echo(message)
        try:
            answer = input("trust it? [y/N] ")
        except EOFError:  # Ctrl-D
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            raise ConfigError(f"{message}; it is not trusted")


def is_interactive() -> bool:
    """Whether a question can be answered."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _runs_or_connects(stored: Mapping[str, Any]) -> Iterator[str]:
    """What a configuration names that is run or connected to; JSON has no control characters."""
    sections = {key: value for key, value in stored.items() if isinstance(value, Mapping)}
    hosts = sections.get("cluster", {}).get("hosts")
    for number, host in enumerate(hosts if isinstance(hosts, list) else ()):
        if isinstance(host, Mapping):
            sections[f"cluster.hosts[{number}]"] = host
    for section, values in sections.items():
        for key, value in values.items():
            is_code = key == "target" and str(value) not in SHIPPED_TARGETS
            is_code = is_code or (section, key) == ("model", "loss")
            is_connection = section.startswith("cluster") and key in _OF_CLUSTER
            if value and (is_code or is_connection or (section, key) == ("tracker", "entity")):
                # The values of `env:` may be credentials.
                shown = list(value) if key == "env" and isinstance(value, Mapping) else value
                text = json.dumps(shown, default=str)
                cut = f"... ({len(text):,} characters)" if len(text) > _MOST_SHOWN else ""
                yield f"{section}.{key} = {text[:_MOST_SHOWN]}{cut}"


def _add_credentials(cluster: Any) -> None:
    """Puts back what `redacted` left out of `env:`, as the cluster file of that choice has it now.

    Only for a host that is reached as in that file: the stored configuration may come from others.
    ConfigError where the file has none.
    """
    hosts = cluster.get("hosts") if isinstance(cluster, Mapping) else None
    missing = [
        (index, host, name, value)
        for index, host in enumerate(hosts if isinstance(hosts, list) else ())
        if isinstance(host, Mapping) and isinstance(host.get("env"), dict)
        for name, value in host["env"].items()
        if isinstance(value, str) and HIDDEN in value
    ]
    if not missing:
        return
    known = _env_of_hosts(cluster.get("name"))
    problems = []
    for index, host, name, value in missing:
        found = known.get((host.get("name"), host.get("ssh")), {}).get(name)
        if isinstance(found, str) and without_credentials(found) == value:
            host["env"][name] = found
        else:
            what = "run folders keep no password, and the cluster file of this host has none"
            allowed = "add cluster=NAME, the cluster file with the password"
            key = f"cluster.hosts[{index}].env.{name}"
            problems.append(problem(key, value, what, allowed=allowed))
    if problems:
        raise ConfigError(problems)


def _env_of_hosts(choice: Any) -> dict[tuple[Any, Any], dict[str, Any]]:
    """`env:` of each host, by its name and its `ssh:`, in the cluster file of that choice."""
    try:
        cluster = compose.values(Arguments(overrides=[f"cluster={choice}"]))["cluster"]
    except (*mistakes.COMPLAINTS, ConfigError):  # there is no such file any more
        return {}
    return {
        (host.get("name"), host.get("ssh")): host.get("env") or {}
        for host in cluster.get("hosts") or []
        if isinstance(host, Mapping)
    }


def _stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not the folder of a run{what_exists(OUTPUTS)}")
    try:
        return msgspec.yaml.decode(read_yaml(path), type=dict[str, Any])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None

"""Hydra's part: from choices and values to one plain mapping, interpolations resolved, once.

Nothing is written and no logging is set up. Errors are Hydra's own here; `mistakes.py` puts them
into words.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra import initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict

from smolrun.cli import choices
from smolrun.cli.arguments import Arguments, for_hydra, is_completing, readable
from smolrun.config import RunConfig, validate
from smolrun.errors import ConfigError
from smolrun.files import LimitPassed, read_yaml

# Hydra's API changes at this version number's say-so; the configuration is written for this one.
VERSION_BASE = "1.3"
CONF = "smolrun.conf"
PLUGINS = ("hydra/launcher", "hydra/sweeper")  # groups of Hydra's own
TARGETS = ("model", "data", "algorithm")  # groups whose `target` may be the user's own


class OwnConf(SearchPathPlugin):
    """The user's ./conf in front of everything, and --config-dir behind it."""

    config_dir: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Hydra calls this each time it begins to compose."""
        own = choices.own_folder(Path.cwd())
        if own is not None:
            search_path.prepend("own", f"file://{own}")
        if self.config_dir is not None:
            search_path.append("config-dir", f"file://{self.config_dir}")


def folders(arguments: Arguments) -> list[Path]:
    """Where choices come from, the one that wins first."""
    own = choices.own_folder(Path.cwd())
    return [
        folder
        for folder in (own, choices.shipped_folder(), arguments.config_dir)
        if folder is not None
    ]


@contextmanager
def composing(arguments: Arguments) -> Iterator[None]:
    """Within it, `composed` and `jobs` work. ConfigError for a plugin of Hydra's that is broken."""
    try:
        plugins = Plugins.instance()  # imports all that are installed
    except Exception as error:
        raise ConfigError(f"a plugin of Hydra's cannot be imported: {error!r}") from error
    plugins.register(OwnConf)
    _check_limits(arguments)
    OwnConf.config_dir = arguments.config_dir
    with initialize_config_module(CONF, version_base=VERSION_BASE):
        yield


def _check_limits(arguments: Arguments) -> None:
    """ConfigError for a file of the user's folders whose aliases would fill the memory."""
    for folder in folders(arguments):
        if folder == choices.shipped_folder():
            continue
        # Not all of the folder: other programs may keep files of any size in a `conf`.
        for file in (*folder.glob("*.yaml"), *choices.files(folder)):
            try:
                read_yaml(file)
            except LimitPassed as error:
                raise ConfigError(f"{file}: {error}") from None
            except (OSError, ValueError):
                continue  # Hydra says what is wrong, if the file is chosen


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration for these choices and values, as if typed here.

    For tests, benches and tools.
    """
    arguments = Arguments(overrides=list(overrides))
    with composing(arguments):
        return validate(values(arguments))


def composed(arguments: Arguments) -> DictConfig:
    """The composition, Hydra's own part (key `hydra`) included."""
    overrides = for_hydra(arguments.overrides, choices.groups(folders(arguments)))
    return hydra.compose(arguments.config_name, overrides, return_hydra_config=True)


def plain(config: DictConfig) -> dict[str, Any]:
    """Plain values without Hydra's part.

    Interpolations are resolved and keys still to be given (`???`) left out.
    """
    HydraConfig.instance().set_config(config)  # so that ${hydra:...} can be resolved
    with open_dict(config):
        mine = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    data = OmegaConf.to_container(mine, resolve=True)
    return _given(data) if isinstance(data, dict) else {}


def values(arguments: Arguments) -> dict[str, Any]:
    """The plain values of a run.

    Where the command line names another target than the chosen file, the file's keys are not for
    it: only those of the command line go on to it.
    """
    config = composed(arguments)
    data = plain(config)
    keys = [override.partition("=")[0].lstrip("+") for override in arguments.overrides]
    choice = config.hydra.runtime.choices.get("cluster")
    if isinstance(data.get("cluster"), dict) and choice and "cluster.name" not in keys:
        data["cluster"]["name"] = str(choice)  # as it has to be typed, also for sim/pi3
    renamed = [group for group in TARGETS if f"{group}.target" in keys]
    if not renamed:
        return data
    is_target = [key in [f"{group}.target" for group in renamed] for key in keys]
    rest = [line for line, skip in zip(arguments.overrides, is_target, strict=True) if not skip]
    chosen = plain(composed(replace(arguments, overrides=rest)))
    for group in renamed:
        target = data[group].get("target")
        before = (chosen.get(group) or {}).get("target")
        if isinstance(target, str) and before not in (None, target):
            typed = {key.split(".")[1] for key in keys if key.startswith(f"{group}.")}
            kept = {key: value for key, value in data[group].items() if key in typed}
            data[group] = {"name": _short_name(target), **kept}
    return data


def model(arguments: Arguments, name: Any) -> dict[str, Any]:
    """The keys of a model of `conf/`, without what was typed; empty if there is no such choice."""
    if name not in choices.groups(folders(arguments))["model"]:
        return {}
    found = plain(composed(replace(arguments, overrides=[f"model={name}"])))["model"]
    return found if isinstance(found, dict) else {}


def _short_name(target: str) -> str:
    """`my_code.model:build` is called model, `my_code:Net` is called Net."""
    module, _, name = target.partition(":")
    return name if name not in ("", "build") else module.rpartition(".")[2] or target


def base(arguments: Arguments) -> DictConfig:
    """The composition of a sweep without the values that it sweeps over."""
    steady = [
        item.input_line
        for item in _parsed(arguments.overrides)
        if not item.is_sweep_override() and item.input_line is not None
    ]
    return composed(replace(arguments, overrides=steady))


def chosen_plugins(base: DictConfig) -> dict[str, str]:
    """`hydra/launcher` and `hydra/sweeper`, where they are not Hydra's basic ones."""
    chosen = base.hydra.runtime.choices
    return {key: str(chosen[key]) for key in PLUGINS if chosen.get(key) not in (None, "basic")}


def axes(arguments: Arguments, base: DictConfig, *, is_grid: bool) -> dict[str, list[str]]:
    """Key -> its overrides, one for each value.

    In a grid an interval is a ConfigError. A sweeper draws from it: its ends stand for it, as
    those of a range do.
    """
    params = [f"{key}={value}" for key, value in (base.hydra.sweeper.get("params") or {}).items()]
    found: dict[str, list[str]] = {}
    for item in _parsed([*params, *arguments.overrides]):
        key = item.get_key_element()
        if not item.is_sweep_override():
            found[key] = [str(item.input_line)]
        elif not is_grid and (ends := _ends(item)):
            found[key] = [f"{key}={value}" for value in ends]
        elif item.is_discrete_sweep():
            found[key] = [f"{key}={value}" for value in item.sweep_string_iterator()]
        else:
            raise ConfigError(
                f"{item.input_line}: has no list of values; write a,b,c or range(1,4) or glob(*);"
                " intervals need a sweeper, such as hydra/sweeper=optuna"
            )
    return found


def _ends(item: Override) -> list[Any]:
    """Where an interval or a range of numbers begins and ends; empty for other overrides."""
    value = item.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    return [value.start, value.stop] if isinstance(value, RangeSweep) else []


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return parser.parse_overrides([readable(override) for override in overrides])


def jobs(arguments: Arguments) -> list[list[str]]:
    """The overrides of every job of a grid.

    All combinations, the last one named changes fastest.
    """
    values = axes(arguments, base(arguments), is_grid=True)
    return [list(job) for job in product(*values.values())]


def show(argv: Sequence[str], arguments: Arguments) -> None:
    """Let Hydra print what was asked for (--cfg, --info, --hydra-help, completion).

    It ends by SystemExit or returns.
    """
    Plugins.instance().register(OwnConf)
    _check_limits(arguments)
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Completion's own words (install=bash) are no settings.
    words = argv if is_completing(argv) else for_hydra(argv, choices.groups(folders(arguments)))
    sys.argv = [sys.argv[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of being printed
    try:
        hydra.main(version_base=VERSION_BASE, config_path=f"pkg://{CONF}", config_name="config")(
            _nothing
        )()
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


def _nothing(config: DictConfig) -> None:
    """Hydra wants a function to run; showing runs none."""


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item != "???"}
    return [_given(item) for item in value] if isinstance(value, list) else value

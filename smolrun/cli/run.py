"""From the command line to a checked configuration to its task.

All problems are reported at once, then nothing starts.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig

from smolrun.cli import choices, compose, mistakes, sweep
from smolrun.cli.arguments import (
    Arguments,
    at_home,
    is_showing,
    quoted,
    read,
    refuse,
    without_aliases,
)
from smolrun.cli.resume import other_version, resumed, trained_further
from smolrun.config import RunConfig, validate
from smolrun.errors import ConfigError, DataError, SmolrunError
from smolrun.sanitize import echo, indented

BAD_CONFIG = 2
FAILED = 3
_QUICK_S = 2.0  # what takes longer shows its progress


def run(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if os.getcwd() not in sys.path:
        # The user's own code beside them; last, so that it hides no library.
        sys.path.append(os.getcwd())
    typed = argv
    try:
        argv = [at_home(word) for word in without_aliases(argv)]
        refuse(argv)
        if is_showing(argv):
            return _show(argv)
        arguments = read(argv)
        with compose.composing(arguments):
            if arguments.is_sweep and (found := with_plugins(arguments)) is not None:
                return int(import_module("smolrun.cli.multirun").drive(arguments, *found))
            if sweep.wanted_resume(arguments.overrides):
                return _go(*sweep.resumed_sweep(arguments))
            if arguments.is_sweep:
                jobs, configs = checked_jobs(arguments)
                if all(map(_trains, configs)):
                    started = sweep.new_sweep(arguments.overrides, jobs, configs)
                    return _go(started, configs[0].detach)
                return sweep.run_jobs(jobs, arguments.flags(), sweep.start_job)
            config = checked(arguments)
            sweep.refuse_alone(arguments.overrides)
    except ConfigError as error:
        return _report(error.problems)
    return drive(config.with_typed(typed))


def _go(started: sweep.Sweep, detach: bool) -> int:
    """Run a sweep here, or in the background."""
    if not detach:
        return sweep.run_sweep(started)
    for note in started.notes:
        echo(note)
    name = started.folder.path.name
    words = [
        f"sweep.resume={quoted(str(started.folder.path.absolute()))}",
        f"sweep.fail_fast={str(started.fail_fast).lower()}",
    ]
    return int(import_module("smolrun.driver.detach").drive_sweep(name, words))


def _trains(config: RunConfig) -> bool:
    return config.task == "train" and not config.training.dry_run


def drive(config: RunConfig) -> int:
    """Hand the configuration to its task. Its ConfigError and DataError come before it starts."""
    module = f"smolrun.tasks.{config.task}"
    if config.cluster.hosts and not config.training.dry_run:
        from smolrun.driver.preflight import template_note

        if note := template_note(config):
            echo(note, error=True)
    if _goes_away(config) and _has_dashboard(config):
        module = "smolrun.tasks.watch"
    elif _goes_away(config):
        module = f"smolrun.driver.{'detach' if config.driver is None else 'remote_driver'}"
    try:
        if any(host.nearby for host in config.cluster.hosts or []) and not config.training.dry_run:
            return _with_joined(config, module)
        return int(import_module(module).drive(config))
    except ConfigError as error:
        return _report(error.problems)
    except DataError as error:
        echo(indented(f"smolrun: nothing was started: {error}"), error=True)
        return BAD_CONFIG
    except SmolrunError as error:
        echo(indented(f"smolrun: {error}"), error=True)
        return FAILED


def _with_joined(config: RunConfig, module: str) -> int:
    """Run the task once the machines of the cluster that join have done so."""
    from smolrun.driver.nearby import TASKS, joined
    from smolrun.driver.preflight import check_before_start

    if config.task not in TASKS:
        raise ConfigError(f"task={config.task} is not for machines that join (cluster=nearby)")
    if config.task == "train":
        check_before_start(config)
    with joined(config, echo) as named:
        return int(import_module(module).drive(named.with_typed(config.typed)))


def _goes_away(config: RunConfig) -> bool:
    """Whether the driver shall be another process; a dry run is over before that."""
    is_run = config.task in ("train", "serve") and not config.training.dry_run
    is_run = is_run and not config.serving.service  # which is of this machine
    return is_run and (config.detach or config.driver is not None or _has_dashboard(config))


def _has_dashboard(config: RunConfig) -> bool:
    return config.console == "dashboard"


def checked(arguments: Arguments) -> RunConfig:
    """The configuration, or ConfigError with the problems of the command line and of the values
    together.
    """
    try:
        values, typed = compose.values(arguments), arguments.overrides
        values = trained_further(values, typed, lambda name: compose.model(arguments, name))
        values = resumed(values, typed)
        try:
            return validate(values)
        except ConfigError as error:
            raise ConfigError([*error.problems, *other_version(values)]) from None
    except mistakes.COMPLAINTS as error:
        raise ConfigError(_all_problems(error, arguments, checked)) from error


def checked_jobs(arguments: Arguments) -> tuple[list[list[str]], list[RunConfig]]:
    """The overrides of every job, and its checked configuration.

    ConfigError names the jobs that cannot run.
    """
    try:
        jobs = compose.jobs(arguments)
    except mistakes.COMPLAINTS as error:
        raise ConfigError(_all_problems(error, arguments, checked_jobs)) from error
    found: dict[str, list[str]] = {}
    configs = []
    for number, overrides in enumerate(_with_progress(jobs), start=1):
        try:
            configs.append(checked(replace(arguments, overrides=overrides)))
            if configs[-1].console == "dashboard":
                raise ConfigError(sweep.NO_DASHBOARD)
            if _goes_away(configs[-1]) and (configs[-1].driver or configs[-1].task != "train"):
                raise ConfigError("driver and task=serve: -m would start all jobs at the same time")
        except ConfigError as error:
            for line in error.problems:
                found.setdefault(line, []).append(str(number))
    if found:
        raise ConfigError(
            [f"{line} (job {', '.join(at)} of {len(jobs)})" for line, at in found.items()]
        )
    return jobs, configs


def _with_progress(jobs: Sequence[list[str]]) -> Iterator[list[str]]:
    """The jobs; where checking them takes long, their number is shown meanwhile."""
    from smolrun.tracking.console import Console

    console, began = Console(steps=1, world_size=1), time.monotonic()
    try:
        for done, job in enumerate(jobs):
            if time.monotonic() > began + _QUICK_S:
                console.preparing(f"checking {len(jobs):,} jobs", done, len(jobs))
            yield job
    finally:
        console.close()


def with_plugins(arguments: Arguments) -> tuple[DictConfig, RunConfig] | None:
    """The composition of a sweep that a launcher or sweeper of Hydra's runs, and the checked
    configuration of its first job; None for other sweeps.

    ConfigError names what is wrong with its jobs, or the plugin that is not installed.
    """
    try:
        base = compose.base(arguments)
    except mistakes.COMPLAINTS as error:
        if missing := mistakes.missing_plugin(error):
            raise ConfigError(missing) from error
        if not any(line.startswith(compose.PLUGINS) for line in arguments.overrides):
            return None  # what is wrong is found with the jobs
        raise ConfigError(_all_problems(error, arguments, with_plugins)) from error
    return (base, checked_probes(arguments, base)) if compose.chosen_plugins(base) else None


def checked_probes(arguments: Arguments, base: DictConfig) -> RunConfig:
    """The configuration of the first job. ConfigError with all that is wrong with it, with the
    other values, and with the sweeper."""
    multirun = import_module("smolrun.cli.multirun")
    found, configs = {}, []
    for overrides in multirun.probes(arguments, base):
        try:
            configs.append(checked(replace(arguments, overrides=overrides, is_sweep=False)))
        except ConfigError as error:
            found.update(dict.fromkeys(error.problems))
    found.update(dict.fromkeys(multirun.problems(arguments, base)))
    if found:
        raise ConfigError(list(found))
    return configs[0]


def _all_problems(
    error: Exception, arguments: Arguments, check: Callable[[Arguments], object]
) -> list[str]:
    """What Hydra stumbled over, and whatever `check` finds in the rest."""
    groups = choices.groups(compose.folders(arguments))
    problems, sound = mistakes.find(arguments.overrides, groups, is_sweep=arguments.is_sweep)
    if not problems:
        return [mistakes.explain(error), *_own_config()]
    try:
        check(replace(arguments, overrides=sound))
    except ConfigError as more:
        problems += more.problems
    return problems


def _own_config() -> list[str]:
    """A hint for those who stand in the folder of another project that uses Hydra too."""
    own = choices.own_folder(Path.cwd())
    if own is not None and (own / "config.yaml").is_file():
        return [
            f"{own / 'config.yaml'} is read instead of smolrun's own;"
            " if it belongs to another program, go to another folder"
        ]
    return []


def _show(argv: Sequence[str]) -> int:
    # Hydra prints through logging, which would tell of every line that `head` does not take.
    logging.raiseExceptions = False
    try:
        compose.show(argv, Arguments())
    except mistakes.COMPLAINTS as error:
        overrides = [word for word in argv if "=" in word and not word.startswith("-")]
        groups = choices.groups(compose.folders(Arguments()))
        problems, _ = mistakes.find(overrides, groups, is_sweep=False)
        raise ConfigError(problems or [mistakes.explain(error)]) from error
    except ValueError as error:  # flags that do not go together
        raise ConfigError(str(error)) from error
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _report(problems: Sequence[str]) -> int:
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [
        f"smolrun: {count} in the configuration, nothing was started:",
        *(f"  {indented(line)}" for line in problems),
        "`smolrun --help` shows the choices, `smolrun --cfg job` the whole configuration.",
    ]
    echo("\n".join(lines), error=True)
    return BAD_CONFIG

"""task=setup: makes the hosts of a cluster ready: your SSH key, Python, and what a run needs.

The steps of each host are printed before they run. Nothing needs root there; what changes is
~/.ssh/authorized_keys, the workdir, and the folders where uv and pip keep Pythons and downloads. A
second run finds that there is nothing to do.
"""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable, Sequence

from smolrun.config import RunConfig
from smolrun.driver.fleet import host_specs
from smolrun.errors import ConfigError, HostError, HostErrors, LoginFailed, SmolrunError
from smolrun.launch.delivery.versions import (
    ask_environment,
    env_python,
    environment_name,
    own_dependencies,
    required_names,
)
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.run_on_all import run_on_all
from smolrun.launch.setup.environment_maker import EnvironmentMaker, look
from smolrun.launch.setup.setup_plan import BlankHost, Plan, plan
from smolrun.launch.setup.user_key import install, make_key, public_key, read_key
from smolrun.launch.ssh.connect import open_machine
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from smolrun.sanitize import echo
from smolrun.tracking.run_folder import OUTPUTS

AskPassword = Callable[[str], str]


def drive(config: RunConfig) -> int:
    """Exit code 0 if every host is ready, 3 if one is not, 130 where you stopped it."""
    specs = host_specs(config)
    if not specs:
        raise ConfigError(
            f"no host of cluster={config.cluster.name} has an `ssh:`; this machine is ready"
        )
    try:
        return Setup(config, specs).run()
    except (EOFError, KeyboardInterrupt):
        echo("\nstopped; what is complete is kept, and the same command continues")
        return EXIT_STOPPED


class Setup:
    """The hosts of one cluster on their way to being ready."""

    def __init__(
        self,
        config: RunConfig,
        specs: Sequence[HostSpec],
        *,
        requirements: Sequence[str] | None = None,
        ask_password: AskPassword | None = None,
    ) -> None:
        """`requirements` are ours unless a test has smaller ones. `ask_password` None: no
        terminal to prompt in."""
        self._config = config
        self._specs = {spec.name: spec for spec in specs}
        self._requirements = list(own_dependencies() if requirements is None else requirements)
        if ask_password is None and sys.stdin.isatty():
            ask_password = lambda who: getpass.getpass(f"password of {who}: ")  # noqa: E731
        self._ask = ask_password
        self._machines: dict[str, Machine] = {}
        self._failed: dict[str, SmolrunError] = {}

    def run(self) -> int:
        """All of it; returns the exit code."""
        try:
            self._connect()
            plans = self._plan()
            self._print_plans(plans)
            self._make(plans)
        finally:
            for machine in self._machines.values():
                machine.close()
        for error in self._failed.values():
            echo(f"smolrun: {error}", error=True)
        if self._failed:
            return EXIT_FAILED
        echo(f"ready; next: smolrun task=doctor cluster={self._config.cluster.name}")
        return EXIT_DONE

    # -- keys ----

    def _connect(self) -> None:
        echo(f"connecting to {', '.join(self._specs)}...")
        self._each(list(self._specs), self._open, "open")
        locked = [
            name
            for name, error in self._failed.items()
            if isinstance(error, LoginFailed) and error.is_refused
        ]
        for name in locked:
            error = self._failed.pop(name)
            try:
                self._bring_key(name, error)
                self._open(name)
            except (HostError, OSError) as more:
                failure = more if isinstance(more, HostError) else HostError(name, str(more))
                self._failed[name] = failure

    def _open(self, name: str, ask: AskPassword | None = None) -> None:
        spec = self._specs[name]
        self._machines[name] = open_machine(spec, needs_python=False, ask_password=ask)

    def _bring_key(self, name: str, error: SmolrunError) -> None:
        """Ask for the password once, and have our key accepted from then on."""
        from smolrun.launch.ssh.settings import identities

        spec = self._specs[name]
        key, target = public_key(identities(spec)), spec.ssh
        if self._ask is None:
            file = key or "~/.ssh/id_ed25519.pub"
            hint = f"no terminal to prompt for a password; by hand: ssh-copy-id -i {file} {target}"
            raise HostError(name, getattr(error, "what", str(error)), hint)
        if key is None:
            answer = input("you have no SSH key; make ~/.ssh/id_ed25519 now? [y/N] ")
            if answer.strip().lower() not in ("y", "yes"):
                raise HostError(name, "there is no SSH key to install", "ssh-keygen -t ed25519")
            key = make_key()
        line = read_key(key)
        echo(f"{name}: your key {key} will be added to ~/.ssh/authorized_keys of {target}")
        # Asked here and not in the middle of the login, which has a deadline.
        password = self._ask(target)
        self._open(name, lambda _: password)
        machine = self._machines.pop(name)
        try:
            if install(machine, line):
                echo(f"{name}: the key is added")
        finally:
            machine.close()

    # -- environments ----

    def _plan(self) -> dict[str, tuple[BlankHost, Plan | None]]:
        found: dict[str, tuple[BlankHost, Plan | None]] = {}

        def plan_host(name: str) -> None:
            machine, spec = self._machines[name], self._specs[name]
            if spec.python is not None:
                self._check_given(machine, spec.python)
                return
            label = environment_name(self._requirements, spec.torch)
            python = env_python(machine.workdir, label, machine.os)
            environment = python.rpartition("/bin/")[0]
            blank = look(machine, environment)
            found[name] = (
                blank,
                plan(
                    name,
                    blank,
                    environment,
                    torch=spec.torch,
                    requirements=self._requirements,
                    workdir=machine.workdir,
                ),
            )

        self._each(list(self._machines), plan_host, "look")
        return {name: found[name] for name in self._specs if name in found}

    def _check_given(self, machine: Machine, python: str) -> None:
        """The user chose this Python: nothing is installed, what it lacks is reported."""
        names = required_names(self._requirements)
        found = ask_environment(machine, [python], names)
        if "error" in found:
            what = f"python: {found['error']}"
            raise HostError(machine.name, what, "correct it, or leave it out")
        missing = [name for name in names if found["packages"].get(name) is None]
        if missing:
            hint = f"there: {python} -m pip install {' '.join(missing)}"
            raise HostError(machine.name, f"python: {python} lacks {', '.join(missing)}", hint)
        echo(f"{machine.name}: {python} is yours and has all that is needed; nothing to do")

    def _print_plans(self, plans: dict[str, tuple[BlankHost, Plan | None]]) -> None:
        for name, (_, steps) in plans.items():
            if steps is None:
                echo(f"{name}: nothing to do")
                continue
            echo(f"{name}: this will be done:")
            for number, line in enumerate(steps.lines(), start=1):
                echo(f"  {number}. {line}")

    def _make(self, plans: dict[str, tuple[BlankHost, Plan | None]]) -> None:
        def make(name: str) -> None:
            found, steps = plans[name]
            if steps is not None:
                log = OUTPUTS / "setup" / f"{name}.log"
                EnvironmentMaker(self._machines[name], found, steps, log, echo).make()
                echo(f"{name}: ready")

        self._each([name for name in plans if name not in self._failed], make, "setup")

    def _each(self, names: Sequence[str], act: Callable[[str], None], what: str) -> None:
        """On all at once; who fails is left out of what comes next."""

        def guarded(name: str) -> None:
            try:
                act(name)
            except (HostError, HostErrors) as error:
                self._failed[name] = error

        run_on_all({name: name for name in names}, guarded, what)

"""Workers on a machine that is reached over SSH: the same entry point, started from afar.

The host has our code and its libraries already (delivery/); here it only gets the command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smolrun.launch.hosts import WorkerPlan, WorkerProcess
from smolrun.launch.local import worker_environment
from smolrun.launch.remote.machine import Machine


class RemoteHost:
    """A machine that is ready for workers: `argv` starts one, in the folder `cwd` there."""

    def __init__(
        self, machine: Machine, argv: Sequence[str], env: Mapping[str, str], cwd: str
    ) -> None:
        """`env` is what the code needs; the host's own variables come from the cluster file."""
        self._machine = machine
        self._argv = list(argv)
        self._env = dict(env)
        self._cwd = cwd

    def start(self, plan: WorkerPlan) -> WorkerProcess:
        """Start one worker there; HostError with a sentence if that is impossible."""
        env = worker_environment({**self._machine.spec.env, **self._env}, plan.start.threads)
        return self._machine.start_worker(self._argv, env, self._cwd)

"""Makes all hosts of a run ready at once: code, then versions, then data and models.

What is cheap and can refuse comes first, and nothing large travels before every host fits. Every
host that cannot do its part is named, not only the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smolrun.data.prepared import Prepared, Progress
from smolrun.errors import HostError, HostErrors, SmolrunError
from smolrun.launch.delivery.code import Deploy, HostCode, deliver_code
from smolrun.launch.delivery.code_archive import CodeArchive
from smolrun.launch.delivery.files import PreparedFiles
from smolrun.launch.delivery.run_folder import CheckpointFiles, clear_run, run_on_host
from smolrun.launch.delivery.store import TransferProgress, silent
from smolrun.launch.delivery.versions import ask_versions, check_versions, own_versions
from smolrun.launch.local import worker_command
from smolrun.launch.run_on_all import run_on_all

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import Machine


@dataclass(frozen=True)
class ProvisionedHost:
    """A host that is ready: how a worker is started there, and where it finds what it needs.

    `env` is only what the code needs; `run` is the run's folder there.
    """

    argv: list[str]
    env: dict[str, str]
    cwd: str
    run: str
    versions: dict[str, str | None]
    prepared: Prepared | None = None
    resume: str | None = None


@dataclass(frozen=True)
class ProvisionRequest:
    """What to bring: the same for every host."""

    run_id: str
    cluster: str
    deploy: Deploy
    archive: CodeArchive
    prepared: PreparedFiles | None = None
    checkpoint: CheckpointFiles | None = None
    targets: Sequence[str] = ()  # of the user's own code


@dataclass
class ProvisionedHosts:
    """All hosts by name; `warnings` and `notes` are sentences about their versions."""

    hosts: dict[str, ProvisionedHost]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def provision(
    machines: Mapping[str, Machine], order: ProvisionRequest, progress: Progress = silent
) -> ProvisionedHosts:
    """Have on all machines what the order says; blocks until they are ready.

    HostError, or HostErrors with all of them, if some cannot be; then nothing of the run stays
    there. `progress` is called from other threads, one at a time. Ctrl-C leaves nothing half done
    in its place, and nothing of the run.
    """
    try:
        return _provision(machines, order, progress)
    except BaseException:  # a Ctrl-C too
        clear_all(machines, order.run_id)
        raise


def _provision(
    machines: Mapping[str, Machine], order: ProvisionRequest, progress: Progress
) -> ProvisionedHosts:
    transfer = TransferProgress("sending code", progress)
    codes = run_on_all(machines, lambda machine: _code(machine, order, transfer), "code")
    driver = own_versions()
    checked = check_versions(
        driver, {name: found[2] for name, found in codes.items()}, cluster=order.cluster
    )
    if checked.errors:
        errors = [HostError(name, *what_todo) for name, what_todo in checked.errors.items()]
        raise errors[0] if len(errors) == 1 else HostErrors(errors)
    transfer = TransferProgress("sending data", progress)
    files = run_on_all(machines, lambda machine: _files(machine, order, transfer), "files")
    hosts = {}
    for name, (code, python, versions) in codes.items():
        prepared, resume = files[name]
        hosts[name] = ProvisionedHost(
            argv=[python, *worker_command()[1:]],
            env=_environment(machines[name], code),
            cwd=code.own,
            run=run_on_host(machines[name], order.run_id),
            versions=versions,
            prepared=prepared,
            resume=resume,
        )
    return ProvisionedHosts(hosts, checked.warnings, checked.notes)


def clear_all(
    machines: Mapping[str, Machine],
    run_id: str,
    open_again: Callable[[Machine], Machine] | None = None,
) -> list[str]:
    """Remove what the run has on the hosts; returns a sentence for each where that failed. Where
    the connection was lost, also while it is used for this, `open_again` makes another one."""

    def clear(machine: Machine) -> str | None:
        try:
            try:
                done = clear_run(machine, run_id)
            except HostError:
                if open_again is None or machine.connection.lost is None:
                    raise
                with contextlib.closing(open_again(machine)) as again:
                    done = clear_run(again, run_id)
        except SmolrunError as error:
            place = run_on_host(machine, run_id)
            return f"{place} could not be removed: {error}; it can be deleted"
        place = f"{run_on_host(machine, run_id)} on {machine.name}"
        return None if done else f"{place} could not be removed; it can be deleted"

    return [problem for problem in run_on_all(machines, clear, "clear").values() if problem]


def _code(
    machine: Machine, order: ProvisionRequest, transfer: TransferProgress
) -> tuple[HostCode, str, dict[str, str | None]]:
    run = run_on_host(machine, order.run_id)
    if machine.installed is not None:
        return _own_code(machine, order, run, transfer), machine.python, {**machine.installed}
    code = deliver_code(machine, order.archive, order.deploy, run=run, transfer=transfer)
    return code, *ask_versions(machine, order.deploy, code.lib, cluster=order.cluster)


def _own_code(
    machine: Machine, order: ProvisionRequest, run: str, transfer: TransferProgress
) -> HostCode:
    """The user's own files alone, once they are allowed there: smolrun is installed."""
    own = HostCode("", "")
    if order.archive.own:
        files = order.archive.own_only()
        delivered = deliver_code(machine, files, "wheel", run=run, transfer=transfer)
        own = HostCode("", delivered.own)
    machine.allow(own.own or None, order.targets)
    return own


def _files(
    machine: Machine, order: ProvisionRequest, transfer: TransferProgress
) -> tuple[Prepared | None, str | None]:
    run = run_on_host(machine, order.run_id)
    prepared = order.prepared.deliver(machine, transfer, run) if order.prepared else None
    resume = order.checkpoint.deliver(machine, transfer, run) if order.checkpoint else None
    return prepared, resume


def _environment(machine: Machine, code: HostCode) -> dict[str, str]:
    """Our code before whatever path the cluster file gives."""
    if not code.lib:
        return {}
    theirs = machine.spec.env.get("PYTHONPATH")
    between = ";" if machine.os == "windows" else ":"
    return {"PYTHONPATH": between.join([code.lib, *([theirs] if theirs else [])])}

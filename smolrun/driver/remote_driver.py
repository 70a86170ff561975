"""driver=HOST: a host of the cluster drives the run, so that this machine may leave.

    this machine                          HOST
      | -- our code, over SSH ------------> |
      | -- configuration over stdin ------> |  smolrun --start-driver: what detach=true does, there
      | <-- what it says, its run folder -- |
      outputs/<run_id>/remote.json          <workdir>/driver/<code>/outputs/<run_id>/

From then on attach, stop and status ask it with the same few words as a run of this machine. The
files are there; the small ones come here when the run has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec

from smolrun.checkpoints.run_names import latest_name, run_folder
from smolrun.config import RunConfig, ranks, redacted, validate
from smolrun.config.models import HuggingFaceConfig, TrainedConfig
from smolrun.driver.detach import FOLDER, OF_THIS_TERMINAL, how_to_go_on, with_words
from smolrun.driver.fleet import host_specs, own_targets, unknown_address
from smolrun.driver.outputs import become_latest
from smolrun.driver.prepare import with_pinned_model
from smolrun.errors import CheckpointError, ConfigError, HostError, ProtocolError, SmolrunError
from smolrun.files import read_yaml
from smolrun.launch.control import LineSplitter
from smolrun.launch.delivery.code_archive import code_archive
from smolrun.launch.delivery.provision import (
    ProvisionedHost,
    ProvisionRequest,
    clear_all,
    provision,
)
from smolrun.launch.remote.connection import error_tail
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.remote.shell import command, environment_input
from smolrun.launch.ssh.connect import open_machine
from smolrun.launch.supervisor_events import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_FAILED
from smolrun.log_records import LogRecord
from smolrun.log_records import decode as decode_record
from smolrun.sanitize import echo, without_credentials_in
from smolrun.tracking.jsonl import MAX_METRICS_BYTES
from smolrun.tracking.logs import LogQuery, LogRequest
from smolrun.tracking.run_folder import MAX_SUMMARY_BYTES, OUTPUTS, RUN_ID, RunFolder, sign
from smolrun.tracking.run_view import Request, View, decode

_ANSWER_S = 30.0
_MAX_LOG_BYTES = 1 << 30
_MAX_RANK_LOG_BYTES = 64 << 20
# Files and their limits; the last one says that all are here.
_AFTERWARDS = {
    "metrics.jsonl": MAX_METRICS_BYTES,
    "driver.log": _MAX_LOG_BYTES,
    "summary.json": MAX_SUMMARY_BYTES,
}


def drive(config: RunConfig) -> int:
    """Start the driver on its host; returns once it has its run folder, or has failed."""
    code, run = begin(config)
    if run is not None:
        echo("\n".join(how_to_go_on(run.run_id)))
    return code


def begin(config: RunConfig) -> tuple[int, RunFolder | None]:
    """As `drive`; also returns the run, null where it has failed before it began."""
    config = with_pinned_model(config)
    sign(b"")  # without a key the run could not be looked at from here
    spec = next(spec for spec in host_specs(config) if spec.name == config.driver)
    with contextlib.closing(open_machine(spec)) as machine:
        machines, code_of = {spec.name: machine}, f"driver-{secrets.token_hex(4)}"
        ready = _ready(config, machine, code_of)
        try:
            code, folder = _start(machine, ready, _as_seen_there(config, machine), _say)
        except BaseException:  # closing its input has ended what was started there
            clear_all(machines, code_of)
            raise
        if folder is None:
            clear_all(machines, code_of)
            if code == EXIT_BAD_CONFIG and (model := _model_here(config)):
                _say(
                    f"{model} is on this machine, and {spec.name} has only its own files: copy it "
                    "there, or leave driver= out"
                )
            if code == EXIT_FAILED and len(config.cluster.hosts or []) > 1:
                _say(
                    f"{spec.name} drives the run, so it has to reach the other hosts over SSH by "
                    f"itself: `ssh {spec.ssh}`, and from there `ssh` to each of them, must work"
                )
            return code, None
        return EXIT_DONE, _keep(config, spec, ready, folder, code_of)


def _model_here(config: RunConfig) -> str | None:
    """The model where it is a folder, or a run, of this machine."""
    model = config.model
    if isinstance(model, TrainedConfig):
        with contextlib.suppress(CheckpointError):
            return str(run_folder(model.run, OUTPUTS))
    is_folder = isinstance(model, HuggingFaceConfig) and Path(model.name).expanduser().is_dir()
    return model.name if is_folder else None


def _say(line: str) -> None:
    echo(line, error=True)


def _ready(config: RunConfig, machine: Machine, code_of: str) -> ProvisionedHost:
    """Our code and the libraries are there, and stay there until `code_of` is cleared; HostError if
    that cannot be."""
    order = ProvisionRequest(
        code_of,
        config.cluster.name,
        config.cluster.deploy,
        code_archive(Path.cwd(), own_targets(config)),
    )
    ready = provision({machine.name: machine}, order)
    for line in ready.warnings:
        _say(f"warning: {line}")
    return ready.hosts[machine.name]


def _as_seen_there(config: RunConfig, machine: Machine) -> dict[str, Any]:
    """The configuration for a driver on that host: it is "this machine", and has SSH settings of
    its own."""
    plain = with_words(config)
    cluster = plain["cluster"]
    cluster["ssh_config"] = None
    for host in cluster["hosts"]:
        if host["name"] == machine.name:
            host["address"] = host["address"] or machine.address
            if host["address"] is None:
                raise unknown_address(machine.name)
            # Its driver was started by that Python, with these variables.
            host.update(ssh=None, python=None, workdir=None, env={})
    return {**plain, **OF_THIS_TERMINAL}


def _start(
    machine: Machine, ready: ProvisionedHost, config: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[int, str | None]:
    """As `detach.start`, on the machine."""
    # One folder for each state of the code: its outputs, and the user's modules beside them. With
    # deploy=none the host has its own, and there is nothing beside the outputs.
    has_own = ready.cwd != machine.home
    name = PurePosixPath(ready.cwd).parent.name if has_own else "none"
    order = {
        "config": config,
        "own": ready.cwd if has_own else None,
        "folder": f"{machine.workdir}/driver/{name}",
    }
    argv = [ready.argv[0], "-P", "-m", "smolrun.cli", "--start-driver"]
    env = {**machine.spec.env, **ready.env}
    process = machine.connection.start(command(machine.shell, argv, env=env, cwd=ready.cwd))
    folder, rest = None, b""
    try:
        # Its input stays open: the end of it, before the run has begun, is our Ctrl-C.
        process.write(environment_input(machine.shell, env) + msgspec.json.encode(order) + b"\n")
        while data := process.read_out():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.decode("utf-8", "replace").rstrip("\r")
                if text.startswith(FOLDER):
                    folder = text.removeprefix(FOLDER)
                else:
                    say(f"{machine.name}: {text}")
        code = process.wait()
        if code is None and folder is None:
            raise HostError(machine.name, "the connection ended before the driver had begun")
        return code or (EXIT_DONE if folder else EXIT_FAILED), folder
    finally:
        process.close()


def _keep(
    config: RunConfig, spec: HostSpec, ready: ProvisionedHost, folder: str, code_of: str
) -> RunFolder:
    """A folder here under the run's name, which says where it really is."""
    name = (PureWindowsPath(folder) if "\\" in folder else PurePosixPath(folder)).name
    run = RunFolder(OUTPUTS / name)
    # A name as we give them, and not that of a run that is here already.
    if not RUN_ID.fullmatch(name) or run.path.exists():
        raise HostError(spec.name, f"reported an invalid run folder {folder!r}")
    run.path.mkdir(parents=True)
    run.write_config(msgspec.yaml.encode(redacted(config)).decode())
    run.write_remote(
        {
            "host": {**dataclasses.asdict(spec), "env": without_credentials_in(spec.env)},
            "folder": folder,
            "python": ready.argv[0],
            "env": ready.env,
            "code_of": code_of,
        }
    )
    return run


class _Remote(msgspec.Struct):
    """What remote.json holds."""

    host: HostSpec
    folder: str
    python: str
    env: dict[str, str]
    code_of: str


def remote_run(folder: RunFolder) -> RemoteRun:
    """A run that another machine drives, to be closed; HostError if its remote.json is unusable."""
    try:
        remote = folder.remote()
    except SmolrunError as error:
        raise HostError(folder.run_id, str(error)) from None
    if remote is None:
        raise HostError(
            folder.run_id,
            "its remote.json was not written by this account on this machine, so nothing in it is "
            "run or connected to",
            "log in to the machine that drives the run, and look at it there",
        )
    try:
        return RemoteRun(folder, msgspec.convert(remote, _Remote))
    except msgspec.ValidationError as error:
        raise HostError(folder.run_id, f"its remote.json is invalid: {error}") from None


class RemoteRun:
    """Asks about one run, over an SSH connection that is opened when it is needed, and again after
    a failure."""

    def __init__(self, folder: RunFolder, remote: _Remote) -> None:
        self._folder = folder
        self._remote = remote
        self._machine: Machine | None = None
        self.host = remote.host.name

    def ask(self, request: Request) -> View:
        """The state of the run; when it has ended, its small files are copied here.
        HostError if the host does not answer."""
        remote = self._remote
        try:
            if self._machine is None:
                self._machine = open_machine(remote.host)
            done = self._machine.run(
                [remote.python, "-P", "-m", "smolrun.tracking.run_view"],
                {**remote.host.env, **remote.env},
                msgspec.json.encode(msgspec.structs.replace(request, folder=remote.folder)),
                _ANSWER_S,
            )
            view = decode(done.out.decode("utf-8", "replace"))
            if view is None:
                reason = error_tail(done.err) if done.err.strip() else f"exit code {done.code}"
                what = f"it cannot report on {self._folder.run_id}: {reason}"
                raise HostError(remote.host.name, what)
            if view.has_begun:
                self._become_latest()
            if view.has_ended:
                self._bring_back(self._machine, view)
        except HostError:
            self.close()
            raise
        return view

    def logs(self, query: LogQuery) -> Iterator[LogRecord | None]:
        """As `read_logs` there. HostError if the host does not answer, or no longer."""
        remote = self._remote
        self._machine = machine = self._machine or open_machine(remote.host)
        env = {**remote.host.env, **remote.env}
        argv = [remote.python, "-P", "-m", "smolrun.tracking.logs"]
        process = machine.connection.start(command(machine.shell, argv, env=env))
        try:
            request = msgspec.json.encode(LogRequest(remote.folder, query)) + b"\n"
            process.write(environment_input(machine.shell, env) + request)
            splitter = LineSplitter()
            while data := process.read_out():
                for line in splitter.feed(data):
                    if not line or (record := decode_record(line)) is not None:
                        yield record if line else None
            if process.wait() != 0:
                what = (
                    f"the logs of {self._folder.run_id} end here: {error_tail(process.read_err())}"
                )
                raise HostError(remote.host.name, what)
        except ProtocolError as error:
            raise HostError(remote.host.name, str(error)) from None
        finally:
            process.close()

    def _become_latest(self) -> None:
        """It has begun to train. A newer run stays the latest."""
        if latest_name(OUTPUTS) < self._folder.run_id:
            become_latest(self._folder, _say)

    def _bring_back(self, machine: Machine, view: View) -> None:
        """So that the run can be looked at here, also when that machine is off; its code there is
        needed no longer. The summary of a server whose driver has died says that it serves."""
        if view.state == "died" or not view.summary or self._folder.summary():
            return
        clear_all({machine.name: machine}, self._remote.code_of)
        self._folder.logs.mkdir(exist_ok=True)
        for name, most_bytes in {**self._log_files(), **_AFTERWARDS}.items():
            with contextlib.suppress(OSError, HostError):  # of no worth against an answer
                machine.get(
                    f"{self._remote.folder}/{name}",
                    self._folder.path / name,
                    most_bytes=most_bytes,
                )

    def _log_files(self) -> dict[str, int]:
        """The names of the newest logs, by the configuration that was sent there."""
        with contextlib.suppress(OSError, ValueError, ConfigError):
            config = validate(msgspec.yaml.decode(read_yaml(self._folder.config)))
            paths = [self._folder.log(rank.rank, rank.host) for rank in ranks(config)]
            records = [path.with_suffix(".jsonl") for path in [*paths, self._folder.driver_records]]
            return {f"logs/{path.name}": _MAX_RANK_LOG_BYTES for path in [*paths, *records]}
        return {}

    def close(self) -> None:
        """End the connection."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None

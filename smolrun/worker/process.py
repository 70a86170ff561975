"""What a host runs for every rank, `smolrun --worker`: wires channel, mesh and task together.

The driver speaks first: until it does, nothing is known here, and nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from smolrun.errors import (
    GenerationEnded,
    HandshakeError,
    PeerLost,
    SmolrunError,
    StopRequested,
    WaitTimeout,
)
from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import (
    EXIT_DONE,
    EXIT_FAILED,
    OUT_OF_MEMORY,
    SILENCE_S,
    Address,
    ErrorReport,
    RegroupMessage,
    RosterMessage,
    StartMessage,
)
from smolrun.launch.machine_memory import describe_out_of_memory, is_out_of_memory
from smolrun.launch.wake import keep_awake
from smolrun.log_records import RecordFormatter, cut

if TYPE_CHECKING:
    from smolrun.mesh.connect import Endpoint, RosterEntry
    from smolrun.mesh.mesh import Mesh
    from smolrun.mesh.shaping import Shape
    from smolrun.mesh.tls import TransportSecurity
    from smolrun.wire.handshake import Identity

_START_S = 60.0  # the driver sends the start message before anything else
_REGROUP_S = 30.0  # to link up as a later generation: every rank of it listens already

_log = logging.getLogger(__name__)


def main() -> int:
    """Be one rank of a run, with the driver at stdin and stdout; ends this process."""
    channel = WorkerChannel.take_stdio()
    # Ctrl-C is the driver's: it makes all ranks stop at the same step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RecordFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.captureWarnings(True)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's own code; last, so that it hides no library
    code = run(channel)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Not sys.exit: a thread that a library left running would keep this process alive.
    os._exit(code)


def run(channel: WorkerChannel) -> int:
    """Run the task that the driver asks for and report how it ended; returns the exit code."""
    # The mesh is closed after the report: closing may take seconds, and the driver waits for it.
    with contextlib.ExitStack() as closing:
        try:
            start = channel.wait_start(_START_S)
            summary = _run_task(start, channel, closing)
        except StopRequested as stop:
            _log.info("%s", stop)
            channel.result("stopped")
        # Even SystemExit, out of the user's own code, must reach the driver.
        except BaseException as error:
            if isinstance(error, SmolrunError):
                _log.error("%s: %s", type(error).__name__, error)
            else:
                _log.exception("%s", type(error).__name__)
            channel.result("failed", error=_report(error))
            return EXIT_FAILED
        else:
            channel.result("stopped" if summary.get("was_stopped") else "done", summary=summary)
        return EXIT_DONE


def _report(error: BaseException) -> ErrorReport:
    if is_out_of_memory(error):
        return ErrorReport(OUT_OF_MEMORY, cut(describe_out_of_memory(error)))
    report = ErrorReport(type(error).__name__[:200], cut(str(error)))
    if isinstance(error, PeerLost | WaitTimeout):
        report = replace(report, peer=error.rank)
    if isinstance(error, PeerLost):
        return replace(report, reported_by=error.reported_by, broke_protocol=error.broke_protocol)
    return report


def _run_task(
    start: StartMessage, channel: WorkerChannel, closing: contextlib.ExitStack
) -> dict[str, Any]:
    """From the start message to the task's summary."""
    # The start deadline is the driver's; this one ends the wait for a driver that says no more.
    start_timeout_s = float(start.config["cluster"]["start_timeout_s"]) + 30.0
    _log.info("rank %d of %d is process %d", start.rank, start.world_size, os.getpid())
    if start.config["task"] != "serve":  # which may be idle for days, and sees to it itself
        closing.enter_context(keep_awake())
    import torch  # seconds, on a small machine

    torch.set_num_threads(start.threads)
    task = import_module(f"smolrun.tasks.{start.config['task']}")
    from smolrun.mesh.connect import Endpoint

    _check_links(start, channel)
    endpoint = Endpoint(start.addresses, start.ports, host=start.host)
    channel.ready([Address(*where) for where in endpoint.addresses], _versions())
    mesh = _build_mesh(start, endpoint, channel, start_timeout_s)
    closing.callback(_close, mesh)
    summary: dict[str, Any] = task.work(start, mesh, channel)
    return summary


def _versions() -> dict[str, str]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "smolrun": version("smolrun"),
    }


def _close(mesh: Mesh) -> None:
    try:
        mesh.close()
    except Exception:  # the task's result counts, and has been reported
        _log.exception("the mesh did not close cleanly")


def _build_mesh(
    start: StartMessage, endpoint: Endpoint | None, channel: WorkerChannel, start_timeout_s: float
) -> Mesh:
    """Wait for the roster, then link up with all peers; of the generation that is current then."""
    from smolrun.mesh.connect import Endpoint

    message = channel.wait_membership(start_timeout_s)
    while True:
        if message.generation < channel.generation:
            message = channel.wait_membership(start_timeout_s)  # there is a later one
            continue
        if isinstance(message, RegroupMessage) or endpoint is None:
            if endpoint is not None:
                endpoint.close()
            endpoint = Endpoint(start.addresses, start.ports, host=start.host)
            where = [Address(*one) for one in endpoint.addresses]
            channel.ready(where, _versions(), message.generation)
            message = channel.wait_membership(start_timeout_s)
            continue
        limit_s = start_timeout_s if message.generation == 0 else _REGROUP_S
        try:
            return _connect(start, endpoint, channel, message, limit_s)
        except (GenerationEnded, HandshakeError, WaitTimeout) as error:
            is_first = message.generation == 0 and not isinstance(error, GenerationEnded)
            if start.links != "group" or is_first:
                raise
            _log.warning("generation %d was not complete: %s", message.generation, error)
            if isinstance(error, WaitTimeout) and error.rank is not None:
                channel.lost(PeerLost(error.rank, message.generation, str(error)))
            message = channel.wait_membership(start_timeout_s)


def regroup(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> Mesh:
    """Leave a mesh that has lost a peer, or whose generation has ended, for the next generation;
    blocks until the driver has announced that and all links of it stand. The caller closes it.

    Raises StopRequested, and WaitTimeout if there is none."""
    if isinstance(mesh.failure, PeerLost):
        channel.lost(mesh.failure)
    mesh.close()
    start_timeout_s = float(start.config["cluster"]["start_timeout_s"]) + 30.0
    return _build_mesh(start, None, channel, start_timeout_s)


def _connect(
    start: StartMessage,
    endpoint: Endpoint,
    channel: WorkerChannel,
    roster: RosterMessage,
    timeout_s: float,
) -> Mesh:
    """The mesh of one generation. In a group it fails with GenerationEnded as soon as the driver
    announces a later one."""
    from smolrun.mesh.connect import connect
    from smolrun.wire.handshake import Identity

    entries = _entries(roster)
    _log.info("generation %d: links up with %d other ranks", roster.generation, len(entries) - 1)
    identity = Identity(
        rank=start.rank,
        world_size=start.world_size,
        run_id=start.run_id,
        config_hash=start.config_hash,
        generation=roster.generation,
        secret=bytes.fromhex(start.secret),
    )
    settings = start.config["mesh"]
    if settings["kind"] == "torch":
        from smolrun.mesh.torch_mesh import connect_torch

        return connect_torch(
            endpoint,
            identity,
            entries,
            timeout_s=float(settings["timeout_s"]),
            start_timeout_s=timeout_s,
        )
    shape = shape_of(start.config, start.rank)
    mesh = connect(
        endpoint,
        identity,
        entries,
        timeout_s=float(settings["timeout_s"]),
        silence_s=SILENCE_S[settings["liveness"]],
        heartbeat_s=settings["heartbeat_ms"] / 1000,
        start_timeout_s=timeout_s,
        security=_transport_security(start, identity),
        wrap=shape.wrap if shape else None,
        elastic=start.links == "star",
        is_outdated=lambda: channel.generation > roster.generation,
    )
    if start.links == "group":
        channel.on_regroup(lambda generation: mesh.post(lambda: _end(mesh, generation)))
    return mesh


def _entries(roster: RosterMessage) -> list[RosterEntry]:
    from smolrun.mesh.connect import RosterEntry

    return [
        RosterEntry(peer.rank, peer.host, [(one.address, one.port) for one in peer.addresses])
        for peer in roster.peers
    ]


def _end(mesh: Mesh, generation: int) -> None:
    if generation > mesh.generation:
        mesh.fail(GenerationEnded(f"generation {generation} was announced"))


def shape_of(config: Mapping[str, Any], rank: int) -> Shape | None:
    """The emulated bandwidth and latency of a rank's links; None: unchanged."""
    if not config["cluster"].get("hosts"):
        return None
    from smolrun.mesh.shaping import Shape
    from smolrun.parts.placement import ranked_hosts

    emulate = ranked_hosts(config["cluster"])[rank]["emulate"]
    if not emulate or (emulate["bandwidth_mbps"] is None and not emulate["latency_ms"]):
        return None
    return Shape(emulate["bandwidth_mbps"], emulate["latency_ms"])


def _check_links(start: StartMessage, channel: WorkerChannel) -> None:
    """SmolrunError where links would leave this machine unencrypted and the configuration does not
    say so. Checked here too, so it does not depend on the driver."""
    from smolrun.mesh.addresses import is_loopback

    who = f"rank {start.rank} on {start.host}"
    others = [where for where in start.addresses if not is_loopback(where)]
    if start.security == "tls" and start.credentials is None:
        raise SmolrunError(f"{who}: it was given no key for TLS")
    if start.security == "loopback_plain" and others:
        raise SmolrunError(
            f"{who}: mesh.security = loopback_plain, but {', '.join(others)} is no loopback "
            "address; set mesh.security=tls"
        )
    if start.config["mesh"]["kind"] == "torch" and start.rank == 0:
        channel.log(
            "warning",
            "mesh = torch: torch.distributed neither encrypts nor authenticates what ranks send; "
            "whoever can connect to its ports can take part",
        )
    elif start.security == "insecure" and start.rank == 0:
        channel.log(
            "warning",
            "mesh.security = insecure: whoever is in the network can read and change what ranks "
            "send each other",
        )


def _transport_security(start: StartMessage, identity: Identity) -> TransportSecurity | None:
    """What encrypts the links; None if nothing does."""
    if start.security != "tls" or start.credentials is None:
        return None
    from smolrun.mesh.tls import MutualTls

    return MutualTls(start.credentials, identity)

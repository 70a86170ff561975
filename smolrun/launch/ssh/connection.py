"""An SSH connection that is logged in: commands, their pipes, files, and a keepalive.

A path that ends without a FIN or RST (a pulled plug, a machine asleep) is found by the keepalive: a
server that has not sent a byte for a while is sent a request, and the connection is closed if that
stays unanswered. When it is lost, all outputs of commands end and `wait` returns None.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from paramiko import Channel, ChannelException, SSHException, Transport

from smolrun.errors import HostError
from smolrun.launch.remote.connection import CommandTimeout, Completed, OnBytes, deadline
from smolrun.launch.ssh.files import SshFiles
from smolrun.launch.ssh.hop import SshHop, TimedSocket
from smolrun.sanitize import without_credentials

# The worker's lease is as long: both sides give up at about the same time.
SILENCE_LIMIT_S = 15.0
_ASK_AFTER_S = 1.0
_UNANSWERED_S = 1.5  # not lost yet, but the end of a run should not wait for it
_TICK_S = 0.5
_OPEN_S = 20.0  # a new session on a machine that is alive but busy
_MOST_OUTPUT_BYTES = 64 * 1024 * 1024


class SshConnection:
    """Connection by Fabric. Several threads may use it at once."""

    def __init__(self, name: str, hops: list[SshHop]) -> None:
        self.name = name
        self.settings = hops[-1].settings
        self._hops = hops
        self._transport: Transport = hops[-1].fabric.transport
        self._files = SshFiles(name, self._transport)
        self._silence_limit_s = SILENCE_LIMIT_S
        self._closed = threading.Event()
        self._silence_s = self._unanswered_s = 0.0
        self._given_up = False
        assert hops[-1].wire is not None, "an open connection has a wire"
        self._thread("alive", self._watch, hops[-1].wire).start()

    @property
    def address(self) -> str | None:
        """The IP address; None behind a jump host or a proxy command."""
        return self._hops[0].address if len(self._hops) == 1 else None

    @property
    def lost(self) -> str | None:
        """Why the connection was lost; None while it is open and after `close`."""
        if self._closed.is_set() or not _has_ended(self._transport):
            return None
        if self._given_up:
            return f"the SSH connection was lost (no answer for {self._silence_s:.0f} s)"
        return "the SSH connection was lost (the other side ended it)"

    @property
    def is_silent(self) -> bool:
        """Whether a keepalive has been unanswered for seconds; stays true once given up."""
        return self._given_up or self._unanswered_s >= _UNANSWERED_S

    def give_up(self) -> None:
        """Close it as lost, now."""
        self._given_up = True
        self._hang_up()

    def run(self, command: str, *, data: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """Run a line of the machine's own shell to its end, with `data` as its stdin."""
        process = self.start(command)
        out, err = _Gathered(process.read_out), _Gathered(process.read_err)
        others = [
            self._thread("err", err.read, process),
            self._thread("feed", _feed, process, data),
        ]
        with contextlib.closing(process), deadline(self.name, process, timeout_s) as late:
            for thread in others:
                thread.start()
            out.read(process)
            code = process.wait()
            for thread in others:
                thread.join(_OPEN_S)
        if late.is_set():
            raise CommandTimeout(self.name, f"{_shown(command)} did not end within {timeout_s:g} s")
        if out.is_too_much or err.is_too_much:
            raise HostError(self.name, f"{_shown(command)} wrote more than 64 MiB")
        if code is None:
            raise HostError(self.name, self.lost or "the SSH connection was closed")
        return Completed(code, bytes(out.data), bytes(err.data))

    def start(self, command: str) -> SshProcess:
        """Start a line of the machine's own shell, without a terminal."""
        try:
            channel = self._transport.open_session(timeout=_OPEN_S)
            channel.exec_command(command)
        except ChannelException as error:
            raise HostError(
                self.name,
                f"its SSH server allows no further session ({error.text.lower()})",
                "raise MaxSessions in its sshd_config, or start fewer ranks there",
            ) from None
        except (SSHException, OSError, EOFError) as error:
            why = self.lost or f"its SSH server starts no command ({error})"
            raise HostError(self.name, why) from None
        return SshProcess(channel, self._transport)

    def put(self, source: Path | bytes, path: str, on_bytes: OnBytes | None = None) -> None:
        """Copy a file there, whole or not at all; its folder must exist."""
        self._files.put(source, path, on_bytes)

    def get(
        self, path: str, target: Path, on_bytes: OnBytes | None = None, *, most_bytes: int
    ) -> None:
        """Copy a file from there, whole or not at all; the folder of `target` must exist."""
        self._files.get(path, target, on_bytes, most_bytes)

    def close(self) -> None:
        """End the connection and all that was started through it."""
        self._closed.set()
        self._hang_up()

    def _hang_up(self) -> None:
        self._files.close()
        for hop in reversed(self._hops):
            for thing in (hop.fabric.client, hop.agent):
                with contextlib.suppress(Exception):
                    thing.close()

    def _thread(self, what: str, target: Callable[..., object], *args: object) -> threading.Thread:
        return threading.Thread(
            target=target, args=args, name=f"smolrun-ssh-{self.name}-{what}", daemon=True
        )

    def _watch(self, wire: TimedSocket) -> None:
        """Send a keepalive after a silence; close after a longer one.

        The silence is summed in ticks of this thread: a driver that was suspended itself must not
        count that time as the server's silence.
        """
        before, last_received = time.monotonic(), wire.last_received
        asking: threading.Thread | None = None
        while not self._closed.wait(_TICK_S) and self._transport.is_active():
            now = time.monotonic()
            passed_s = min(now - before, 2 * _TICK_S)
            silence_s, before = self._silence_s + passed_s, now
            is_open = asking is not None and asking.is_alive()
            self._unanswered_s = self._unanswered_s + passed_s if is_open else 0.0
            if wire.last_received != last_received:
                silence_s, last_received = 0.0, wire.last_received
            self._silence_s = silence_s
            if silence_s >= self._silence_limit_s:
                self.give_up()
            elif silence_s >= _ASK_AFTER_S and not is_open:
                asking = self._thread("ask", self._ask)
                asking.start()

    def _ask(self) -> None:
        # paramiko's own keepalive wants no reply. No server knows this request, and each must reply
        # with a failure: RFC 4254, section 4.
        with contextlib.suppress(SSHException, OSError, EOFError):
            self._transport.global_request("keepalive@openssh.com", wait=True)


class _Gathered:
    """One output of a command, up to a limit; what comes after it is read and thrown away."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self.data = bytearray()
        self.is_too_much = False

    def read(self, process: SshProcess) -> None:
        while data := self._read():
            if len(self.data) + len(data) > _MOST_OUTPUT_BYTES:
                self.is_too_much = True
                process.close()
                return
            self.data += data


def _has_ended(transport: Transport) -> bool:
    """Whether no more bytes will come.

    A transport that fails ends its channels before it says that it is no longer active; why it
    failed is there before both.
    """
    return not transport.is_active() or transport.saved_exception is not None


def _feed(process: SshProcess, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it ended without reading all of it
        process.write(data)
    process.close_input()


def _shown(command: str) -> str:
    command = without_credentials(command)  # on Windows the values of variables are in it
    return f"`{command if len(command) <= 100 else command[:100] + '...'}`"


_READ_BYTES = 64 * 1024
_SIGKILL = 9


class SshProcess:
    """RemoteProcess over a channel."""

    def __init__(self, channel: Channel, transport: Transport) -> None:
        self._channel = channel
        self._transport = transport
        self._given_up = False

    def read_out(self) -> bytes:
        """Some bytes of its stdout; empty at the end."""
        try:
            return bytes(self._channel.recv(_READ_BYTES))
        except OSError:
            return b""

    def read_err(self) -> bytes:
        """Some bytes of its stderr; empty at the end."""
        try:
            return bytes(self._channel.recv_stderr(_READ_BYTES))
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        """All of `data` into its stdin; blocks while it does not read. OSError when it is gone."""
        try:
            self._channel.sendall(data)
        except (SSHException, EOFError) as error:
            raise BrokenPipeError(f"the SSH connection is gone: {error}") from None

    def close_input(self) -> None:
        """End its stdin."""
        with contextlib.suppress(OSError, SSHException, EOFError):
            self._channel.shutdown_write()

    def wait(self) -> int | None:
        """Its exit code once it has ended; None if the connection, or `close`, ended first."""
        code = int(self._channel.recv_exit_status())
        if code >= 0:
            return code
        if self._given_up or _has_ended(self._transport):
            return None
        # It was ended by a signal; SSH reports which, but paramiko drops it.
        return -_SIGKILL

    def close(self) -> None:
        """Give the pipes up, whatever state it is in."""
        self._given_up = True
        with contextlib.suppress(OSError, SSHException, EOFError):
            self._channel.close()

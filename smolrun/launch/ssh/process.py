"""A command that runs on another machine: its three pipes over one SSH channel, without a terminal.

When the connection is lost, both outputs end and `wait` says None.
"""

from __future__ import annotations

import contextlib

from paramiko import Channel, SSHException, Transport

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
        if self._given_up or not self._transport.is_active():
            return None
        # It was ended by a signal; SSH tells which, but paramiko does not hand that on.
        return -_SIGKILL

    def close(self) -> None:
        """Give the pipes up, whatever state it is in."""
        self._given_up = True
        with contextlib.suppress(OSError, SSHException, EOFError):
            self._channel.close()

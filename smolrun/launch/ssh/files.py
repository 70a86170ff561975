"""Files to another machine and back, by SFTP: whole or not at all, in pieces, with progress.

A file is written under a name of its own and renamed when its size is right, so that no
reader finds half of it.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from paramiko import SFTPClient, SSHException, Transport

from smolrun.errors import HostError, SmolrunError
from smolrun.files import atomic_writer
from smolrun.launch.remote.connection import OnBytes

# A machine that is gone is noticed long before; this is for an SFTP server that hangs alone, and
# for 2 MiB that are still on their way over a very slow link.
_ANSWER_S = 120.0
# Asked for at once, so that the way there and back is not waited for with every block. SFTP servers
# answer with 32 KiB at most.
_BLOCK_BYTES = 32 * 1024
_ROUND_BYTES = 128 * _BLOCK_BYTES


class SshFiles:
    """The SFTP side of one connection; one transfer at a time, others wait for their turn."""

    def __init__(self, name: str, transport: Transport) -> None:
        self._name = name
        self._transport = transport
        self._lock = threading.Lock()
        self._client: SFTPClient | None = None

    def put(self, source: Path | bytes, path: str, on_bytes: OnBytes | None) -> None:
        """Copy a file there."""
        part = f"{path}.{secrets.token_hex(4)}.part"
        with self._session(f"write {path}") as client, _opened(source) as (file, size):
            try:
                client.putfo(file, part, size, _steps(on_bytes), confirm=True)
                _rename(client, part, path)
            except BaseException:
                with contextlib.suppress(Exception):
                    client.remove(part)
                raise

    def get(self, path: str, target: Path, on_bytes: OnBytes | None, most_bytes: int) -> None:
        """Copy a file of at most `most_bytes` from there."""
        with atomic_writer(target) as file, self._session(f"read {path}") as client:
            size = client.stat(path).st_size or 0
            if size > most_bytes:
                what = f"{path} has {size:,} bytes, at most {most_bytes:,} were expected"
                raise HostError(self._name, what)
            if not _read(client, path, size, file, on_bytes):
                raise HostError(self._name, f"{path} changed while it was read")

    def close(self) -> None:
        """End the session. Never raises."""
        client = self._client
        if client is not None:
            with contextlib.suppress(Exception):
                client.close()

    @contextlib.contextmanager
    def _session(self, what: str) -> Iterator[SFTPClient]:
        """The SFTP session, opened if need be; what goes wrong in it becomes a HostError."""
        with self._lock:
            try:
                if self._client is None or self._client.get_channel().closed:
                    self._client = self._open()
                yield self._client
            except (OSError, SSHException, EOFError) as error:
                # After an error answers may still be under way: the next transfer starts afresh.
                self.close()
                raise self._explained(what, error) from None

    def _open(self) -> SFTPClient:
        try:
            channel = self._transport.open_session()
            channel.settimeout(_ANSWER_S)
            channel.invoke_subsystem("sftp")
            return SFTPClient(channel)
        except (SSHException, EOFError) as error:
            if not self._transport.is_active():
                raise
            raise HostError(
                self._name,
                f"its SSH server offers no SFTP ({error})",
                "its sshd_config needs: Subsystem sftp internal-sftp",
            ) from None

    def _explained(self, what: str, error: Exception) -> HostError:
        if not self._transport.is_active():
            return HostError(self._name, f"the SSH connection was lost; could not {what}")
        if isinstance(error, TimeoutError):
            why = f"no answer for {_ANSWER_S:g} s"
        elif isinstance(error, OSError) and error.errno is None:
            # SFTP has one word for all that it has no word for.
            why = f"its SFTP server says {str(error) or 'failure'!r}, which often is a full disk"
        else:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return HostError(self._name, f"could not {what}: {why}")


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[tuple[BinaryIO, int]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source), len(source)
    else:
        with source.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size


def _read(
    client: SFTPClient, path: str, size: int, file: BinaryIO, on_bytes: OnBytes | None
) -> bool:
    """Copy a file of `size` bytes from there; False if it got shorter meanwhile, or if the server
    answers with more than it was asked for.

    In rounds, as the library's own `get` keeps all that has come in memory.
    """
    with client.open(path, "rb") as source:
        for first in range(0, size, _ROUND_BYTES):
            places = range(first, min(first + _ROUND_BYTES, size), _BLOCK_BYTES)
            for data in source.readv([(at, min(_BLOCK_BYTES, size - at)) for at in places]):
                if file.tell() + len(data) > size:
                    return False
                _write(file, data)
                if on_bytes is not None and data:
                    on_bytes(len(data))
        return bool(file.tell() == size)


def _write(file: BinaryIO, data: bytes) -> None:
    """Into a file of this machine, whose disk is not the host's fault."""
    try:
        file.write(data)
    except OSError as error:
        raise SmolrunError(f"cannot write {file.name} here: {error.strerror or error}") from None


def _steps(on_bytes: OnBytes | None) -> Callable[[int, int], None] | None:
    if on_bytes is None:
        return None
    before = 0

    def report(done: int, _total: int) -> None:
        nonlocal before
        on_bytes(done - before)
        before = done

    return report


def _rename(client: Any, part: str, path: str) -> None:
    try:
        client.posix_rename(part, path)
    except OSError:  # a server without that extension cannot put one file in another's place
        with contextlib.suppress(OSError):
            client.remove(path)
        client.rename(part, path)

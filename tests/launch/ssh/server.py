"""A real SSH server of our own on loopback, with its own keys, and client files that know it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import waiting
from tests.ports import free_ports

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass
class Server:
    """One running server. `config` is the client file to reach it as "box"."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def config(self) -> Path:
        return self.folder / "ssh_config"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def host_key(self) -> Path:
        return self.folder / "host_key"

    @property
    def user_key(self) -> Path:
        return self.folder / "user_key"

    @property
    def entry(self) -> str:
        return f"[127.0.0.1]:{self.port}"

    def know(self, public: Path | None = None) -> None:
        """Let known_hosts have the server's key, and nothing else."""
        kind, data = (public or self.folder / "host_key.pub").read_text().split()[:2]
        self.known_hosts.write_text(f"{self.entry} {kind} {data}\n")

    def authorize(self, *keys: Path) -> None:
        """Who may log in."""
        lines = [Path(f"{key}.pub").read_text() for key in keys]
        (self.folder / "authorized_keys").write_text("".join(lines))

    def configure(self, *more: str, host: str = "box", first: str = "") -> None:
        """Write the client file."""
        lines = [
            first,
            f"Host {host}",
            "  HostName 127.0.0.1",
            f"  Port {self.port}",
            f"  User {getpass.getuser()}",
            *(f"  {line}" for line in more),
            "Host *",
            f"  IdentityFile {self.user_key}",
            "  IdentitiesOnly yes",
            f"  UserKnownHostsFile {self.known_hosts}",
            "  GlobalKnownHostsFile none",
        ]
        self.config.write_text("\n".join(lines) + "\n")


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair; the private half's path."""
    size = ["-b", "2048"] if kind == "rsa" else []
    command = ["ssh-keygen", "-q", "-t", kind, *size, "-N", passphrase, "-C", path.name, "-f", path]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


@contextlib.contextmanager
def ssh_server(folder: Path, *options: str) -> Iterator[Server]:
    """Start one, with the client files written; it is gone at the end."""
    if SSHD is None:
        pytest.skip("no sshd on this machine: install openssh-server")
    if os.name == "posix" and os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it when it is root
    host_key, user_key = make_key(folder / "host_key"), make_key(folder / "user_key")
    shutil.copy(f"{user_key}.pub", folder / "authorized_keys")
    (port,) = free_ports(1)
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "PidFile": folder / "pid",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "yes",
        "Subsystem": "sftp internal-sftp",
    }
    lines = [f"HostKey {host_key}", *options]
    lines += [f"{k} {v}" for k, v in settings.items() if not any(o.startswith(k) for o in options)]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    log = (folder / "sshd.log").open("wb")
    process = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    server = Server(folder, port, process)
    server.know()
    server.configure()
    try:
        waiting.until(lambda: process.poll() is not None or _answers(port))
        if process.poll() is not None:
            pytest.skip(f"sshd does not start: {(folder / 'sshd.log').read_text()}")
        yield server
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False

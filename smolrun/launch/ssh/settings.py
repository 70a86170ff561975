"""What the user's OpenSSH client files say about a host.

Fabric reads these files too, but neither follows `Include` nor reads known_hosts; this does, and
passes the rest to Fabric. Opens no connection.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from fabric import Config, Connection
from paramiko.config import SSHConfig, SSHConfigDict

from smolrun.errors import HostError
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh.host_keys import entry_name

_USER_FILE, _SYSTEM_FILE = "~/.ssh/config", "/etc/ssh/ssh_config"
_USER_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
_GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
_USUAL_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
_DEEPEST_INCLUDE = 16  # as in OpenSSH
_WORD = re.compile(r"\s*(?P<key>\w+)(?:\s*=\s*|\s+)(?P<value>.*\S)")
# user@host:port; an IPv6 address may stand alone, and stands in brackets if a port follows.
_TARGET = re.compile(
    r"(?:(?P<user>[^@\s]+)@)?"
    r"(?:\[(?P<v6>[^\]@\s]+)\]|(?P<host>[^:@\s\[\]]+|[^@\s\[\]]*:[^@\s\[\]]*:[^@\s\[\]]*))"
    r"(?::(?P<port>\d{1,5}))?"
)


@dataclass(frozen=True)
class SshTarget:
    """What stands behind `ssh:` in a cluster file."""

    host: str
    user: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class SshSettings:
    """The settings of one SSH server, beyond those that Fabric reads."""

    host: str
    port: int
    user: str
    entry: str  # its name in known_hosts
    user_files: tuple[Path, ...] = ()
    global_files: tuple[Path, ...] = ()
    identities: tuple[Path, ...] = ()
    identities_only: bool = False
    has_agent: bool = True
    has_own_agent: bool = False  # an IdentityAgent, which we cannot use

    @property
    def known_hosts(self) -> list[Path]:
        """Every known_hosts file that counts for this host."""
        return [*self.user_files, *self.global_files]

    @property
    def place(self) -> str:
        """Where it is, for a sentence: mini2.local port 22."""
        return f"{self.host} port {self.port}"


def parse_target(name: str, text: str) -> SshTarget:
    """user@host:port in its parts; HostError if no machine can be meant by it."""
    match = _TARGET.fullmatch(text)
    if match is None:
        parsed = SshTarget("")
    else:
        port = int(match["port"]) if match["port"] else None
        parsed = SshTarget(match["v6"] or match["host"], match["user"], port)
    port_is_wrong = parsed.port is not None and not 0 < parsed.port < 65536
    # A name that begins with a dash would be an option to a ProxyCommand, or to ssh itself.
    if not parsed.host or port_is_wrong or "-" in (parsed.host[0], (parsed.user or "x")[0]):
        raise HostError(name, f"{text!r} is not an SSH address", "write user@address, or an alias")
    return parsed


def load(name: str, path: str | None) -> Config:
    """The client file (null: the user's and the system's) as Fabric's configuration."""
    lines: list[str] = []
    try:
        if path is not None:
            lines = _lines(Path(os.path.expanduser(path)))
        else:
            for usual in (_USER_FILE, _SYSTEM_FILE):
                if (file := Path(os.path.expanduser(usual))).is_file():
                    lines += ["Host *", *_lines(file)]
        parsed = SSHConfig.from_text("\n".join(lines))
    except OSError as error:
        raise HostError(name, f"cannot read the ssh_config {error.filename}: {error.strerror}",
                        "set cluster.ssh_config to a file that can be read") from None  # fmt: skip
    except Exception as error:
        raise HostError(name, f"the ssh_config is not valid: {error}") from None
    # lazy: no ~/.fabric.py and no FABRIC_ variables have a say in what smolrun does.
    return Config(ssh_config=parsed, lazy=True)


def _lines(file: Path, depth: int = 0) -> list[str]:
    """The lines of a client file, with the lines of the files that it includes."""
    lines: list[str] = []
    block = "Host *"
    for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        match = _WORD.fullmatch(line)
        key = match["key"].lower() if match else ""
        if match and key in ("host", "match"):
            block = line
        if match and key == "include":
            if depth < _DEEPEST_INCLUDE:
                for included in _included(match["value"], file):
                    lines += _lines(included, depth + 1)
            lines.append(block)  # what follows belongs to the block that the Include stands in
        elif match and key == "proxycommand" and match["value"].lower() == "none":
            # Without the quotes paramiko would forget that it was said, see `proxy`.
            lines.append('ProxyCommand "none"')
        else:
            lines.append(line)
    return lines


def _included(value: str, file: Path) -> list[Path]:
    # A relative path is below ~/.ssh, in the system's file below its own folder.
    base = file.parent if file == Path(_SYSTEM_FILE) else Path(os.path.expanduser("~/.ssh"))
    patterns = [os.path.join(base, os.path.expanduser(word)) for word in shlex.split(value)]
    return [Path(found) for pattern in patterns for found in sorted(glob.glob(pattern))]


def proxy(said: SSHConfigDict) -> tuple[str, str] | None:
    """("proxyjump" or "proxycommand", its value), or None for neither.

    ssh_config(5): "this option will compete with the ProxyCommand option - whichever is specified
    first will prevent later instances of the other from taking effect". `said` has the order.
    What the page does not say, and ssh does: `ProxyJump none` prevents no later ProxyCommand.
    """
    for key in said:
        if key in ("proxyjump", "proxycommand") and said[key].lower() != "none":
            return key, said[key]
        if key == "proxycommand":
            return None
    return None


def identities(spec: HostSpec) -> tuple[Path, ...]:
    """The private keys that the client files name for a host, or else the usual ones."""
    config, place = load(spec.name, spec.ssh_config), parse_target(spec.name, spec.ssh)
    return _identities(config.base_ssh_config.lookup(place.host).get("identityfile"))


def settings_of(connection: Connection) -> SshSettings:
    """What the client files say about the server of a Fabric connection."""
    said: SSHConfigDict = connection.ssh_config
    host, port = str(connection.host), int(connection.port)
    agent = said.get("identityagent", "SSH_AUTH_SOCK")
    return SshSettings(
        host,
        port,
        str(connection.user),
        entry=said.get("hostkeyalias", "").lower() or entry_name(host, port),
        user_files=_files(said.get("userknownhostsfile", _USER_KNOWN_HOSTS)),
        global_files=_files(said.get("globalknownhostsfile", _GLOBAL_KNOWN_HOSTS)),
        identities=_identities(said.get("identityfile")),
        identities_only=said.get("identitiesonly", "no").lower() == "yes",
        has_agent=agent.lower() != "none",
        has_own_agent=agent.lower() not in ("none", "ssh_auth_sock"),
    )


def _files(words: str) -> tuple[Path, ...]:
    home = str(Path.home())
    paths = (Path(os.path.expanduser(word.replace("%d", home))) for word in shlex.split(words))
    return tuple(path for path in paths if str(path).lower() not in ("none", os.devnull))


def _identities(said: list[str] | None) -> tuple[Path, ...]:
    if said is None:
        said = [f"~/.ssh/{name}" for name in _USUAL_KEYS]
    # Windows paths must not lose their backslashes, so no shlex here.
    paths = [Path(os.path.expanduser(text.strip('"'))) for text in said]
    return tuple(path for path in dict.fromkeys(paths) if str(path).lower() != "none")

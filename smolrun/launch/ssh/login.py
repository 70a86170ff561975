"""The keys that are tried at an SSH server, in OpenSSH's order, and a record of it.

No prompts: a key with a passphrase is used only from the agent. Only `task=setup`, which runs in a
terminal, passes a function that prompts for a password.
"""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paramiko import Agent, PasswordRequiredException, PKey, SSHException, Transport
from paramiko.auth_strategy import (
    AuthResult,
    AuthSource,
    AuthStrategy,
    InMemoryPrivateKey,
    Password,
    SourceResult,
)

from smolrun.launch.ssh.hop import SshHop

AskPassword = Callable[[str], str]  # "anna@mini2.local" -> the password


class KeyAuthStrategy(AuthStrategy):  # type: ignore[misc]  # paramiko has no types
    """Tries the keys of the client files and the agent, and records them in the hop."""

    def __init__(
        self, hop: SshHop, ask_password: AskPassword | None, *, username: str, **_: Any
    ) -> None:
        super().__init__(ssh_config=None)
        self._hop = hop
        self._ask = ask_password
        self._user = username

    def authenticate(self, transport: Transport) -> AuthResult:
        """Try one after the other; SSHException when there is nothing left to try."""
        self._hop.stage = "login"
        if self._hop.only_key:
            return AuthResult(strategy=self)
        result = AuthResult(strategy=self)
        for what, source in self._sources():
            error: Exception | None = None
            try:
                left = source.authenticate(transport)
                if not left:
                    self._hop.stage = "in"
                    return result
                self._hop.tried.append(
                    f"{what} (accepted, but it asks for {' or '.join(left)} too)"
                )
            except SSHException as refused:
                error = refused
                self._hop.tried.append(what)
                self._hop.takes = list(getattr(refused, "allowed_types", self._hop.takes))
            result.append(SourceResult(source, error))
            if not transport.is_active():
                break  # the server closed the connection (MaxAuthTries)
        raise SSHException("no key was accepted")

    def get_sources(self) -> Iterator[AuthSource]:
        """All there is to try, in order."""
        return (source for _, source in self._sources())

    def _sources(self) -> Iterator[tuple[str, AuthSource]]:
        settings = self._hop.settings
        in_agent = self._agent_keys() if settings.has_agent else []
        files = {path: _public_part(path) for path in settings.identities}
        wanted = set(files.values())
        for key in in_agent:
            if key.asbytes() in wanted:
                yield f"{_comment(key)} of the agent", InMemoryPrivateKey(self._user, key)
        have = {key.asbytes() for key in in_agent}
        for path, public in files.items():
            if public not in have and path.is_file() and (loaded := self._load(path)):
                yield _short(path), InMemoryPrivateKey(self._user, loaded)
        for key in in_agent:
            if key.asbytes() not in wanted and not settings.identities_only:
                yield f"{_comment(key)} of the agent", InMemoryPrivateKey(self._user, key)
        if self._ask is not None:
            ask, who = self._ask, f"{self._user}@{settings.host}"
            yield "the password", Password(self._user, lambda: ask(who))

    def _agent_keys(self) -> list[Any]:
        with contextlib.suppress(SSHException, OSError):
            self._hop.agent = Agent()
            return list(self._hop.agent.get_keys())
        return []

    def _load(self, path: Path) -> PKey | None:
        try:
            return PKey.from_path(path)
        except (PasswordRequiredException, TypeError):
            why = f"it has a passphrase; `ssh-add {_short(path)}` gives it to the agent"
        except OSError as error:
            why = error.strerror or str(error)
        except Exception as error:  # whatever is in the file
            why = f"it cannot be read ({type(error).__name__})"
        self._hop.skipped.append(f"{_short(path)}: {why}")
        return None


def _public_part(path: Path) -> bytes | None:
    """The public key that lies beside a private one, or in its place, if it does."""
    for file in (path, path.with_name(f"{path.name}.pub")):
        with contextlib.suppress(OSError, ValueError):
            kind, data = file.read_text(encoding="utf-8").split()[:2]
            if re.match(r"ssh-|ecdsa-|sk-", kind):
                return base64.b64decode(data)
    return None


def _comment(key: Any) -> str:
    return f"the key {getattr(key, 'comment', '') or key.get_name()}"


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError, RuntimeError):
        return f"~/{path.relative_to(Path.home()).as_posix()}"
    return str(path)

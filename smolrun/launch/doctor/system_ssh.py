"""The system's own `ssh`: does it log in where smolrun fails, and by which setting?

    ssh -o BatchMode=yes HOST true      does it get in
    ssh -G HOST                         what it reads in its files, defaults and all

The output of `ssh -G` is compared by pure functions; running it is at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping

from smolrun.errors import HostError
from smolrun.launch.doctor.findings import Finding
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh.connect import scan
from smolrun.launch.ssh.settings import parse_target

_LOGIN_S = 20.0

# What OpenSSH may use to get in and we do not read: setting, values that mean "not used", and what
# helps us as well.
_NOT_READ: dict[str, tuple[tuple[str, ...], str]] = {
    "identityagent": (("none", "ssh_auth_sock"), "set SSH_AUTH_SOCK to that socket"),
    "pkcs11provider": (("none",), "put a key into the agent: ssh-add"),
    "certificatefile": (("none",), "put the certificate into the agent: ssh-add"),
    "hostbasedauthentication": (("no",), "use a key: smolrun task=setup cluster=NAME"),
    "knownhostscommand": (("none",), "smolrun task=trust cluster=NAME remembers the key"),
    "verifyhostkeydns": (("no", "false"), "smolrun task=trust cluster=NAME remembers the key"),
    "canonicalizehostname": (
        ("no", "false"),
        "write the full name of the host in the cluster file",
    ),
    # Debian switches it on for all, so it says least.
    "gssapiauthentication": (("no",), "use a key: smolrun task=setup cluster=NAME"),
}


def parsed(text: str) -> dict[str, list[str]]:
    """The lines of `ssh -G`: setting in small letters -> its values."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition(" ")
        if name:
            found.setdefault(name.lower(), []).append(value)
    return found


def differences(
    said: Mapping[str, list[str]], ours: Mapping[str, str], *, shares: bool = False
) -> list[tuple[str, str]]:
    """(What ssh does and we do not, what to do), the likeliest first.

    `ours`: hostname, port and user as we read them; `shares`: ssh has a connection open already.
    """
    found = []
    for name, mine in ours.items():
        theirs = (said.get(name) or [mine])[0]
        if theirs.lower() != mine.lower():
            hint = f"write {name} as {theirs} in `ssh:` of the cluster file"
            found.append((f"{name} is {theirs} for ssh and {mine} for us", hint))
    if shares:
        path = said.get("controlpath", ["?"])[0]
        what = f"ssh goes through a connection that is open already (ControlPath {path})"
        found.append((what, "`ssh -O exit HOST` ends it; then see whether ssh still gets in"))
    for name, (unused, hint) in _NOT_READ.items():
        values = [value for value in said.get(name, []) if value.lower() not in unused]
        if values:
            found.append((f"ssh uses {name} {values[0]}, which smolrun does not read", hint))
    return found


def compared(spec: HostSpec) -> Finding | None:
    """A finding if the system's ssh logs in to a host that we failed with; None if not, or if there
    is no ssh here."""
    program = shutil.which("ssh")
    if program is None:
        return None
    try:
        place = parse_target(spec.name, spec.ssh)
    except HostError:
        return None
    common = ["-F", os.path.expanduser(spec.ssh_config)] if spec.ssh_config else []
    common += ["-l", place.user] if place.user else []
    common += ["-p", str(place.port)] if place.port else []
    ask = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={max(1, round(spec.timeout_s))}"]
    # It must not learn a host key either.
    ask += ["-o", "StrictHostKeyChecking=yes"]
    if _run([program, *common, *ask, place.host, "exit 0"]) is None:
        return None
    said = parsed(_run([program, *common, "-G", place.host]) or "")
    shares = _run([program, *common, "-O", "check", place.host]) is not None
    ours = {}
    with contextlib.suppress(HostError, IndexError):
        settings = scan(spec)[-1].settings
        ours = {"hostname": settings.host, "port": str(settings.port), "user": settings.user}
    reasons = differences(said, ours, shares=shares)
    if not reasons:
        return Finding("info", "the system's ssh logs in, smolrun does not", f"ssh -v {spec.ssh}")
    what, hint = reasons[0]
    return Finding("info", f"the system's ssh logs in, smolrun does not: {what}", hint)


def _run(argv: list[str]) -> str | None:
    """Its output, if it ended well and in time."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LOGIN_S + 10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None

"""The user's own SSH key, and its entry in a host's authorized_keys.

Only the public half is ever read. The host gets a line in ~/.ssh/authorized_keys, once, with the
rights that its SSH server insists on.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from smolrun.errors import HostError
from smolrun.launch.remote.connection import error_tail
from smolrun.launch.remote.machine import Machine
from smolrun.launch.remote.shell import Shell

_USUAL = ("id_ed25519", "id_ecdsa", "id_rsa")
_LINE = re.compile(r"(ssh-[a-z0-9-]+|ecdsa-[a-z0-9-]+|sk-[a-z0-9@.-]+) [A-Za-z0-9+/=]+( [^\n\r]*)?")
_RUN_S = 30.0

# Over stdin, as not every login shell takes an argument of several lines. A file without a newline
# at its end would swallow the key.
_INSTALL = """\
set -e
umask 077
mkdir -p "$HOME/.ssh"
chmod 700 "$HOME/.ssh"
file=$HOME/.ssh/authorized_keys
touch "$file"
chmod 600 "$file"
key={key}
if grep -qF -- "$key" "$file"; then echo there; exit 0; fi
[ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ] && echo >> "$file"
printf '%s\\n' "$key" >> "$file"
echo added
"""


def public_key(identities: Iterable[Path] = (), home: Path | None = None) -> Path | None:
    """The public half of the key that ssh would use for a host; None if there is none."""
    usual = ((home or Path.home()) / ".ssh" / name for name in _USUAL)
    for private in (*identities, *usual):
        public = private.with_name(f"{private.name}.pub")
        if private.suffix != ".pub" and public.is_file():
            return public
    return None


def make_key(home: Path | None = None) -> Path:
    """A new key without a passphrase, by ssh-keygen; its public half. OSError if that fails."""
    private = (home or Path.home()) / ".ssh" / _USUAL[0]
    private.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    program = shutil.which("ssh-keygen")
    if program is None:
        raise OSError("there is no ssh-keygen here")
    done = subprocess.run(
        [program, "-q", "-t", "ed25519", "-N", "", "-f", str(private)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_RUN_S,
        check=False,
    )
    if done.returncode:
        raise OSError(done.stderr.decode("utf-8", "replace").strip() or "ssh-keygen failed")
    return private.with_name(f"{private.name}.pub")


def read_key(file: Path) -> str:
    """Its one line; OSError if it is no public key, so that no private one ever leaves."""
    line = file.read_text(encoding="utf-8").strip()
    if not _LINE.fullmatch(line):
        raise OSError(f"{file} is not a public key")
    return line


def install(machine: Machine, line: str) -> bool:
    """Add the key to authorized_keys there; False if it was there already."""
    if machine.shell is not Shell.POSIX:
        raise HostError(
            machine.name,
            "a key is installed on Linux and macOS alone",
            "on Windows, add your .pub file to C:/ProgramData/ssh/administrators_authorized_keys",
        )
    kind_and_key = " ".join(line.split()[:2])
    piece = _INSTALL.format(key=shlex.quote(kind_and_key)).encode()
    done = machine.run(["sh", "-s"], data=piece, timeout_s=_RUN_S)
    words = done.out.decode("utf-8", "replace").split()
    if done.code or not {"there", "added"} & set(words):
        said = error_tail(done.err)
        raise HostError(machine.name, f"the key could not be installed: {said}")
    return "added" in words

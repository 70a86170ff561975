"""A host of the lab: a cable, processes and files of its own, and a real SSH server.

Nothing of the box's own SSH set-up is read or written: keys, users and home are the lab's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.hosts.container import Container
from tests.hosts.network import LabError, Link, Network, command

# Accepts whoever comes, and never says a word: an SSH server whose banner does not come.
SILENT = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listening", file=sys.stderr, flush=True)
accepted = []
while True:
    accepted.append(listener.accept())
"""


class Host(Link, Container):
    """Host number `k`, which SSH reaches as lab<k>."""

    def __init__(
        self, network: Network, k: int, folder: Path, *, rate: str, hidden: Sequence[Path] = ()
    ) -> None:
        network.add_host(k)
        Link.__init__(self, network, k, rate)
        self.number = k
        self.folder = folder
        self.ssh = f"lab{k}"
        self.port = 22
        self.python = sys.executable  # what cluster files name; a test may set another
        self.key_file = folder / "host_key"
        self.authorized_keys = folder / "authorized_keys"
        self.through: Host | None = None
        home = folder / "home"
        home.mkdir()
        self._sshd: subprocess.Popen[bytes] | None = None
        self._log = folder / "sshd.log"
        self._log.touch()
        self._make_key()
        etc = _write_etc(folder / "etc", home, network)
        Container.__init__(self, self.ssh, network.namespace(k), home, etc, hidden)

    # --- the SSH server -----------------------------------------------------------------------

    def start_sshd(self, *, port: int | None = None, silent: bool = False, **options: str) -> None:
        """Its SSH server, with options of sshd_config; `silent`: one that accepts and says nothing.

        The user's ssh_config follows a new port by `write_user_files` of the lab only.
        """
        assert self._sshd is None, f"{self.name} has an SSH server already"
        self.port = port or self.port
        listened_before = self.sshd_log().count("listening")
        with self._log.open("ab") as log:
            if silent:
                argv = [sys.executable, "-c", SILENT, self.address, str(self.port)]
            else:
                argv = _sshd_command(self, options)
            self._sshd = self.start(*argv, stdin=subprocess.DEVNULL, stderr=log)
        wanted = listened_before + (1 if silent else 2)  # it listens on IPv4 and IPv6
        deadline = time.monotonic() + 10
        while self.sshd_log().count("listening") < wanted:
            if self._sshd.poll() is not None or time.monotonic() > deadline:
                self._sshd = None
                raise LabError(f"{self.name}: sshd does not start: {self.sshd_log()}")
            time.sleep(0.005)

    def stop_sshd(self, *, sessions: bool = False) -> None:
        """Nobody new gets in. Those who are in stay, unless `sessions`."""
        assert self._sshd is not None, f"{self.name} has no SSH server"
        listener = [one.pid for one in self.processes(sshd=True) if one.parent == self._sshd.pid]
        self.kill(*listener)
        self._sshd.wait(20)
        self._sshd = None
        if sessions:
            self.end_sessions()

    def end_sessions(self) -> None:
        """All SSH connections to the host break; its SSH server stays."""
        listener = self._sshd.pid if self._sshd is not None else None
        own = [one for one in self.processes(sshd=True) if one.is_sshd]
        self.kill(*(one.pid for one in own if one.parent != listener))

    def sshd_log(self) -> str:
        """All that its SSH server has said, of every start."""
        return self._log.read_text(errors="replace")

    def new_host_key(self) -> None:
        """Its SSH server shows another key from now on; the user's known_hosts has the old one."""
        self.stop_sshd()
        self._make_key()
        self.start_sshd()

    def host_key(self) -> str:
        """Type and key, as known_hosts has them."""
        return " ".join(self.key_file.with_suffix(".pub").read_text().split()[:2])

    def fingerprint(self) -> str:
        """SHA256:..., as ssh shows it."""
        return command("ssh-keygen", "-l", "-f", str(self.key_file)).split()[1]

    def _make_key(self) -> None:
        make_key(self.key_file)

    # --- what may be odd about it ---------------------------------------------------------------

    def make_python(self, code: str) -> str:
        """A Python of the host that has all of ours and runs `code` first, whatever its flags."""
        folder = self.folder / "python"
        ours = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        ours.mkdir(parents=True, exist_ok=True)
        (folder / "bin").mkdir(exist_ok=True)
        program = folder / "bin" / "python"
        base = Path(sys._base_executable)
        if not program.exists():
            program.symlink_to(base.resolve())
        (folder / "pyvenv.cfg").write_text(f"home = {base.resolve().parent}\n")
        packages = sysconfig.get_path("purelib")
        # Not sitecustomize, which Debian's own Python has already.
        (ours / "box.pth").write_text(
            f"import run_first_on_this_host\nimport site; site.addsitedir({packages!r})\n"
        )
        (ours / "run_first_on_this_host.py").write_text(code)
        self.python = str(program)
        return self.python

    def shift_clock(self, seconds: float) -> None:
        """The clock of its Python is off: what time.time and time.time_ns tell, not datetime."""
        self.make_python(
            "import time\n"
            "_time, _time_ns = time.time, time.time_ns\n"
            f"time.time = lambda: _time() + {seconds!r}\n"
            f"time.time_ns = lambda: _time_ns() + {round(seconds * 1e9)}\n"
        )

    def entry(self, **changes: Any) -> dict[str, Any]:
        """Its lines in a cluster file."""
        entry: dict[str, Any] = {"name": self.name, "ssh": self.ssh, "address": self.address}
        return entry | {"python": self.python, "workdir": str(self.workdir)} | changes


def make_key(file: Path) -> None:
    """A pair of keys without a passphrase, in place of what is there."""
    for old in (file, file.with_suffix(".pub")):
        old.unlink(missing_ok=True)
    command(*["ssh-keygen", "-q", "-t", "ed25519", "-N"], "", "-C", "lab", "-f", str(file))


def _sshd_command(host: Host, options: dict[str, str]) -> list[str]:
    settings = {
        "Port": str(host.port),
        "AuthorizedKeysFile": str(host.authorized_keys),
        "PidFile": "none",
        "StrictModes": "no",  # the lab's folders may lie below one that others can write to
        "UsePAM": "no",
        "UseDNS": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "Subsystem": "sftp internal-sftp",
    }
    if _has_penalties():
        settings["PerSourcePenalties"] = "no"  # a test of refused keys must not lock the next out
    flags = [f"-o{key}={value}" for key, value in (settings | options).items()]
    listen = [f"-oListenAddress={one}" for one in (host.address, f"[{host.address6}]")]
    # It starts itself again for every connection, so it must know its own absolute path.
    return [sshd_program(), "-D", "-e", "-f/dev/null", f"-h{host.key_file}", *flags, *listen]


def sshd_program() -> str:
    """Its absolute path, which is not on everybody's PATH."""
    return "/usr/sbin/sshd"


def _has_penalties() -> bool:
    said = subprocess.run([sshd_program(), "-V"], capture_output=True, text=True).stderr
    version = re.search(r"OpenSSH_(\d+)\.(\d+)", said)
    return version is not None and (int(version[1]), int(version[2])) >= (9, 8)


def _write_etc(etc: Path, home: Path, network: Network) -> Path:
    """Files that the host sees in place of the box's own: users, names of machines."""
    etc.mkdir()
    users = Path("/etc/passwd").read_text()
    users = re.sub(r"^root:.*$", f"root:x:0:0:root:{home}:/bin/bash", users, flags=re.MULTILINE)
    if "\nsshd:" not in users:
        users += "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
    (etc / "passwd").write_text(users)
    # Root may be locked on the box ("!"), and sshd lets nobody in who is locked.
    (etc / "shadow").write_text("root:*:20000:0:99999:7:::\nsshd:!:20000::::::\n")
    (etc / "shadow").chmod(0o600)
    names = ["127.0.0.1 localhost", "::1 localhost"]
    for k in range(1, 17):
        names += [f"{network.address(k)} lab{k}", f"{network.address6(k)} lab{k}"]
    (etc / "hosts").write_text("\n".join(names) + "\n")
    return etc

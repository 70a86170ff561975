"""A lab: hosts on this one Linux machine, as far apart as real ones, and a user's files for them.

    with lab(hosts=3, rate="200mbit", folder=tmp_path) as the_lab:
        the_lab.write_cluster(tmp_path / "conf", "lab3")      # for `cluster=lab3`
        the_lab.hosts[1].cut()

Every host is a set of namespaces with a cable to a bridge (network.py), processes and files of its
own (container.py) and a real sshd (host.py). docs/lab.md says what one can do to them.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.hosts.claims import claim, let_out, release
from tests.hosts.host import Host, make_key, sshd_program
from tests.hosts.network import BOX, LabError, Network, bits_per_second, command, search_path

TOOLS = {
    "iproute2": ("ip", "tc"),
    "nftables": ("nft",),
    "openssh-server": (sshd_program(),),
    "openssh-client": ("ssh", "ssh-keygen"),
    "util-linux": ("unshare", "nsenter"),
}
# In namespaces that go at once: what a lab needs of the kernel.
TRIAL = """set -e
mount -t proc proc /proc
tc qdisc add dev lo root tbf rate 1mbit burst 16k limit 64k
nft 'table netdev t { chain c { type filter hook ingress device "lo" priority 0; drop; }; }'
"""


@functools.cache
def missing() -> str | None:
    """Why there can be no lab here, and what would help; None if there can."""
    if sys.platform != "linux":
        return "the lab of hosts needs Linux, for its network namespaces"
    if os.geteuid() != 0:
        return "the lab of hosts needs root, for its network namespaces"
    path = search_path()
    absent = {
        package: [tool for tool in tools if shutil.which(tool, path=path) is None]
        for package, tools in TOOLS.items()
    }
    packages = [package for package, tools in absent.items() if tools]
    if packages:
        names = ", ".join(Path(tool).name for tools in absent.values() for tool in tools)
        install = "apt-get install --no-install-recommends " + " ".join(packages)
        return f"the lab of hosts needs {names}: {install}"
    trial = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c"]
    try:
        command(*trial, TRIAL)
    except LabError as error:
        return f"this kernel or container allows no lab of hosts: {error}"
    return None


class Lab:
    """Hosts that are up, and the user's side: `ssh_config`, `known_hosts` and a `key`.

    `name` is that of its interface; `address` and `address6` are the box's, as the hosts see it.
    """

    def __init__(self, network: Network, hosts: list[Host], folder: Path) -> None:
        self.name = network.name
        self.hosts = hosts
        self.folder = folder
        self.address = network.address(BOX)
        self.address6 = network.address6(BOX)
        self.ssh_config = folder / "ssh_config"
        self.known_hosts = folder / "known_hosts"
        self.key = folder / "key"
        make_key(self.key)

    def write_user_files(self) -> None:
        """ssh_config and known_hosts as the hosts are now: keys and ports, `only_through`."""
        self.known_hosts.write_text("".join(_known(host) for host in self.hosts))
        self.ssh_config.write_text("\n".join(self._config_of(host) for host in self.hosts))

    def only_through(self, host: Host, other: Host) -> None:
        """The box reaches `host` only by a jump over `other`."""
        host.cut_from(self)
        host.through = other
        self.write_user_files()

    def forget(self, host: Host) -> None:
        """The user has never seen the key of `host`."""
        others = [one for one in self.hosts if one is not host]
        self.known_hosts.write_text("".join(_known(one) for one in others))

    def authorize(self, host: Host, *keys: Path) -> None:
        """Who may log in: the owners of `keys` and nobody else; none at all locks all out."""
        text = "".join(key.with_suffix(".pub").read_text() for key in keys)
        host.authorized_keys.write_text(text)

    def run_ssh(
        self, host: Host, line: str, *, data: str = "", timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """A line of shell on the host, through the system's own ssh."""
        argv = ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes", host.ssh, line]
        return subprocess.run(argv, input=data, capture_output=True, text=True, timeout=timeout_s)

    def write_cluster(
        self,
        conf: Path,
        name: str,
        *,
        hosts: Sequence[Host] | None = None,
        host_keys: dict[str, dict[str, Any]] | None = None,
        **keys: Any,
    ) -> Path:
        """Write `conf`/cluster/`name`.yaml, for `cluster=<name>` where ./conf is `conf`.

        `keys` go into the cluster, `host_keys` ({"lab2": {"ranks": 2}}) into single hosts.
        """
        host_keys = host_keys or {}
        entries = [one.entry(**host_keys.get(one.name, {})) for one in hosts or self.hosts]
        cluster = {
            "name": name,
            "hosts": entries,
            "ssh_config": str(self.ssh_config),
            "start_timeout_s": 120,
            "threads": 1,  # all hosts share this machine's cores
        }
        text = yaml.safe_dump(cluster | keys, sort_keys=False)
        file = conf / "cluster" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {len(entries)} hosts of a lab on this machine\n{text}")
        return file

    def _config_of(self, host: Host) -> str:
        lines = {
            "HostName": host.address,
            "Port": str(host.port),
            "User": "root",
            "IdentityFile": _quoted(self.key),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": _quoted(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
        }
        if host.through is not None:
            lines["ProxyJump"] = host.through.ssh
        body = "".join(f"    {key} {value}\n" for key, value in lines.items())
        return f"Host {host.ssh}\n{body}"


def _quoted(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)


def _known(host: Host) -> str:
    lines = []
    for address in (host.address, host.address6):
        name = address if host.port == 22 else f"[{address}]:{host.port}"
        lines.append(f"{name} {host.host_key()}\n")
    return "".join(lines)


@contextmanager
def lab(
    hosts: int = 3,
    rate: str = "1gbit",
    *,
    folder: Path,
    internet: bool = False,
    hidden: Sequence[Path] = (),
) -> Iterator[Lab]:
    """Hosts that are there inside the `with`, and gone after it with all that ran on them.

    `rate` is each cable's, in each direction. All files go below `folder`. `internet`: hosts reach
    what the box reaches. `hidden`: folders of the box that the hosts see empty, so that nothing
    works there by accident.
    """
    reason = missing()
    if reason is not None:
        raise LabError(reason)
    if not 1 <= hosts <= 16:
        raise LabError("a lab has 1 to 16 hosts")
    bits_per_second(rate)  # a wrong one is told before anything is there
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with ExitStack() as undo:
        network = claim()
        undo.callback(release, network)
        network.build()
        if internet:
            let_out(network)
        there = []
        for k in range(1, hosts + 1):
            place = folder / f"lab{k}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            host = Host(network, k, place, rate=rate, hidden=hidden)
            undo.callback(host.end)
            there.append(host)
        the_lab = Lab(network, there, folder)
        for host in there:
            host.wait_until_up()
            the_lab.authorize(host, the_lab.key)
            host.start_sshd()
            if internet:
                host.run("ip", "route", "add", "default", "via", the_lab.address)
        the_lab.write_user_files()
        yield the_lab

"""The lab's network: a bridge in a namespace of its own, and one cable to each host.

    box ──smolK── [ bridge ]──p1── eth0 host 1
                      └──────p2── eth0 host 2 ...

The bridge is kept away from the box's own interfaces, so that a firewall of the box (Docker's, say)
has no word in it. Both ends of a cable drop what a test wants dropped when it arrives, as a broken
cable would: no FIN, no error for the sender. Knows nothing of SSH and of processes.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")

BOX = 254  # the box's own number among the addresses
CLONE_NEWNET = 0x40000000  # linux/sched.h: a network namespace
UNITS = {"bit": 1, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class LabError(Exception):
    """The lab could not do what it was asked: the command, and what it said."""


def search_path() -> str:
    """PATH, and where the box's tools are: a root that came by `su` does not have them on it."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def command(*argv: str, data: str = "", timeout_s: float = 20.0) -> str:
    """Run a command of the box to its end, with `data` as its stdin; gives its stdout."""
    done = subprocess.run(
        argv,
        input=data,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"PATH": search_path()},
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise LabError(f"`{' '.join(argv)}` ended with {done.returncode}: {said}")
    return done.stdout


class HasAddress(Protocol):
    """A host, or the box: whatever has an address of each kind."""

    address: str
    address6: str


@dataclass(frozen=True)
class Network:
    """Names and addresses of lab number `number`."""

    number: int

    @property
    def name(self) -> str:
        """Of the lab, and of the box's own interface to it."""
        return f"smol{self.number}"

    @property
    def switch(self) -> str:
        """The namespace of the bridge."""
        return f"{self.name}-switch"

    def namespace(self, k: int) -> str:
        return f"{self.name}-{k}"

    @property
    def subnet(self) -> str:
        return f"10.{187 + self.number // 256}.{self.number % 256}.0/24"

    def address(self, k: int) -> str:
        return self.subnet.replace("0/24", str(k))

    def address6(self, k: int) -> str:
        # As the system itself writes it: lab 0 has fd73:6d6f:6c::1.
        return str(ipaddress.ip_address(f"fd73:6d6f:6c:{self.number:x}::{k:x}"))

    def build(self) -> None:
        """The bridge, and the box's cable to it."""
        command("ip", "netns", "add", self.switch)
        peer = ("type", "veth", "peer", "name", "box", "netns", self.switch)
        command("ip", "link", "add", self.name, *peer)
        _batch(
            self.switch,
            "link add br0 type bridge mcast_snooping 0",
            "link set br0 up",
            "link set box master br0 up",
        )
        command("ip", "address", "add", f"{self.address(BOX)}/24", "dev", self.name)
        v6 = (f"{self.address6(BOX)}/64", "dev", self.name, "nodad")
        command("ip", "-6", "address", "add", *v6)
        command("ip", "link", "set", self.name, "up")

    def add_host(self, k: int) -> None:
        """The namespace of host `k`, and its cable."""
        namespace = self.namespace(k)
        command("ip", "netns", "add", namespace)
        _batch(
            self.switch,
            f"link add p{k} type veth peer name eth0 netns {namespace}",
            f"link set p{k} master br0 up",
        )
        _batch(
            namespace,
            "link set lo up",
            f"address add {self.address(k)}/24 dev eth0",
            # Without the look for duplicates, which takes a second before one can listen.
            f"address add {self.address6(k)}/64 dev eth0 nodad",
            "link set eth0 up",
        )


def _batch(namespace: str, *lines: str) -> None:
    command("ip", "-n", namespace, "-batch", "-", data="\n".join(lines) + "\n")


def bits_per_second(rate: str) -> float:
    """What `tc` reads as a rate: 1gbit, 200mbit, 512kbit."""
    matched = re.fullmatch(r"([\d.]+)([kmg]?bit)", rate)
    if matched is None:
        raise LabError(f"{rate!r} is no rate; say 1gbit, 200mbit or 512kbit")
    return float(matched[1]) * UNITS[matched[2]]


class Link:
    """One host's cable. Changes hold until `heal`, and add up."""

    def __init__(self, network: Network, k: int, rate: str) -> None:
        self.address = network.address(k)
        self.address6 = network.address6(k)
        # The end at which packets arrive, for packets to the host and from it.
        self._to_host = (network.namespace(k), "eth0")
        self._from_host = (network.switch, f"p{k}")
        self._drops_to: list[str] = []
        self._drops_from: list[str] = []
        self._full_rate = self._rate = rate
        self._loses = False
        self._shape()

    def rate(self, rate: str) -> None:
        """Both directions carry so much, as 1mbit, from now on."""
        self._rate = rate
        self._shape()

    def cut(self) -> None:
        """Nothing goes through in either direction; neither side is told."""
        self.cut_in()
        self.cut_out()

    def cut_in(self) -> None:
        """Nothing reaches the host."""
        self._drops_to.append("drop")
        self._apply()

    def cut_out(self) -> None:
        """Nothing that the host sends arrives anywhere."""
        self._drops_from.append("drop")
        self._apply()

    def cut_from(self, other: HasAddress) -> None:
        """Nothing goes through between the host and `other`, which may be the lab's box."""
        for field, drops in (("saddr", self._drops_to), ("daddr", self._drops_from)):
            drops.append(f"ip {field} {other.address} drop")
            drops.append(f"ip6 {field} {other.address6} drop")
        self._apply()

    def block_port(self, port: int) -> None:
        """Nothing reaches that TCP port of the host, as behind a firewall."""
        self._drops_to.append(f"tcp dport {port} drop")
        self._apply()

    def lose(self, percent: float) -> None:
        """That many of the packets are lost in each direction, by chance."""
        drop = f"numgen random mod 1000 < {round(percent * 10)} drop"
        self._drops_to.append(drop)
        self._drops_from.append(drop)
        self._loses = True
        self._shape()
        self._apply()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` in our own process but on the host's network: its sockets are there.

        So are those of the threads that it starts. Files, clock and pid stay ours.
        """
        with ThreadPoolExecutor(1, thread_name_prefix=f"on {self._to_host[0]}") as pool:
            return pool.submit(self._call_there, function).result()

    def _call_there(self, function: Callable[[], T]) -> T:
        # A thread's own change, which ends with the thread; os.setns needs Python 3.12.
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self._to_host[0]}", "rb") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise LabError(f"setns: {os.strerror(ctypes.get_errno())}")
        return function()

    def heal(self) -> None:
        """The cable is as it was at first: full rate, nothing dropped."""
        self._drops_to.clear()
        self._drops_from.clear()
        self._rate, self._loses = self._full_rate, False
        self._shape()
        self._apply()

    def _apply(self) -> None:
        for (namespace, device), drops in (
            (self._to_host, self._drops_to),
            (self._from_host, self._drops_from),
        ):
            hook = f'type filter hook ingress device "{device}" priority 0;'
            chain = f"chain arrivals {{ {hook} {' '.join(f'{drop};' for drop in drops)} }}"
            # One nft run is one change: at no time is there half of it.
            table = f"table netdev cable_{device}"
            rules = f"{table}\ndelete {table}\n{table} {{ {chain}; }}\n"
            command("ip", "netns", "exec", namespace, "nft", "-f", "-", data=rules)

    def _shape(self) -> None:
        """A token bucket at each end that sends into the cable."""
        bytes_per_second = bits_per_second(self._rate) / 8
        # 5 ms of sending at once. Sockets hand over up to 64 KiB as one; the bucket splits what is
        # larger than itself, so a small one makes losses lose packets of 1,500 bytes.
        burst = 8 * 1024 if self._loses else min(max(bytes_per_second * 0.005, 16384), 262144)
        limit = burst + max(bytes_per_second * 0.05, 65536)
        bucket = ("tbf", "rate", self._rate, "burst", f"{burst:.0f}", "limit", f"{limit:.0f}")
        for namespace, device in (self._to_host, self._from_host):
            command("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *bucket)

"""What a joined machine and its coordinator tell each other: types, their limits, and which version
of the other side is accepted. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from smolrun.launch.delivery.versions import Versions

PROTOCOL = 1
PORT = 47741  # of coordinators, where it is free; not registered with IANA
HELLO_S = 20.0

_Text = Annotated[str, Meta(max_length=256)]
_Version = Annotated[str, Meta(max_length=100)]
_Folder = Annotated[str, Meta(min_length=1, max_length=4096)]


class JoinRequest(msgspec.Struct, frozen=True):
    """A machine that joins: what a probe would find there. `agent` is new for each process of it;
    `code` is a hash of its smolrun; `addresses` are where its ranks can listen, best first."""

    protocol: int
    agent: _Text
    name: _Text
    versions: dict[_Text, _Version | None]
    code: _Text
    os: _Text
    cores: Annotated[int, Meta(ge=1, le=1 << 20)]
    home: _Folder
    workdir: _Folder
    python: _Folder
    addresses: Annotated[list[Annotated[str, Meta(max_length=100)]], Meta(max_length=64)]


class JoinAccepted(msgspec.Struct, frozen=True):
    """The coordinator's answer. `machine` is its USER@HOST; `host` is what the run calls the one
    that joins."""

    cluster: _Text
    machine: _Text
    host: _Text


def code_hash(files: Mapping[str, bytes]) -> str:
    """12 hex digits that are equal where the code is; line ends of Windows do not count."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        plain = hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()
        digest.update(f"{name}\n{plain}\n".encode())
    return digest.hexdigest()[:12]


def refusal(hello: JoinRequest, versions: Versions, code: str, cluster: str) -> str | None:
    """Why a machine cannot join a coordinator with these versions, and what to do; None if it can.

    Both sides speak the same wire and write one checkpoint, so their smolrun must be equal."""
    theirs, ours = hello.versions.get("smolrun"), versions["smolrun"]
    if hello.protocol != PROTOCOL or theirs != ours:
        return (
            f"{hello.name} has smolrun {theirs}, {cluster} runs smolrun {ours}: install the same "
            f"on both, for example `pip install smolrun=={ours}` on {hello.name}"
        )
    if hello.code != code:
        return (
            f"{hello.name} has smolrun {theirs} with code {hello.code}, {cluster} runs smolrun "
            f"{ours} with code {code}: install the same file on both (`pip wheel --no-deps .` "
            "makes one of a checkout)"
        )
    return None

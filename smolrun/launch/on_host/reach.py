"""Runs on every host at the same time: which other hosts does it reach, and which reach it?

Each listens on the first of its ports that is free, and dials the ports of all others, until all
is known or time is up. Both sides prove by HMAC that they belong to this test: they know the nonce,
which came over SSH. Needs no mesh and nothing of smolrun; standard library, Python >= 3.8.

    request: me, nonce (hex), listen [port, ..], wait_s,
             peers {name: {"addresses": [..], "ports": [..]}}
             expected [[peer, address it dials], ..]      returns once all have connected
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import threading
import time
from typing import Any

_CHALLENGE = 16
_PROOF = 32
_DIAL_S = 2.0
_PAUSE_S = 0.1


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`port` it listened on (None: all were taken), `heard`: [peer, our address] rows, and
    `dialed` every peer."""
    nonce = bytes.fromhex(request["nonce"])
    deadline = time.monotonic() + request["wait_s"]
    listener = _listen(request["listen"])
    heard: list[list[str]] = []
    dialed: dict[str, list[dict[str, Any]]] = {name: [] for name in request["peers"]}
    threads = [
        threading.Thread(target=_dial, args=(request["me"], peer, address, nonce, deadline, told))
        for name, peer in request["peers"].items()
        for address, told in _places(peer, dialed[name])
    ]
    if listener is not None:
        threads.append(
            threading.Thread(target=_answer, args=(listener, nonce, deadline, request, heard))
        )
    for number, thread in enumerate(threads):
        thread.name = f"reach-{number}"
        thread.daemon = True
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()) + _DIAL_S + 1.0)
    port = listener.getsockname()[1] if listener is not None else None
    if listener is not None:
        listener.close()
    return {"port": port, "heard": heard, "dialed": dialed}


def _places(peer: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    rows += [{"address": address, "error": "not tried"} for address in peer["addresses"]]
    return [(row["address"], row) for row in rows]


def _listen(ports: list[int]) -> socket.socket | None:
    """On all addresses, of IPv6 as well where there is any."""
    for port in ports:
        for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                continue
            try:
                if os.name == "posix":  # on Windows it would let two listen on one port
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.bind((address, port))
                sock.listen(64)
                return sock
            except OSError:
                sock.close()
    return None


def _answer(
    listener: socket.socket,
    nonce: bytes,
    deadline: float,
    request: dict[str, Any],
    heard: list[list[str]],
) -> None:
    """Accepts connections until all expected peers have connected, or time is up."""
    expected = [list(one) for one in request["expected"]]
    while time.monotonic() < deadline and len(heard) < len(expected):
        listener.settimeout(max(0.05, deadline - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except OSError:
            continue
        with sock:
            try:
                sock.settimeout(_DIAL_S)
                hello = _read_hello(sock, nonce)
                if hello in expected and hello not in heard:
                    heard.append(hello)
            except OSError:
                continue  # not a peer of this test, or closed


def _read_hello(sock: socket.socket, nonce: bytes) -> list[str]:
    """[peer, address it dialled]; the answer is sent only if it knows the nonce."""
    challenge, proof = _take(sock, _CHALLENGE), _take(sock, _PROOF)
    name = _take(sock, _take(sock, 1)[0])
    if not hmac.compare_digest(proof, _proof(nonce, b"dial", challenge, name)):
        raise OSError("not one of us")
    sock.sendall(_proof(nonce, b"answer", challenge, name))
    return name.decode("utf-8", "replace").split("\n")


def _dial(
    me: str,
    peer: dict[str, Any],
    address: str,
    nonce: bytes,
    deadline: float,
    told: dict[str, Any],
) -> None:
    """Tries the ports in turn, again and again: the other may not listen yet."""
    name = f"{me}\n{address}".encode()[:255]
    while time.monotonic() < deadline:
        for port in peer["ports"]:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                with socket.create_connection((address, port), min(_DIAL_S, left)) as sock:
                    challenge = os.urandom(_CHALLENGE)
                    proof = _proof(nonce, b"dial", challenge, name)
                    sock.sendall(challenge + proof + bytes([len(name)]) + name)
                    if not hmac.compare_digest(
                        _take(sock, _PROOF), _proof(nonce, b"answer", challenge, name)
                    ):
                        raise OSError("another program answers at this port")
                    told.update(error=None, port=port, local=sock.getsockname()[0])
                    return
            except socket.timeout:
                told["error"] = "timed out"
            except ConnectionRefusedError:
                # A timeout says more than a refusal, as the other ports are free.
                if told["error"] != "timed out":
                    told["error"] = "refused"
            except OSError as error:
                told["error"] = error.strerror or str(error)
        time.sleep(_PAUSE_S)


def _proof(nonce: bytes, role: bytes, challenge: bytes, name: bytes) -> bytes:
    return hmac.new(nonce, role + challenge + name, hashlib.sha256).digest()


def _take(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise OSError("closed")
        data += more
    return data

"""Runs on a host: which firewall guards it, as far as one may see without being its administrator.

Changes nothing. Only the standard library, Python >= 3.8.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from typing import Any

_RUN_S = 10.0


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`kind`: ufw, firewalld, nftables, iptables, macos, windows or None; `is_on` may be None."""
    kind = platform.system().lower()
    if kind == "darwin":
        output = _run("/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate") or ""
        return {"kind": "macos", "is_on": "State = 0" not in output if output else None}
    if kind == "windows":
        output = _run("netsh", "advfirewall", "show", "currentprofile", "state") or ""
        return {"kind": "windows", "is_on": bool(re.search(r"\bON\b", output)) if output else None}
    return _linux()


def _linux() -> dict[str, Any]:
    if re.search(r"^ENABLED=yes", _read("/etc/ufw/ufw.conf"), re.MULTILINE):
        return {"kind": "ufw", "is_on": True}
    if (_run("systemctl", "is-active", "firewalld") or "") == "active":
        return {"kind": "firewalld", "is_on": True}
    folders = "/usr/sbin:/sbin:" + os.environ.get("PATH", "")
    if (nft := shutil.which("nft", path=folders)) is not None:
        rules = _run(nft, "list", "ruleset")
        return {"kind": "nftables", "is_on": None if rules is None else "hook input" in rules}
    if shutil.which("iptables", path=folders) is not None:
        return {"kind": "iptables", "is_on": None}
    return {"kind": None, "is_on": None}


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _run(*argv: str) -> str | None:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_RUN_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None

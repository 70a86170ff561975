"""Runs on a host: which firewall guards it, as far as one may see without being its administrator.

Changes nothing. Only the standard library, Python >= 3.8.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from typing import Any

from smolrun.launch.on_host.prelude import read, run


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`kind`: ufw, firewalld, nftables, iptables, macos, windows or None; `is_on` may be None."""
    kind = platform.system().lower()
    if kind == "darwin":
        output = run("/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate") or ""
        return {"kind": "macos", "is_on": "State = 0" not in output if output else None}
    if kind == "windows":
        output = run("netsh", "advfirewall", "show", "currentprofile", "state") or ""
        return {"kind": "windows", "is_on": bool(re.search(r"\bON\b", output)) if output else None}
    return _linux()


def _linux() -> dict[str, Any]:
    if re.search(r"^ENABLED=yes", read("/etc/ufw/ufw.conf"), re.MULTILINE):
        return {"kind": "ufw", "is_on": True}
    if (run("systemctl", "is-active", "firewalld") or "") == "active":
        return {"kind": "firewalld", "is_on": True}
    folders = "/usr/sbin:/sbin:" + os.environ.get("PATH", "")
    if (nft := shutil.which("nft", path=folders)) is not None:
        rules = run(nft, "list", "ruleset")
        return {"kind": "nftables", "is_on": None if rules is None else "hook input" in rules}
    if shutil.which("iptables", path=folders) is not None:
        return {"kind": "iptables", "is_on": None}
    return {"kind": None, "is_on": None}

"""Runs on a host: what machine this is, and what it has left. Changes nothing.

Only the standard library, Python >= 3.8; whatever cannot be found out is None.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import re
import shutil
import sys
from typing import Any

from smolrun.launch.on_host.prelude import (
    SLOW_S,
    nearest_folder,
    powershell,
    read,
    run,
    usable_cores,
    user,
)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """All there is to know; `workdir` of the request is the folder whose disk counts."""
    kind = platform.system().lower()
    memory = {"linux": _linux_memory, "darwin": _mac_memory, "windows": _windows_memory}
    total, available = memory.get(kind, lambda: (None, None))()
    return {
        "user": user(),
        "hostname": platform.node(),
        "os": kind,
        "system": _system(kind),
        "arch": platform.machine(),
        "bits": 64 if sys.maxsize > 2**32 else 32,
        "model": _model(kind),
        "cpu": _cpu(kind),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_total": total,
        "memory_available": available,
        "python": {"path": sys.executable, "version": platform.python_version()},
        "gpus": _gpus(kind),
        "jetson": os.path.exists("/etc/nv_tegra_release"),
        "folder": _folder(request["workdir"]),
    }


def _system(kind: str) -> str:
    if kind == "darwin":
        return "macOS " + platform.mac_ver()[0]
    if kind == "windows":
        return f"Windows {platform.release()} {platform.version()}"
    named = re.search(r'^PRETTY_NAME="?([^"\n]*)', read("/etc/os-release"), re.MULTILINE)
    return named.group(1) if named else f"{platform.system()} {platform.release()}"


def _model(kind: str) -> str | None:
    if kind == "darwin":
        return run("sysctl", "-n", "hw.model")
    text = read("/proc/device-tree/model") or read("/sys/class/dmi/id/product_name")
    return text.strip("\0\n ") if text else None


def _cpu(kind: str) -> str | None:
    if kind == "darwin":
        return run("sysctl", "-n", "machdep.cpu.brand_string")
    if kind == "windows":
        return platform.processor() or None
    text = read("/proc/cpuinfo")
    # A Pi has no model name for each core, but a line about the whole board.
    found = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or None


def _linux_memory() -> tuple[int | None, int | None]:
    text = read("/proc/meminfo")
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", text, re.MULTILINE))
    total, available = found.get("MemTotal"), found.get("MemAvailable")
    return (int(total) * 1024 if total else None, int(available) * 1024 if available else None)


def _mac_memory() -> tuple[int | None, int | None]:
    total, pages = run("sysctl", "-n", "hw.memsize"), run("vm_stat") or ""
    size = re.search(r"page size of (\d+) bytes", pages)
    # What is inactive or speculative is reclaimed on demand.
    free = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)", pages, re.MULTILINE)
    available = sum(map(int, free)) * int(size.group(1)) if size and free else None
    return (int(total) if total and total.isdigit() else None, available)


def _windows_memory() -> tuple[int | None, int | None]:
    text = powershell(
        "Get-CimInstance Win32_OperatingSystem"
        " | Select-Object TotalVisibleMemorySize,FreePhysicalMemory | ConvertTo-Json"
    )
    try:
        found = json.loads(text)
        return found["TotalVisibleMemorySize"] * 1024, found["FreePhysicalMemory"] * 1024
    except (ValueError, KeyError, TypeError):
        return None, None


def _gpus(kind: str) -> list[dict[str, str]]:
    """GPUs that the system sees, whether torch can use them or not."""
    if kind == "darwin":
        is_apple = platform.machine() == "arm64"
        return [{"vendor": "apple", "name": _cpu(kind) or "Apple GPU"}] if is_apple else []
    named = _nvidia_smi()
    if named:
        return [{"vendor": "nvidia", "name": name} for name in named]
    if kind == "windows":
        text = powershell("(Get-CimInstance Win32_VideoController).Name")
        return [_pc_gpu(line.strip()) for line in text.splitlines() if line.strip()]
    return _linux_gpus()


def _pc_gpu(name: str) -> dict[str, str]:
    vendors = [vendor for vendor in ("nvidia", "amd", "intel") if vendor in name.lower()]
    return {"vendor": (vendors or ["other"])[0], "name": name}


def _nvidia_smi() -> list[str]:
    places = ("/usr/lib/wsl/lib/nvidia-smi", r"C:\Windows\System32\nvidia-smi.exe")
    found = shutil.which("nvidia-smi") or next(filter(os.path.exists, places), None)
    if found is None:
        return []
    names = run(found, "--query-gpu=name", "--format=csv,noheader", timeout_s=SLOW_S) or ""
    return [line.strip() for line in names.splitlines() if line.strip()]


def _linux_gpus() -> list[dict[str, str]]:
    """From the PCI bus itself: a GPU without a driver is seen too."""
    vendors = {"0x10de": "nvidia", "0x1002": "amd"}
    found = []
    for device in sorted(glob.glob("/sys/bus/pci/devices/*")):
        vendor = read(device + "/vendor").strip()
        is_display = read(device + "/class").startswith("0x03")
        if is_display and vendor in vendors:
            found.append({"vendor": vendors[vendor], "name": "PCI " + os.path.basename(device)})
    if os.path.exists("/etc/nv_tegra_release"):
        found.append({"vendor": "nvidia", "name": "Jetson"})
    return found


def _folder(path: str) -> dict[str, Any]:
    """The disk below the folder, or below the nearest one above it that is there."""
    place = nearest_folder(os.path.expanduser(path))
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        free = None
    return {
        "path": path,
        "found": place,
        "free": free,
        "is_folder": os.path.isdir(place),
        "is_writable": os.access(place, os.W_OK | os.X_OK),
    }

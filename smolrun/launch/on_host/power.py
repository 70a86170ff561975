"""Runs on a host: its sleep settings and throttling. Changes nothing.

findings.py decides on the driver what the values mean. Only the standard library, Python >= 3.8;
what cannot be found out is left out.
"""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
from typing import Any

from smolrun.launch.on_host.prelude import read, run

_PI = "/sys/devices/platform/soc/soc:firmware/get_throttled"
_CPU = "/sys/devices/system/cpu"


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`sleep` and `throttle`, as far as this system has them."""
    kind = platform.system().lower()
    if kind == "darwin":
        return {"sleep": _mac_sleep(), "throttle": _mac_throttle()}
    if kind == "windows":
        return {"sleep": _windows_sleep(), "throttle": {}}
    return {"sleep": _linux_sleep(), "throttle": _linux_throttle()}


# -- sleep ----


def _linux_sleep() -> dict[str, Any]:
    found: dict[str, Any] = {"has_battery": bool(glob.glob("/sys/class/power_supply/BAT*"))}
    if shutil.which("systemctl"):
        states = run("systemctl", "is-enabled", "sleep.target", "suspend.target", any_code=True)
        found["targets"] = (states or "").split()
    files = ["/etc/systemd/logind.conf", *sorted(glob.glob("/etc/systemd/logind.conf.d/*.conf"))]
    settings = dict(re.findall(r"^(\w+)=(\S+)", "\n".join(map(read, files)), re.MULTILINE))
    found["idle_action"] = settings.get("IdleAction", "ignore")
    found["lid"] = settings.get("HandleLidSwitch", "suspend")
    if shutil.which("gsettings"):
        schema = "org.gnome.settings-daemon.plugins.power"
        kind = run("gsettings", "get", schema, "sleep-inactive-ac-type") or ""
        found["desktop"] = kind.strip("'")
        seconds = run("gsettings", "get", schema, "sleep-inactive-ac-timeout") or ""
        found["desktop_s"] = int(seconds) if seconds.isdigit() else None
    found["can_inhibit"] = shutil.which("systemd-inhibit") is not None
    return found


def _mac_sleep() -> dict[str, Any]:
    text = run("pmset", "-g") or ""
    minutes = dict(re.findall(r"^\s*(sleep|standby|lowpowermode|womp)\s+(\d+)", text, re.MULTILINE))
    return {
        "pmset": {name: int(value) for name, value in minutes.items()},
        "has_battery": "InternalBattery" in (run("pmset", "-g", "batt") or ""),
        "can_inhibit": os.path.exists("/usr/bin/caffeinate"),
    }


def _windows_sleep() -> dict[str, Any]:
    text = run("powercfg", "/query", "SCHEME_CURRENT", "SUB_SLEEP", "STANDBYIDLE") or ""
    # Its words are in the user's language; the last two numbers are mains and battery.
    numbers = re.findall(r":\s*0x([0-9a-fA-F]{8})\s*$", text, re.MULTILINE)
    seconds = int(numbers[-2], 16) if len(numbers) >= 2 else None
    return {"standby_s": seconds, "can_inhibit": True}


# -- throttling ----


def _linux_throttle() -> dict[str, Any]:
    found: dict[str, Any] = {"temperature_c": _temperature()}
    bits = read(_PI).strip()
    if not bits and shutil.which("vcgencmd"):
        bits = (run("vcgencmd", "get_throttled") or "").partition("=")[2]
    if bits:
        try:
            found["pi_bits"] = int(bits, 16)
        except ValueError:
            pass
    caps = []
    for core in glob.glob(_CPU + "/cpu[0-9]*/cpufreq"):
        now, most = read(core + "/scaling_max_freq"), read(core + "/cpuinfo_max_freq")
        if now.strip().isdigit() and most.strip().isdigit() and int(most) > 0:
            caps.append(int(now) / int(most))
    found["frequency_cap"] = min(caps) if caps else None
    found["governor"] = read(_CPU + "/cpu0/cpufreq/scaling_governor").strip() or None
    return found


def _temperature() -> float | None:
    found = [read(path).strip() for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    return max((int(text) / 1000 for text in found if text.isdigit()), default=None)


def _mac_throttle() -> dict[str, Any]:
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", run("pmset", "-g", "therm") or "")
    return {"speed_limit_percent": int(limit.group(1)) if limit else None}

"""What the facts of one host mean for a run, as findings. Pure: the facts come from `on_host/`.

A finding is one sentence with a severity and a hint, a command where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from smolrun.errors import HostError
from smolrun.launch.machine_memory import default_limit

Facts = Mapping[str, Any]

_GB = 1e9
_NEEDED_DISK = 1 * _GB  # a delivery and a small run
_GOOD_DISK = 5 * _GB  # an environment with the CPU build of torch takes two
_GOOD_MEMORY = 1.5 * _GB  # torch alone takes a third of it
_CLOCK_S = 30.0  # beyond this, the logs of hosts cannot be compared
_HOT_C = 85.0
# Raspberry Pi's firmware: what is so now; 16 bits higher, what has been so since boot.
_PI_BITS = {
    0x1: "its power supply is too weak (under-voltage)",
    0x2: "its firmware caps the clock frequency",
    0x4: "it is throttled",
    0x8: "it is at its soft temperature limit",
}
_PI_POWER = "use the official power supply and a short cable"
_PI_COOL = "give it a fan or a heat sink"


def of_system(system: Facts, memory_gb: float | None) -> Iterator[Finding]:
    """Word size, memory and disk. `memory_gb` is what the cluster file gives to a run."""
    if system["bits"] == 32:
        yield Finding(
            "error",
            f"a 32-bit system ({system['arch']}), for which there is no torch",
            "write a 64-bit system to its disk, as Raspberry Pi OS (64-bit)",
        )
    folder = system["folder"]
    if not folder["is_folder"] or not folder["is_writable"]:
        yield Finding(
            "error",
            f"{folder['found']} cannot be written to, so no workdir {folder['path']}",
            "set `workdir:` of that host to a folder of your user",
        )
    free = folder["free"]
    if free is not None and free < _GOOD_DISK:
        yield Finding(
            "error" if free < _NEEDED_DISK else "warning",
            f"only {free / _GB:.1f} GB free on the disk of {folder['found']}",
            "free some, or set `workdir:` of that host to another disk",
        )
    yield from _of_memory(system["memory_total"], system["memory_available"], memory_gb)


def _of_memory(total: int | None, free: int | None, memory_gb: float | None) -> Iterator[Finding]:
    if total is not None and memory_gb is not None and memory_gb * _GB > total * 1.1:
        yield Finding(
            "warning",
            f"the cluster file gives a run {memory_gb:g} GB, it has {total / _GB:.1f} GB",
            f"write memory_gb: {int(default_limit(total) / 2**30)}",
        )
    if free is not None and free < _GOOD_MEMORY:
        yield Finding(
            "warning", f"only {free / _GB:.1f} GB of memory free", "close what else runs there"
        )


def of_environment(
    found: Facts,
    *,
    needed: Sequence[str],
    smolrun: str | None,
    is_given: bool,
    setup: str,
) -> Iterator[Finding]:
    """What the Python of a run has. `smolrun`: the version it must be, None where we bring it.

    `is_given`: the cluster file names this Python, so what is missing there is the user's to add.
    """
    if "error" in found:
        hint = "set `python:` in the cluster file to one that is there" if is_given else setup
        if found.get("is_missing") and not is_given:
            yield Finding("error", "there is no environment for smolrun there yet", hint)
        else:
            yield Finding("error", found["error"], hint)
        return
    python = tuple(int(part) for part in found["python"].split(".")[:2])
    if python < (3, 11):
        yield Finding(
            "error", f"{found['executable']} is Python {found['python']}, not 3.11", setup
        )
        return
    missing = [name for name in needed if found["packages"].get(name) is None]
    install = f"{found['executable']} -m pip install {' '.join(missing)}"
    if missing:
        what = f"its Python lacks {', '.join(missing)}"
        yield Finding("error", what, install if is_given else setup)
    elif "torch_error" in found:
        yield Finding("error", f"its torch cannot be imported ({found['torch_error']})", setup)
    has = found["packages"].get("smolrun")
    if smolrun is not None and has != smolrun:
        yield Finding(
            "error",
            f"it has smolrun {has}, this machine {smolrun}" if has else "smolrun is not installed",
            f"{found['executable']} -m pip install smolrun=={smolrun}, or cluster.deploy=wheel",
        )


def of_device(found: Facts, gpus: Sequence[Facts], device: str, setup: str) -> Iterator[Finding]:
    """Whether torch can use what it is asked for, and the GPU that the system sees."""
    if "cuda" not in found:
        return  # it has no torch that could be asked
    nvidia = [gpu["name"] for gpu in gpus if gpu["vendor"] == "nvidia"]
    if not found["cuda"] and nvidia:
        build = found["packages"].get("torch")
        reason = (
            f"torch {build} is a CPU build"
            if found["cuda_build"] is None
            else f"torch {build} was built for CUDA {found['cuda_build']}, so the driver may be old"
        )
        hint = f"set `torch: cuda` for that host, then {setup}"
        if found["cuda_build"] is not None:
            hint = "install a newer NVIDIA driver; `nvidia-smi` shows the CUDA it allows"
        severity = "error" if device == "cuda" else "warning"
        what = f"GPU seen ({nvidia[0]}), but this torch cannot use it: {reason}"
        if device != "cpu":
            yield Finding(severity, what, hint)  # type: ignore[arg-type]  # one of two of them
    elif device == "cuda" and not found["cuda"]:
        yield Finding("error", "device: cuda, but it has no NVIDIA GPU", "set `device: auto`")
    if device == "mps" and not found["mps"]:
        yield Finding("error", "device: mps, but its torch has none", "set `device: auto`")


def of_clock(offset_s: float, uncertain_s: float, os: str) -> Iterator[Finding]:
    """`offset_s` > 0: its clock is ahead of the driver's."""
    if abs(offset_s) - uncertain_s < _CLOCK_S:
        return
    commands = {
        "linux": "sudo timedatectl set-ntp true",
        "darwin": "sudo sntp -sS time.apple.com",
        "windows": "w32tm /resync",
    }
    where = "ahead of" if offset_s > 0 else "behind"
    yield Finding(
        "warning",
        f"its clock is {abs(offset_s):,.0f} s {where} this machine's; logs will not line up",
        commands.get(os),
    )


def of_sleep(sleep: Facts, os: str) -> Iterator[Finding]:
    """Whether it suspends when idle. A run holds a wake lock where the system has one."""
    cause, hint = _sleeps(sleep, os)
    if cause is None:
        return
    if sleep.get("can_inhibit"):
        yield Finding("info", f"{cause}; a run keeps it awake", hint)
    else:
        yield Finding("warning", f"{cause}, also in the middle of a run", hint)


def _sleeps(sleep: Facts, os: str) -> tuple[str | None, str | None]:
    if os == "darwin":
        minutes = sleep.get("pmset", {}).get("sleep", 0)
        lid = ", and at once when its lid closes" if sleep.get("has_battery") else ""
        text = f"it sleeps after {minutes} min without use{lid}" if minutes else None
        return text, "sudo pmset -c sleep 0"
    if os == "windows":
        seconds = sleep.get("standby_s") or 0
        text = f"it sleeps after {seconds / 60:.0f} min without use" if seconds else None
        return text, "powercfg /change standby-timeout-ac 0"
    if set(sleep.get("targets", ())) == {"masked"}:
        return None, None
    if sleep.get("desktop") == "suspend" and sleep.get("desktop_s"):
        minutes = sleep["desktop_s"] / 60
        return (
            f"its desktop suspends it after {minutes:.0f} min without use",
            "gsettings set org.gnome.settings-daemon.plugins.power sleep-inactive-ac-type nothing",
        )
    mask = "sudo systemctl mask sleep.target suspend.target"
    if sleep.get("idle_action") in ("suspend", "hibernate", "hybrid-sleep"):
        return "systemd-logind suspends it when it is idle", mask
    if sleep.get("has_battery") and sleep.get("lid") != "ignore":
        return "it sleeps when its lid closes", mask
    return None, None


def of_throttle(throttle: Facts) -> Iterator[Finding]:
    """Whether it throttles itself."""
    bits = throttle.get("pi_bits") or 0
    for bit, what in _PI_BITS.items():
        hint = _PI_POWER if bit == 0x1 else _PI_COOL
        if bits & bit:
            yield Finding("warning", what, hint)
        elif bits & bit << 16:
            yield Finding("info", f"since it was switched on: {what}", hint)
    cap = throttle.get("frequency_cap")
    if cap is not None and cap < 0.95:
        yield Finding("warning", f"its clock frequency is capped at {cap:.0%}", _PI_COOL)
    percent = throttle.get("speed_limit_percent")
    if percent is not None and percent < 100:
        yield Finding("warning", f"macOS slows it to {percent} % because it is hot", "cool it")
    if (heat := throttle.get("temperature_c")) is not None and heat >= _HOT_C:
        yield Finding("warning", f"it is {heat:.0f} degrees Celsius hot", _PI_COOL)
    if throttle.get("governor") == "powersave" and cap is not None:
        yield Finding(
            "info", "its CPU governor is powersave", "sudo cpupower frequency-set -g schedutil"
        )


def of_versions(torches: Mapping[str, str | None]) -> dict[str, list[Finding]]:
    """Hosts whose torch differs from that of most in its first two numbers."""
    minors = {host: ".".join(v.split(".")[:2]) for host, v in torches.items() if v}
    if len(set(minors.values())) < 2:
        return {}
    counts = list(minors.values())
    usual = max(counts, key=counts.count)
    return {
        host: [Finding("warning", f"torch {minor} here, {usual} on others; results may differ")]
        for host, minor in minors.items()
        if minor != usual
    }


Severity = Literal["error", "warning", "info"]
State = Literal["fine", "usable", "cannot run"]

# From the worst severity on.
_STATES: dict[Severity, State] = {"error": "cannot run", "warning": "usable", "info": "fine"}


@dataclass(frozen=True)
class Finding:
    """`error`: no run can use the host. `warning`: it can, with a limitation. `info`: no effect.

    `hint` is what to do, a command where there is one.
    """

    severity: Severity
    what: str
    hint: str | None = None

    @classmethod
    def of(cls, error: HostError) -> Finding:
        """The host did not do what it was asked for."""
        return cls("error", error.what, error.hint)


@dataclass(frozen=True)
class HostStatus:
    """Whether runs can use a host, with its findings, errors first."""

    state: State
    findings: tuple[Finding, ...]

    @property
    def sentence(self) -> str:
        """fine | usable, but ... | cannot run: ..."""
        if self.state == "fine":
            return "fine"
        severity: Severity = "error" if self.state == "cannot run" else "warning"
        reasons = [one.what for one in self.findings if one.severity == severity]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        lead = "cannot run: " if severity == "error" else "usable, but "
        return f"{lead}{reasons[0]}{more}"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "state": self.state,
            "sentence": self.sentence,
            "findings": [asdict(one) for one in self.findings],
        }


def status(findings: Iterable[Finding]) -> HostStatus:
    """The status that follows from these findings; duplicates count once."""
    sorted_ = sorted(dict.fromkeys(findings), key=lambda one: [*_STATES].index(one.severity))
    worst = sorted_[0].severity if sorted_ else "info"
    return HostStatus(_STATES[worst], tuple(sorted_))

"""What each script of `on_host/` may answer: types and ranges. Pure.

A host is trusted with its own part of a run only. Its answers are converted to these types before
anything else reads them; what does not fit is a HostError of that host. Keys that are
not named here are left out.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(max_length=4096)]
AbsolutePath = Annotated[str, Meta(max_length=4096, pattern=r"^(/|[A-Za-z]:/)")]
Version = Annotated[str, Meta(max_length=100, pattern=r"^[0-9]{1,4}\.[0-9]{1,4}([^0-9].*)?$")]
Size = Annotated[int, Meta(ge=0, le=1 << 60)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Amount = Annotated[float, Meta(ge=0, le=1e18)]
Names = Annotated[list[Text], Meta(max_length=100_000)]


class HostProbe(TypedDict):
    os: Text
    cores: Count
    home: AbsolutePath
    executable: AbsolutePath
    workdir: AbsolutePath
    problem: Text | None


class Clock(TypedDict):
    time_s: Annotated[float, Meta(ge=0, le=1e12)]


class Disk(TypedDict):
    free: Size


class DiskError(TypedDict):
    os_error: Text
    path: Text


class Nothing(TypedDict):
    pass


class StoreLook(TypedDict):
    missing: Names
    incoming: Text
    free: Size


class TreeLook(TypedDict):
    changed: Names
    incoming: Text
    free: Size


class Finished(TypedDict):
    wrong: Names


class Cleared(TypedDict):
    left: bool


class Gpu(TypedDict):
    vendor: Text
    name: Text


class Folder(TypedDict):
    path: Text
    found: Text
    free: Size | None
    is_folder: bool
    is_writable: bool


class Python(TypedDict):
    path: Text
    version: Text


class System(TypedDict):
    user: Text | None
    hostname: Text
    os: Text
    system: Text
    arch: Text
    bits: int
    model: Text | None
    cpu: Text | None
    cores: Count | None
    usable_cores: Count | None
    memory_total: Size | None
    memory_available: Size | None
    python: Python
    gpus: Annotated[list[Gpu], Meta(max_length=64)]
    jetson: bool
    folder: Folder


class InterfaceAnswer(TypedDict):
    name: Text
    kind: Text
    speed_mbps: Amount | None
    addresses: Annotated[list[Text], Meta(max_length=4096)]


class Network(TypedDict):
    interfaces: Annotated[list[InterfaceAnswer], Meta(max_length=4096)]


class Sleep(TypedDict, total=False):
    has_battery: bool
    targets: Names
    idle_action: Text
    lid: Text
    desktop: Text
    desktop_s: Size | None
    pmset: dict[Text, Size]
    standby_s: Size | None
    can_inhibit: bool


class Throttle(TypedDict, total=False):
    temperature_c: Annotated[float, Meta(ge=-300, le=10_000)] | None
    pi_bits: Size
    frequency_cap: Amount | None
    governor: Text | None
    speed_limit_percent: Size | None


class Power(TypedDict):
    sleep: Sleep
    throttle: Throttle


class Firewall(TypedDict):
    kind: Text | None
    is_on: bool | None


class Score(TypedDict):
    flops: Amount
    memory_bytes_per_s: Amount
    device: Text


class NoEnvironment(TypedDict):
    error: Text
    is_missing: NotRequired[bool]


class Environment(TypedDict):
    python: Version
    executable: Text
    packages: dict[Text, Text | None]
    torch_error: NotRequired[Text]


class WithTorch(Environment):
    cuda: bool
    cuda_build: Text | None
    cuda_names: NotRequired[Names]
    mps: bool
    score: NotRequired[Score]


class Dialed(TypedDict):
    address: Text
    error: Text | None
    port: NotRequired[Annotated[int, Meta(ge=1, le=65535)]]
    local: NotRequired[Text]


class Reach(TypedDict):
    port: Annotated[int, Meta(ge=1, le=65535)] | None
    heard: list[list[Text]]
    dialed: dict[Text, list[Dialed]]


# By script, and by what it was asked to do where that makes a difference; the first that fits.
_KINDS: dict[str, tuple[Any, ...]] = {
    "host_probe": (HostProbe,),
    "clock": (Clock,),
    "system": (System,),
    "network": (Network,),
    "power": (Power,),
    "firewall": (Firewall,),
    "environment": (NoEnvironment, WithTorch, Environment),
    "reach": (Reach,),
    "store look": (DiskError, StoreLook),
    "store finish": (DiskError, Finished),
    "store free": (DiskError, Disk),
    "store drop": (DiskError, Nothing),
    "tree look": (DiskError, TreeLook),
    "tree finish": (DiskError, Finished),
    "tree drop": (DiskError, Nothing),
    "run_folder remove": (Nothing,),
    "run_folder clear": (Cleared,),
}


def checked(script: str, do: str | None, answer: Any) -> dict[str, Any]:
    """The answer of a script that was asked to `do`, as one of its types; ValidationError, of the
    last of them, if none fits."""
    kinds = _KINDS.get(f"{script} {do}" if do else script, (dict[str, Any],))
    for kind in kinds[:-1]:
        try:
            return dict(msgspec.convert(answer, kind))
        except msgspec.ValidationError:
            continue
    return dict(msgspec.convert(answer, kinds[-1]))

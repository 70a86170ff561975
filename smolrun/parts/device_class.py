"""Which ranks compute alike, down to the last bit.

The same update by another operating system, processor, build of torch or device may end in other
last bits: compilers and vector units fuse and order operations as they like. Within one class the
bits are equal.
"""

from __future__ import annotations

import platform

import torch

from smolrun.collectives.api import Collectives

_TEXT_BYTES = 160


def device_class(device: torch.device) -> str:
    """Such as "Linux x86_64, torch 2.13.0+cpu, cpu AVX2"."""
    unit = ""
    if device.type == "cpu":
        unit = torch.backends.cpu.get_cpu_capability()
    elif device.type == "cuda":
        unit = torch.cuda.get_device_name(device)
    machine = f"{platform.system()} {platform.machine()}"
    return f"{machine}, torch {torch.__version__}, {device.type} {unit}".strip()


def gather_classes(collectives: Collectives, own: str) -> list[str]:
    """The classes of all ranks, in rank order; collective."""
    table = torch.zeros((collectives.size, _TEXT_BYTES), dtype=torch.uint8)
    text = own.encode("ascii", "replace")[:_TEXT_BYTES].ljust(_TEXT_BYTES)
    collectives.all_gather(table, torch.tensor(list(text), dtype=torch.uint8))
    return [bytes(row.tolist()).decode("ascii", "replace").rstrip() for row in table]

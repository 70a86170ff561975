"""A worker that runs out of memory: told from other errors, and put into one sentence.

Every library has its own error for it. Knows no torch: it looks at names and texts, so that nothing
has to be imported when there is no memory left.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from typing import Any

import psutil

from smolrun.launch.machine_memory import machine_memory

_GB = 2**30
_TYPES = frozenset({"MemoryError", "OutOfMemoryError", "_ArrayMemoryError"})
_TEXTS = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # torch's allocator on the CPU
    "not enough memory",  # the same on Windows
    "alloc_failed",  # cuBLAS, cuDNN
    "bad_alloc",
    "cannot allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error means that memory, of the machine or of a device, is full."""
    if any(kind.__name__ in _TYPES for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


def told(error: BaseException) -> str:
    """What the error says of it, and how much memory is used and there."""
    figures = [f"{gb(psutil.Process().memory_info().rss)} used by this rank"]
    memory = machine_memory()
    figures.append(f"{gb(memory.available)} of {gb(memory.total)} free on its host")
    figures += _device()
    return f"{_words(error)} ({', '.join(figures)})"


def ended_by_linux(used: int | None, total: int) -> str:
    """What happened to a process that Linux killed."""
    had = f"it had {gb(used)} " if used else ""
    return f"Linux ended it because memory was full ({had}of {gb(total)} there)"


def gb(size: float) -> str:
    """As people say it: 15.6 GB."""
    return f"{size / _GB:.1f} GB" if size >= 0.95 * _GB else f"{size / 2**20:.0f} MB"


def _words(error: BaseException) -> str:
    """The sentence that says it, and the next one, which tells how much was asked for."""
    sentences = re.split(r"(?<=\.)\s+", str(error).strip()) if str(error).strip() else []
    says = [any(text in sentence.lower() for text in _TEXTS) for sentence in sentences]
    first = says.index(True) if any(says) else 0
    return " ".join(sentences[first : first + 2]).rstrip(".") or type(error).__name__


def _device() -> list[str]:
    """Of a CUDA device, if this process uses one."""
    torch: Any = sys.modules.get("torch")
    with contextlib.suppress(Exception):  # a device in trouble may answer nothing any more
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            return [f"{gb(free)} of {gb(total)} free on its GPU"]
    return []

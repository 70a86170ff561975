"""On the host: what a run wrote there, taken away when it was fetched or the run is over."""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

_ENDS_S = 3.0  # a worker without its driver ends within a second or two


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`do`: remove (files of a folder, and it if that was all) or clear (the run's folder)."""
    return {"remove": remove, "clear": clear}[request["do"]](request)


def remove(request: dict[str, Any]) -> dict[str, Any]:
    """Delete the files `names` of `folder`; what is gone already is no problem."""
    for name in request["names"]:
        try:
            os.unlink(os.path.join(request["folder"], name))
        except OSError:
            pass
    try:
        os.rmdir(request["folder"])
    except OSError:  # others still write into it
        pass
    return {}


def clear(request: dict[str, Any]) -> dict[str, Any]:
    """Delete `folder`; `left` says whether something of it could not be deleted. A worker that is
    just ending may still write into it, so that is tried for some seconds."""
    folder = request["folder"]
    if os.path.islink(folder):
        os.unlink(folder)
    give_up = time.monotonic() + _ENDS_S
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder) or time.monotonic() > give_up:
            break
        time.sleep(0.1)
    return {"left": os.path.lexists(folder)}

"""On the host: how much room the disk of a folder has."""

from __future__ import annotations

import os
import shutil
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`free` bytes for `folder`, or where it would be made; null where the system cannot tell."""
    folder = os.path.abspath(request["folder"])
    while not os.path.isdir(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    try:
        return {"free": shutil.disk_usage(folder).free}
    except OSError:
        return {"free": None}

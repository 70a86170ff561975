"""Runs on a host: what time it is there. Nothing else, so that the answer comes at once."""

from __future__ import annotations

import time
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`time_s`: seconds since 1970 by the clock of this machine."""
    return {"time_s": time.time()}

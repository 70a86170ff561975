"""A job of a sweep that trains nothing: its learning rate decides how it ends.

Takes the order and the stop requests of `smolrun --job`, and leaves a summary.json.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

FAILS, HAS_NO_LOSS, RUNS_ON, SLOW = 7.0, 8.0, 9.0, 6.0


def main() -> int:
    order = json.loads(sys.stdin.buffer.readline())
    folder, lr = Path(order["folder"]), order["config"]["optimizer"]["lr"]
    began = time.time()
    loss = (math.log10(lr) + 2) ** 2
    if lr == FAILS:
        print("smolrun: the disk is full", file=sys.stderr)
        return 3
    if lr == HAS_NO_LOSS:
        return end(folder, 0, status="done", final_eval_loss=None, diverged=True)
    if lr == RUNS_ON:
        (folder / "pid").write_text(str(os.getpid()))
        sys.stdin.buffer.readline()  # a stop request, or the end of whoever could send one
        return end(folder, 130, status="stopped", final_eval_loss=loss)
    time.sleep(1.0 if lr >= SLOW else 0.0)
    figures = {"began": began, "ended": time.time(), "group": order["config"]["tracker"]}
    return end(folder, 0, status="done", final_eval_loss=loss, wall_s=1.0, **figures)


def end(folder: Path, code: int, **summary: Any) -> int:
    """Write the summary and give back the exit code."""
    (folder / "summary.json").write_text(json.dumps({"reason": None, **summary}))
    return code


if __name__ == "__main__":
    sys.exit(main())

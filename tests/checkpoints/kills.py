"""Kills a process that saves, at chosen lines of its code, and judges what is left each time.

A program of its own, because it forks: `kills.py FOLDER new|same EVERY` saves step 2 (or step 1
again) beside a whole step 1, in children that die by SIGKILL before the EVERY-th, 2 * EVERY-th...
line of smolrun/checkpoints and shutil that they run, until a child comes to its end. Prints one
JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import smolrun.checkpoints
from smolrun.checkpoints.find import newest_valid, verify
from smolrun.checkpoints.folder import prune, remove_leftovers
from tests.checkpoints.saves import save, tag_of

# Removing a folder takes many steps, too.
OURS = (str(Path(smolrun.checkpoints.__file__).parent), shutil.__file__)


def die_at(line: int) -> None:
    """This process kills itself before the `line`-th line that saves."""
    left = line

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    sys.settrace(count)


def ended(checkpoints: Path, step: int, line: int) -> bool:
    """Saves and prunes in a child that dies at `line`; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        os.fsync = lambda handle: None  # a dead process loses nothing that it wrote
        die_at(line)
        save(checkpoints, step, tag=2)
        prune(checkpoints, keep=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


def judge(checkpoints: Path, step: int) -> int:
    """Which save a resume would find; it must be found by those who clean up first, too."""

    def warn(text: str) -> None:
        raise AssertionError(text)  # nothing that looks like a checkpoint may be damaged

    found = newest_valid(checkpoints, warn)
    assert found is not None
    tag = tag_of(found)
    remove_leftovers(checkpoints)
    again = newest_valid(checkpoints, warn)
    assert again is not None
    assert tag_of(again) == tag
    for path in checkpoints.iterdir():  # no leftover, and no half-removed checkpoint
        assert path.name[5:].isdigit()
        verify(path)
    save(checkpoints, step, tag=3)  # and the next save works
    assert tag_of(checkpoints / f"step-{step:08d}") == 3
    return tag


def main(folder: Path, mode: str, every: int) -> None:
    step = 2 if mode == "new" else 1
    found = []
    line = 0
    is_ended = False
    while not is_ended:
        line += every
        checkpoints = folder / str(line) / "checkpoints"
        save(checkpoints, 1, tag=1)
        is_ended = ended(checkpoints, step, line)
        found.append(judge(checkpoints, step))
        shutil.rmtree(checkpoints)
    print(json.dumps({"kills": len(found) - 1, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

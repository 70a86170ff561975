"""On the host: which of these Pythons is there, and which libraries it has.

Nothing is imported to find out: torch takes seconds on a small machine.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

_ASK = """
import json, platform, sys
from importlib import metadata
if sys.argv[1]:
    sys.path.insert(0, sys.argv[1])
found = {"python": platform.python_version()}
for name in sys.argv[2:]:
    try:
        found[name] = metadata.version(name)
    except Exception:
        found[name] = None
print("\\nversions=" + json.dumps(found))
"""


def main(request: dict[str, Any]) -> dict[str, Any]:
    """The first of `pythons` that is there, and its versions of `libraries`, `path` first."""
    for python in request["pythons"]:
        program = os.path.expanduser(python)
        if os.path.isfile(program):
            return {"python": program.replace("\\", "/"), **_ask(program, request)}
    return {"python": None}


def _ask(program: str, request: dict[str, Any]) -> dict[str, Any]:
    command = [program, "-I", "-c", _ASK, request["path"], *request["libraries"]]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=request["timeout_s"],
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"gave no answer within {request['timeout_s']:g} s"}
    except OSError as error:
        return {"problem": error.strerror or str(error)}
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith("versions="):
            return {"versions": json.loads(line[len("versions=") :])}
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return {"problem": said[-1][:2000] if said else f"ended with code {done.returncode}"}

"""Runs on a host: the versions the Python of a run has, and whether its torch can use the GPU.

torch is only imported on request, by that Python, in a process of its own with a deadline:
importing may take long, crash, or load a GPU driver. Only the standard library, Python >= 3.8.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

# `request` of the inner program, one JSON object in argv: nothing in it is secret.
_INNER = r"""
import json, platform, sys, time
request = json.loads(sys.argv[1])
out = {"python": platform.python_version(), "packages": {}}
from importlib import metadata
for name in request["packages"]:
    try:
        out["packages"][name] = metadata.version(name)
    except Exception:  # not there, or its metadata is damaged
        out["packages"][name] = None
def best(work, wait, seconds):
    # The shortest turn: others who use the machine just now only make turns longer.
    work(); wait()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        work(); wait()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest
def score(torch, device):
    # Matrix products and moving memory are what a step is made of.
    wait = (lambda: None) if device == "cpu" else getattr(torch, device).synchronize
    size = 768 if device == "cpu" else 2048
    a, b = torch.rand(size, size, device=device), torch.rand(8 << 20, device=device)
    c = b.clone()
    products = 2 * size ** 3 / best(lambda: a @ a, wait, 0.5)
    moved = 2 * b.numel() * 4 / best(lambda: c.copy_(b), wait, 0.3)
    return {"flops": products, "memory_bytes_per_s": moved, "device": device}
if request["torch"]:
    try:
        import torch
        out["packages"]["torch"] = str(torch.__version__)
        out["cuda"] = torch.cuda.is_available()
        out["cuda_build"] = torch.version.cuda
        if out["cuda"]:
            count = torch.cuda.device_count()
            out["cuda_names"] = [torch.cuda.get_device_name(i) for i in range(count)]
        out["mps"] = bool(torch.backends.mps.is_available())
        device = request["device"]
        if device == "auto":
            device = "cuda" if out["cuda"] else "mps" if out["mps"] else "cpu"
        if request["measure"] and (device == "cpu" or out.get(device)):
            out["score"] = score(torch, device)
    except BaseException as error:
        out["torch_error"] = ("%s: %s" % (type(error).__name__, error))[:2000]
print("smolrun-environment " + json.dumps(out))
"""


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Asks the first of `pythons` that is there; `error` says why that failed.

    `packages`: names whose versions are wanted; `torch`: import it; `device`, `measure`: how fast
    it is there; `path`: PYTHONPATH; `env`: more variables; `timeout_s`.
    """
    inner = {name: request[name] for name in ("packages", "torch", "device", "measure")}
    environment = dict(os.environ, **request["env"])
    if request["path"]:
        environment["PYTHONPATH"] = request["path"]
    pythons = [os.path.expanduser(python) for python in request["pythons"]]
    there = [python.replace("\\", "/") for python in pythons if os.path.isfile(python)]
    if not there:
        return {"error": "{} is not there".format(request["pythons"][0]), "is_missing": True}
    # Not the folder we are in: a file there could hide a library.
    command = [there[0], "-c", "import sys; sys.path.pop(0)\n" + _INNER, json.dumps(inner)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=request["timeout_s"],
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": "{} gave no answer in {:g} s".format(there[0], request["timeout_s"])}
    except OSError as error:
        return {"error": f"{there[0]} cannot be run: {error.strerror or error}"}
    for line in reversed(done.stdout.decode("utf-8", "replace").splitlines()):
        if line.startswith("smolrun-environment "):
            return {"executable": there[0], **json.loads(line.partition(" ")[2])}
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
    return {"error": f"{there[0]} ended with {done.returncode}: {said[0][:2000]}"}

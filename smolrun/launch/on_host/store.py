"""On the host: a folder of folders, each under a name that stands for its content.

    <root>/<key>/...               what was delivered
    <root>/<key>.json              when each file was last found good; its own time: the last use
    <root>/.incoming-<random>/     on its way; left by a dead driver, it goes after a day

A listing is {name: [bytes, sha256]}. Nothing gets its place before every hash was compared.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from typing import Any

from smolrun.launch.on_host.prelude import DAY_S, act, age_s, drop, nearest_folder, sha256, sweep

_DEAD_RUN_S = 14 * DAY_S


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`do`: look (what is missing?), finish (check and place what came), drop (forget it) or free
    (how much room the disk of `root` has)."""
    return act(request, {"look": look, "finish": finish, "drop": drop, "free": free})


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Which keys are missing or damaged, where to put them, and how much room there is."""
    root, wanted = request["root"], request["wanted"]
    os.makedirs(root, exist_ok=True)
    sweep(root, ".incoming-", ".mark-")
    _note_use(request)
    thorough = request.get("thorough", False)
    missing = [key for key, listing in wanted.items() if not _is_good(root, key, listing, thorough)]
    incoming = ""
    if missing:
        incoming = tempfile.mkdtemp(prefix=".incoming-", dir=root)
        for key in missing:
            os.mkdir(os.path.join(incoming, key))
    return {"missing": missing, "incoming": incoming.replace("\\", "/"), **free(request)}


def free(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes free on the disk of `root`, or where it would be made."""
    return {"free": shutil.disk_usage(nearest_folder(request["root"])).free}


def finish(request: dict[str, Any]) -> dict[str, Any]:
    """Check what came and give it its place; `archive` is the one zip file that holds it all."""
    root, incoming = request["root"], request["incoming"]
    for key, listing in request["wanted"].items():
        folder = os.path.join(incoming, key)
        if request.get("archive"):
            with zipfile.ZipFile(os.path.join(incoming, request["archive"])) as archive:
                archive.extractall(folder)
        wrong = [
            name for name, [size, digest] in listing.items() if _hash(folder, name, size) != digest
        ]
        if wrong:
            shutil.rmtree(incoming, ignore_errors=True)
            return {"wrong": wrong}
        if not request.get("archive"):
            for name in listing:
                _sync(os.path.join(folder, name))
        _place(root, key, folder, listing)
    shutil.rmtree(incoming, ignore_errors=True)
    _prune(request)
    return {"wrong": []}


def _is_good(root: str, key: str, listing: dict[str, Any], thorough: bool = False) -> bool:
    """Whether a key is there, whole. Unless `thorough`, a file that has not changed since it was
    found good is not read again: a model has gigabytes."""
    folder, mark = os.path.join(root, key), {} if thorough else _read_mark(root, key)
    if not os.path.isdir(folder):
        return False
    for name, (size, digest) in listing.items():
        if _state(folder, name) == mark.get(name) and mark.get(name, [None])[0] == size:
            continue
        if _hash(folder, name, size) != digest:
            return False
    _write_mark(root, key, listing)
    return True


def _hash(folder: str, name: str, size: int) -> str:
    """sha256 of a plain file of that size; empty for anything else."""
    path = os.path.join(folder, name)
    return sha256(path) if os.path.isfile(path) and os.path.getsize(path) == size else ""


def _state(folder: str, name: str) -> list[Any]:
    """Size and time of change: differs when the file was written to."""
    try:
        found = os.lstat(os.path.join(folder, name))
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _read_mark(root: str, key: str) -> dict[str, Any]:
    try:
        with open(os.path.join(root, key + ".json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_mark(root: str, key: str, listing: dict[str, Any]) -> None:
    path = os.path.join(root, key + ".json")
    handle, part = tempfile.mkstemp(prefix=".mark-", dir=root)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({name: _state(os.path.join(root, key), name) for name in listing}, file)
    os.replace(part, path)


def _place(root: str, key: str, folder: str, listing: dict[str, Any]) -> None:
    """By one rename; the first one with the same content stays."""
    target = os.path.join(root, key)
    for _ in range(10):  # others may be doing the same
        try:
            os.rename(folder, target)
            break
        except OSError:
            if _is_good(root, key, listing, thorough=True):
                return
            if not os.path.lexists(target):
                continue
            _remove(root, key)
    else:
        raise OSError(f"{target} cannot be replaced: another process keeps changing it")
    _write_mark(root, key, listing)


def _remove(root: str, key: str) -> None:
    """Renamed first, so that no reader finds half of it."""
    doomed = tempfile.mkdtemp(prefix=".incoming-", dir=root)
    try:
        os.rename(os.path.join(root, key), os.path.join(doomed, key))
    except OSError:  # another process was faster, or Windows has a file of it open
        pass
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: str) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sweep_runs(runs: str) -> None:
    """What a run left whose driver died: nothing was written there for long."""
    for name in os.listdir(runs) if os.path.isdir(runs) else []:
        run = os.path.join(runs, name)
        if min(age_s(run), age_s(os.path.join(run, "checkpoints"))) > _DEAD_RUN_S:
            shutil.rmtree(run, ignore_errors=True)


def _note_use(request: dict[str, Any]) -> None:
    """A run's folder says what it uses, so that none of it goes while the run lives."""
    if request.get("run"):
        _sweep_runs(os.path.dirname(request["run"]))
        os.makedirs(request["run"], exist_ok=True)
        name = "uses-" + os.path.basename(request["root"])
        with open(os.path.join(request["run"], name), "a", encoding="utf-8") as file:
            file.write("".join(key + "\n" for key in request["wanted"]))


def _prune(request: dict[str, Any]) -> None:
    """All but the `keep` that were used last; none that a run uses, or that was used lately."""
    if "keep" not in request:
        return
    root = request["root"]
    used = _used(os.path.join(os.path.dirname(root), "runs"), "uses-" + os.path.basename(root))
    there = [name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name))]
    keys = [name for name in there if not name.startswith(".")]
    ages = {key: age_s(os.path.join(root, key + ".json")) for key in keys}
    for key in sorted(keys, key=lambda key: ages[key])[request["keep"] :]:
        if key not in used and ages[key] > request["younger_s"]:
            _remove(root, key)
            if os.path.exists(os.path.join(root, key + ".json")):
                os.unlink(os.path.join(root, key + ".json"))


def _used(runs: str, name: str) -> set[str]:
    """What the runs of this host say they use."""
    used = set()
    for run in os.listdir(runs) if os.path.isdir(runs) else []:
        path = os.path.join(runs, run, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                used.update(file.read().split())
    return used

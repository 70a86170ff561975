"""On the host: one readable folder of code that follows the driver's (deploy=rsync).

Only files that differ travel, in one archive. Code that the driver does not have is deleted, also
what the user put there: the folder is smolrun's. Other files, and all outside it, stay.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from typing import Any

from smolrun.launch.on_host.prelude import act, drop, sha256, sweep

_CODE = (".py", ".yaml", "METADATA")


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`do`: look (which files differ?), finish (unpack what came, delete the rest) or drop."""
    return act(request, {"look": look, "finish": finish, "drop": drop})


def look(request: dict[str, Any]) -> dict[str, Any]:
    """The names that differ, and a folder next to the tree to put the archive into."""
    root, listing = request["root"], request["listing"]
    os.makedirs(root, exist_ok=True)
    sweep(os.path.dirname(root), ".tree-")
    changed = [
        name for name in sorted(listing) if sha256(os.path.join(root, name)) != listing[name][1]
    ]
    stray = bool(_stray(root, listing))
    incoming = (
        tempfile.mkdtemp(prefix=".tree-", dir=os.path.dirname(root)) if changed or stray else ""
    )
    free = shutil.disk_usage(root).free
    return {"changed": changed, "incoming": incoming.replace("\\", "/"), "free": free}


def finish(request: dict[str, Any]) -> dict[str, Any]:
    """All files of the archive are checked before the first one gets its place."""
    root, listing, incoming = request["root"], request["listing"], request["incoming"]
    try:
        new = os.path.join(incoming, "new")
        if request["changed"]:
            with zipfile.ZipFile(os.path.join(incoming, request["archive"])) as archive:
                archive.extractall(new)
        wrong = [
            name
            for name in request["changed"]
            if sha256(os.path.join(new, name)) != listing[name][1]
        ]
        if wrong:
            return {"wrong": wrong}
        for path in _stray(root, listing):
            os.unlink(path)
        for name in request["changed"]:
            target = os.path.join(root, name)
            _make_room(root, name)
            os.replace(os.path.join(new, name), target)
        _remove_empty(root)
        return {"wrong": []}
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _stray(root: str, listing: dict[str, Any]) -> list[Any]:
    """Code that the driver does not have; links to folders are not followed."""
    found = []
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in files:
            path = os.path.join(place, name)
            known = os.path.relpath(path, root).replace("\\", "/") in listing
            if name.endswith(_CODE) and not known:
                found.append(path)
    return found


def _make_room(root: str, name: str) -> None:
    """The folders above a file; what lies in their place, or links out of the tree, goes."""
    path = root
    for part in name.split("/")[:-1]:
        path = os.path.join(path, part)
        if os.path.islink(path) or os.path.isfile(path):
            os.unlink(path)
        os.makedirs(path, exist_ok=True)
    target = os.path.join(root, name)
    if os.path.isdir(target) and not os.path.islink(target):
        shutil.rmtree(target)


def _remove_empty(root: str) -> None:
    """Folders that hold nothing but compiled files."""
    for place, _, _ in os.walk(root, topdown=False):
        is_ours = place != root and os.path.basename(place) != "__pycache__"
        if is_ours and set(os.listdir(place)) <= {"__pycache__"}:
            shutil.rmtree(place, ignore_errors=True)

"""The living drivers of this account, wherever their run folders are, and which files they use.

    cache/drivers/<run_id>.json     the run's folder, and paths

Deleted when the driver ends; that of one that was killed, by the next driver.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import platformdirs

from smolrun.files import atomic_write, read_bytes
from smolrun.tracking.past_runs import state_of
from smolrun.tracking.run_folder import RunFolder

_MAX_BYTES = 1 << 20


class LivingDriver(msgspec.Struct, frozen=True):
    """The folder of its run, and what it uses: these files and all below these folders; None: it
    may use all caches."""

    folder: str
    uses: list[str] | None = None

    def needs(self, path: Path) -> bool:
        """Whether it uses this file or anything in this folder."""
        used = [Path(one) for one in self.uses or ()]
        return any(one.is_relative_to(path) or path.is_relative_to(one) for one in used)


def note_driver(folder: RunFolder, uses: Sequence[Path] | None = None) -> None:
    """This process drives the run until it ends."""
    file = _files() / f"{folder.run_id}.json"
    paths = None if uses is None else [str(path.resolve()) for path in uses]
    living_drivers()  # deletes what others have left
    with contextlib.suppress(OSError):  # a run does not need it
        file.parent.mkdir(parents=True, exist_ok=True)
        driver = LivingDriver(str(folder.path.resolve()), paths)
        atomic_write(file, msgspec.json.encode(driver))
        atexit.register(_forget, file)


def living_drivers() -> list[LivingDriver]:
    """All that live now."""
    found = []
    for file in sorted(_files().glob("*.json")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            driver = msgspec.json.decode(read_bytes(file, _MAX_BYTES), type=LivingDriver)
            if state_of(RunFolder(Path(driver.folder))) in ("running", "serving", "elsewhere"):
                found.append(driver)
            else:
                file.unlink()
    return found


def _files() -> Path:
    return platformdirs.user_cache_path("smolrun") / "drivers"


def _forget(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()

"""Prepared data kept between runs: one folder per (inputs, settings), complete or not there at all.

An entry is made in a folder of its own and renamed into place, so two runs that prepare the same
data at once both end with a complete entry, in either order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from smolrun.errors import DataError
from smolrun.files import file_hash

DATA_FILE = "data.safetensors"
_FACTS_FILE = "facts.json"
# Part of every key. Raise it when entries change their meaning: old ones are then not found.
_FORMAT = 1


def cache_folder(name: str) -> Path:
    """A folder of this user's cache, made if it is not there; DataError where that cannot be."""
    folder = platformdirs.user_cache_path("smolrun") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache folder {folder} cannot be made: {error.strerror} ({error.filename}); "
            "set XDG_CACHE_HOME or HOME to a folder that you can write"
        ) from None
    return folder


@dataclass(frozen=True)
class Entry:
    """A complete entry: its folder, the hash of each file, and what its maker wants to remember."""

    folder: Path
    hashes: dict[str, str]
    facts: dict[str, Any]

    @property
    def data_path(self) -> Path:
        return self.folder / DATA_FILE

    @property
    def sha256(self) -> str:
        """Of the data file."""
        return self.hashes[DATA_FILE]


def cached(
    cache_dir: Path, name: str, key: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
) -> Entry:
    """The entry for `key`; where there is none, or a damaged one, `make(folder)` fills a new one.

    `make` writes DATA_FILE into the folder and returns facts (JSON) to keep. Raises DataError if
    the cache folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()
    folder = cache_dir / f"{name}-{digest[:16]}"
    entry = _read(folder)
    if entry is not None:
        return entry
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_dir))
    except OSError as error:
        raise DataError(f"cannot write to the cache folder {cache_dir}: {error}") from None
    try:
        made = workshop / "entry"
        made.mkdir()
        facts = dict(make(made))
        hashes = {path.name: file_hash(path) for path in sorted(made.iterdir())}
        kept = json.dumps({"hashes": hashes, "facts": facts}, indent=1)
        (made / _FACTS_FILE).write_text(kept)
        _publish(workshop, folder)
    except OSError as error:
        raise DataError(f"cannot keep prepared data in {cache_dir}: {error}") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return Entry(folder, hashes, facts)


def _publish(workshop: Path, folder: Path) -> None:
    """Renames the new entry into place; another run's entry stays, a damaged one goes."""
    try:
        os.rename(workshop / "entry", folder)
    except OSError:
        if _read(folder) is None:
            os.rename(folder, workshop / "damaged")
            os.rename(workshop / "entry", folder)


def _read(folder: Path) -> Entry | None:
    """The entry in a folder, or None if there is none or a file is not what was written."""
    try:
        kept = json.loads((folder / _FACTS_FILE).read_text())
        entry = Entry(folder, kept["hashes"], kept["facts"])
        is_whole = all(file_hash(folder / name) == hash_ for name, hash_ in entry.hashes.items())
        return entry if is_whole and DATA_FILE in entry.hashes else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None

"""The code of a run as one archive: the same bytes for the same files, and a hash that names it.

    lib/smolrun/...                      our package, first on the worker's path
    lib/smolrun-0.1.0.dist-info/METADATA  so that it knows its own version
    own/...                              the user's modules: the worker's current folder

Two folders, as the user's modules come last on the path, where they hide no library.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from smolrun.errors import ConfigError

LIB, OWN = "lib", "own"
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip file knows
_NOTE = (
    b"The user's own modules, as they were where the run was started. smolrun owns this folder.\n"
)


@dataclass(frozen=True)
class CodeArchive:
    """`files` by name, `digest` of their names and contents (hex), `own` the user's among them."""

    files: Mapping[str, bytes]
    digest: str

    @property
    def listing(self) -> dict[str, tuple[int, str]]:
        """Size and sha256 of every file."""
        return {
            name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in self.files.items()
        }

    @property
    def own(self) -> list[str]:
        """The user's own files, by their names in the user's folder."""
        prefix = f"{OWN}/"
        return [name[len(prefix) :] for name in self.files if name.startswith(prefix)][1:]

    def own_only(self) -> CodeArchive:
        """The user's own files alone."""
        files = {name: data for name, data in self.files.items() if name.startswith(f"{OWN}/")}
        return CodeArchive(files, _digest(files))

    def pack(self, names: Iterable[str] | None = None) -> bytes:
        """A zip file of these files, or of all."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self.files if names is None else names):
                entry = zipfile.ZipInfo(name, _TIME)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.create_system = 3  # Unix, also where this is made on Windows
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, self.files[name])
        return buffer.getvalue()


def code_archive(folder: Path, targets: Iterable[str]) -> CodeArchive:
    """Our package and what `targets` (model.target and the like) need of the user's `folder`."""
    number = version("smolrun")
    metadata = f"Metadata-Version: 2.1\nName: smolrun\nVersion: {number}\n"
    files = {
        **{f"{LIB}/{name}": path.read_bytes() for name, path in package_files().items()},
        f"{LIB}/smolrun-{number}.dist-info/METADATA": metadata.encode(),
        f"{OWN}/.smolrun": _NOTE,
        **{
            f"{OWN}/{name}": path.read_bytes()
            for name, path in own_modules(folder, targets).items()
        },
    }
    return CodeArchive(dict(sorted(files.items())), _digest(files))


def _digest(files: Mapping[str, bytes]) -> str:
    """Of what is in the files, not of the archive, which depends on the machine's zlib."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\n{hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()


# In a checkout these lie beside the package and not in it.
_PACKAGES = ("smolrun", "smolrun.tasks", "smolrun.conf")
# Modules, and what they read.
_OWN_SUFFIXES = (".py", ".yaml", ".css", ".html", ".js", ".svg", ".png", ".webmanifest")
_SOURCES = "ui/web/"  # of pages, which are built in the checkout alone
_SKIPPED = frozenset({"__pycache__", "node_modules"})
_MOST_BYTES = 20_000_000


def package_files() -> dict[str, Path]:
    """Our own files, by their names as installed: the same from a checkout and from a wheel."""
    files = {}
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in _walk(Path(folder), _OWN_SUFFIXES):
                name = file.relative_to(folder).as_posix()
                if name.startswith(_SOURCES):
                    continue
                files[f"{package.replace('.', '/')}/{name}"] = file
    return files


def own_modules(folder: Path, targets: Iterable[str]) -> dict[str, Path]:
    """The user's files below `folder` that `targets` (module:name) need, by their names there.

    Python files only. ConfigError names the largest if they are too many to be code.
    """
    wanted = [target.partition(":")[0].partition(".")[0] for target in targets]
    seen = {"smolrun"}
    files: dict[str, Path] = {}
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        for file in _module(folder, name):
            files[file.relative_to(folder).as_posix()] = file
            wanted += _imported(file)
        _check_size(files)
    return files


def _module(folder: Path, name: str) -> list[Path]:
    """All files of a top-level module, if `import NAME` would find it in this folder."""
    package, module = folder / name, folder / f"{name}.py"
    if _is_elsewhere(name, (package, package / "__init__.py", module)):
        return []
    # As Python does: a package, then a module, then a folder without __init__.py.
    if module.is_file() and not (package / "__init__.py").is_file():
        return [module]
    return list(_walk(package, (".py",))) if package.is_dir() else []


def _is_elsewhere(name: str, here: tuple[Path, ...]) -> bool:
    """Whether an installed library has that name: the user's folder is the last to be looked at."""
    if name in sys.stdlib_module_names:
        return True
    try:
        spec = find_spec(name)
    except ValueError:  # a module of this very process that came from no file, such as __main__
        return False
    if spec is None:
        return False
    places = [spec.origin, *(spec.submodule_search_locations or ())]
    found = {Path(place).resolve() for place in places if place}
    return found.isdisjoint(path.resolve() for path in here)


def _imported(file: Path) -> Iterator[str]:
    """Top-level names that a file imports, wherever in it; those of import_module too."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # importing it raises there
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and (name := _called(node)):
            yield name.partition(".")[0]


def _called(node: ast.Call) -> str | None:
    """What `import_module("name")` or `__import__("name")` names."""
    function = getattr(node.func, "attr", getattr(node.func, "id", None))
    first = node.args[0] if node.args else None
    is_import = function in ("import_module", "__import__")
    if is_import and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return None


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files of these kinds, without caches, hidden folders and venvs; links are followed once."""
    been = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        path = Path(place)
        been.add(path.resolve())
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED
            and not name.startswith(".")
            and not (path / name / "pyvenv.cfg").exists()
            and (path / name).resolve() not in been
        )
        for name in sorted(files):
            if name.endswith(suffixes) and not name.startswith("."):
                yield path / name


def _check_size(files: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items() if path.is_file()}
    if sum(sizes.values()) > _MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"your own code is {sum(sizes.values()) / 1e6:.0f} MB, more than the "
            f"{_MOST_BYTES / 1e6:.0f} MB that are sent to hosts; the largest file is {largest} "
            f"({sizes[largest] / 1e6:.1f} MB)"
        )

"""The layers of a served model as files of their own, so that a host gets only those that it holds.

    driver   cache/parts/<sha256>/layer-3.safetensors     made once for a model and a type
    host     workdir/files/<sha256>/layer-3.safetensors   sent if it is not there yet

A second start sends nothing, and another cut only what is missing. The driver keeps the parts of
the models that were served last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import platformdirs

from smolrun.config import RunConfig, ranks
from smolrun.data.cache import cache_folder
from smolrun.errors import DataError, HostErrors, SmolrunError
from smolrun.estimate.serving_plan import ServingPlan
from smolrun.files import atomic_write, file_hash
from smolrun.launch.delivery.files import FileHashes, deliver_files, folder_bundle
from smolrun.launch.delivery.run_folder import run_on_host
from smolrun.launch.delivery.store import Bundle, File, TransferProgress
from smolrun.launch.run_on_all import run_on_all
from smolrun.serving.messages import ServingDtype
from smolrun.serving.source import ModelSource, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from smolrun.launch.remote.machine import Machine

Progress = Callable[[str, int, int], None]
_KEPT_MODELS = 3
_YOUNG_S = 24 * 3600.0
_GIVES_WAY_S = 5.0  # so long a layer that is copied ahead of time waits while answers run
_LOOK_S = 0.1


class PartsDelivery:
    """Brings the hosts of a server the parts that they need; ranks of this machine read the model
    where it is. `is_busy()`: whether answers run. Any thread may call."""

    def __init__(
        self,
        config: RunConfig,
        source: ModelSource,
        machines: Mapping[str, Machine],
        run_id: str,
        *,
        is_busy: Callable[[], bool],
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self._source, self._machines, self._run_id = source, machines, run_id
        self._hosts = [rank.host for rank in ranks(config)]
        self._weights = config.serving.weights
        self._is_busy = is_busy
        self._say, self._progress = say, progress
        self._has_cut = False

    def earlier_layers(self) -> list[range] | None:
        """Of every rank at an earlier start, if they had to be sent."""
        return read_layers(self._layers_file()) if self._machines else None

    def whole(self, host: str, source: ModelSource, dtype: ServingDtype) -> tuple[ModelSource, str]:
        """All parts of the model for a host, or of another checkpoint of it: the source, and the
        folder there."""
        machine = self._machines.get(host)
        if machine is None:
            return source, source.folder
        source = parts_of(source, dtype, self._progress)
        needed = {host: {*needed_parts(source, range(source.shape.layers))}}
        folders, sent = deliver_parts(source, needed, {host: machine}, self._run_id, self._progress)
        self._say(f"{sent:,} bytes of weights sent to {host}")
        return source, folders[host]

    def bring(
        self, plan: ServingPlan, dtype: ServingDtype, is_wanted: Callable[[], bool]
    ) -> tuple[ModelSource, list[str]]:
        """What each rank of a plan needs: the source, and the folder on the host of every rank."""
        if not any(self._hosts[rank] in self._machines for rank in plan.stages):
            return self._source, [self._source.folder] * len(self._hosts)
        source = parts_of(self._source, dtype, self._progress)
        folders = self._send(source, [plan], self._progress, is_wanted)
        if not self._has_cut:  # the first plan is of all ranks: the next start keeps it
            write_layers(self._layers_file(), plan.layers)
        self._has_cut = True
        return source, [folders.get(host, source.folder) for host in self._hosts]

    def copy(
        self,
        plans: Sequence[ServingPlan],
        dtype: ServingDtype,
        pause_s: float,
        is_wanted: Callable[[], bool],
    ) -> None:
        """After a pause, bring what each rank needs in any of the plans, when that delays no
        answer; blocks. A host that has no room is named."""

        def gives_way(limit_s: float, is_busy: Callable[[], bool]) -> bool:
            begun = time.monotonic()
            while is_wanted() and is_busy() and time.monotonic() < begun + limit_s:
                time.sleep(_LOOK_S)
            return is_wanted()

        def unseen(*_: object) -> None:
            """Nobody waits for it."""

        try:
            if gives_way(pause_s, lambda: True):
                source = parts_of(self._source, dtype, unseen)
                self._send(source, plans, unseen, lambda: gives_way(_GIVES_WAY_S, self._is_busy))
        except SmolrunError as error:  # a host that is lost now, or has no room
            for one in error.errors if isinstance(error, HostErrors) else [error]:
                self._say(f"warning: no copies of other hosts' layers: {one}")

    def _send(
        self,
        source: ModelSource,
        plans: Sequence[ServingPlan],
        progress: Progress,
        is_wanted: Callable[[], bool],
    ) -> dict[str, str]:
        """Bring every host elsewhere what it needs in any of the plans; by host, where it is."""
        needed: dict[str, set[str]] = {}
        for plan in plans:
            for rank in plan.stages:
                parts = needed_parts(source, plan.layers[rank])
                needed.setdefault(self._hosts[rank], set()).update(parts)
        machines = {name: one for name, one in self._machines.items() if name in needed}
        folders, sent = deliver_parts(source, needed, machines, self._run_id, progress, is_wanted)
        if sent or is_wanted():
            self._say(f"{sent:,} bytes of weights sent to {', '.join(machines)}")
        return folders

    def _layers_file(self) -> Path:
        return layers_file(self._source, self._weights, self._hosts)


def parts_of(source: ModelSource, dtype: ServingDtype, progress: Progress) -> ModelSource:
    """The same model as parts in this user's cache, in `dtype`; made if they are not there."""
    root = parts_folder()
    listing = root / f"{_identity(source, dtype)}.json"
    parts = _read(listing, root)
    try:
        if parts is None:
            parts = _make(source, dtype, root, progress)
            atomic_write(listing, json.dumps(parts).encode())
        os.utime(listing)
    except OSError as error:
        raise DataError(f"the layers cannot be kept in {root}: {error}") from error
    with contextlib.suppress(OSError):  # another driver may be doing the same
        _prune(root)
    return msgspec.structs.replace(
        source, kind="parts", folder=str(root), family="smolrun", parts=parts, dtype=dtype
    )


def parts_folder() -> Path:
    """Of this user's cache; DataError where there can be none."""
    return cache_folder("parts")


def layers_file(source: ModelSource, weights: str, hosts: Sequence[str]) -> Path:
    """Where the layers of every rank are kept from start to start, as measurements differ and other
    layers would have to be sent. DataError where there can be no cache."""
    key = json.dumps([source.folder, source.shape.layers, weights, list(hosts)])
    return cache_folder("cuts") / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def read_layers(file: Path) -> list[range] | None:
    """Of an earlier start; None where there was none."""
    try:
        ends = msgspec.json.decode(file.read_bytes(), type=list[tuple[int, int]])
    except (OSError, ValueError):
        return None
    return [range(*pair) for pair in ends]


def write_layers(file: Path, layers: Sequence[range]) -> None:
    """For the next start; not being able to is no reason to serve nothing."""
    with contextlib.suppress(OSError):
        atomic_write(file, json.dumps([[part.start, part.stop] for part in layers]).encode())


def needed_parts(source: ModelSource, layers: range) -> list[str]:
    """The names of the parts that a stage of these layers reads."""
    if not layers:
        return []
    ends = (layers.start == 0, layers.stop == source.shape.layers)
    shapes = source.parameter_shapes(layers.start, layers.stop - 1, *ends)
    return list(dict.fromkeys(part_of(name) for name in shapes))


def deliver_parts(
    source: ModelSource,
    needed: Mapping[str, set[str]],
    machines: Mapping[str, Machine],
    run_id: str,
    progress: Progress,
    is_wanted: Callable[[], bool] = lambda: True,
) -> tuple[dict[str, str], int]:
    """Have the parts of each host there: the folder of every host, and the bytes that were sent.
    Once they are not wanted any more no other part is begun.

    HostError or HostErrors."""
    root = Path(source.folder)
    transfer = TransferProgress("sending layers to hosts", progress, is_wanted)

    def deliver(machine: Machine) -> str:
        bundles = []
        for name in sorted(needed[machine.name]):
            key = source.parts[name]
            path = root / key / name
            bundles.append(Bundle(key, {name: File(path, path.stat().st_size, key)}))
        return deliver_files(machine, bundles, transfer, run_on_host(machine, run_id))

    folders = run_on_all(machines, deliver, "layers")
    return folders, transfer.done


def _identity(source: ModelSource, dtype: ServingDtype) -> str:
    """Equal for equal weights: of the bytes of all files."""
    if source.kind == "checkpoint":
        content = file_hash(Path(source.folder) / "manifest.json")
    else:
        hashes = FileHashes(platformdirs.user_cache_path("smolrun") / "hashes.json")
        content = folder_bundle(Path(source.folder), hashes).key
    return hashlib.sha256(f"{content}\n{dtype}\n1\n".encode()).hexdigest()


def _read(listing: Path, root: Path) -> dict[str, str] | None:
    """The parts of an earlier time, if all are still there."""
    try:
        parts = msgspec.json.decode(listing.read_bytes(), type=dict[str, str])
    except (OSError, ValueError):
        return None
    is_whole = all((root / key / name).is_file() for name, key in parts.items())
    return parts if is_whole else None


def _prune(root: Path) -> None:
    """Delete the parts that none of the models served last has; new ones may be in the making."""
    listings = sorted(root.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in listings[_KEPT_MODELS:]:
        path.unlink()
    kept = {key for path in listings[:_KEPT_MODELS] for key in (_read(path, root) or {}).values()}
    for folder in root.iterdir():
        is_old = time.time() - folder.stat().st_mtime > _YOUNG_S
        if folder.is_dir() and is_old and folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _make(
    source: ModelSource, dtype: ServingDtype, root: Path, progress: Progress
) -> dict[str, str]:
    """Write every part, one in memory at a time."""
    from safetensors.torch import save_file

    from smolrun.serving.source import load_stage

    last = source.shape.layers - 1
    stages = [(layer, layer, False, False) for layer in range(last + 1)]
    stages += [(0, 0, True, False), (last, last, False, True)]
    parts: dict[str, str] = {}
    for number, stage in enumerate(stages):
        progress("cutting the model into layers", number, len(stages))
        by_part: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_stage(source, *stage, dtype).items():
            by_part.setdefault(part_of(name), {})[name] = tensor
        for part, tensors in by_part.items():
            if part in parts:  # a layer beside an end, or a tied embedding
                continue
            with tempfile.TemporaryDirectory(prefix=".part-", dir=root) as workshop:
                made = Path(workshop) / part
                save_file(tensors, made)
                parts[part] = key = file_hash(made)
                (root / key).mkdir(exist_ok=True)
                os.replace(made, root / key / part)
    progress("cutting the model into layers", len(stages), len(stages))
    return parts

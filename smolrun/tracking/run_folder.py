"""The folder of one run under `outputs/`: its name, what lies where, and the pointer to the newest.

outputs/latest -> 20260131-142501-classicdp-gpt_tiny-3fa9
outputs/20260131-142501-classicdp-gpt_tiny-3fa9/
    config.yaml     the configuration, resolved
    driver.json     the process that drives it, or did
    driver.log      output of a driver without a terminal
    remote.json     the machine of its driver, if that is another one: the files are there
    stop            stop requests to its driver
    metrics.jsonl   every event
    summary.json    written at its end
    checkpoints/    step-00000100 ...
    tokenizer/      tokenizer files, where the data is text
    logs/           output of each rank

config.yaml and remote.json are signed: an HMAC-SHA256 with a key of this account on this machine,
outside of `outputs/`. A run folder can be copied, unpacked from an archive, or written by others;
the key stays here, so a folder from elsewhere is distinguished from our own.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import platform
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import platformdirs

from smolrun.checkpoints.folder import is_link
from smolrun.errors import CheckpointError, SmolrunError
from smolrun.files import MAX_JSON_BYTES, MAX_YAML_BYTES, atomic_write, read_bytes
from smolrun.sanitize import one_line

OUTPUTS = Path("outputs")  # in the working directory; all that a run writes is in it
LATEST = "latest"
SERVING = "serving"  # the status in summary.json while a server runs; it has no other end
_SIGNATURE = re.compile(rb"^# signature: ([0-9a-f]{64})\n?\Z", re.MULTILINE)  # the last line
_IN_CONFIG = b"config.yaml\n"  # the signed bytes begin with it
MAX_SUMMARY_BYTES = MAX_JSON_BYTES
_MAX_BYTES = 1 << 20  # driver.json, driver.lock and remote.json have less than 64 KiB
# The first is always there; the others come with the tokenizers of other people's models.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
# Process ids are reused; the creation time, with this tolerance, is not.
_SAME_PROCESS_S = 2.0
RUN_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[A-Za-z0-9._-]{1,200}", re.ASCII)  # as `run_id` makes them
_KEY_BYTES = 32  # of the key that signs files
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


class DriverRecord(TypedDict, total=False):
    """driver.json. `process_created` and `started_at` are times of the driver's host."""

    pid: int
    host: str
    process_created: float
    started_at: str
    steps: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    unit: str
    has_log: bool


class _Signed(msgspec.Struct):
    """remote.json."""

    remote: msgspec.Raw
    signature: str


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. `path` is relative if `outputs` was."""

    path: Path

    @classmethod
    def create(cls, outputs: Path, title: str, *, now: datetime) -> RunFolder:
        """A new folder in `outputs`, with a name of its own; OSError if it cannot be made."""
        outputs.mkdir(parents=True, exist_ok=True)
        while True:
            folder = cls(outputs / run_id(title, now=now, suffix=secrets.token_hex(2)))
            with contextlib.suppress(FileExistsError):  # two runs in one second, and one in 65536
                folder.path.mkdir()
                folder.logs.mkdir()
                return folder

    @property
    def run_id(self) -> str:
        """The name of the run, safe to print: an archive may bring any name."""
        return one_line(self.path.name)

    @property
    def unique_id(self) -> str:
        """A name that no other run has, for its hosts: letters, digits, dot, dash and underscore.
        That of a job, `algorithm=fsdp,seed=1`, is neither unique nor made of these."""
        name = self.run_id
        if (self.path.parent / "sweep.yaml").is_file():
            digest = hashlib.sha256(self.path.name.encode()).hexdigest()[:8]
            name = f"{one_line(self.path.absolute().parent.name)}-{digest}"
        return _NOT_IN_NAMES.sub("_", name)

    @property
    def logs(self) -> Path:
        """Where the logs of the ranks lie."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of all events."""
        return self.path / "metrics.jsonl"

    @property
    def driver_log(self) -> Path:
        """The output of a driver without a terminal."""
        return self.path / "driver.log"

    @property
    def driver_records(self) -> Path:
        """What the driver said, as LogRecords."""
        return self.logs / "driver.jsonl"

    def log(self, rank: int, host: str) -> Path:
        """The output of this rank; as LogRecords, with the suffix .jsonl beside it."""
        return self.logs / f"rank{rank}-{_for_names(host)}.log"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    def write_config(self, text: str) -> None:
        """Write the resolved configuration, yaml, signed if this account can have a key."""
        content = _SIGNATURE.sub(b"", text.encode())
        if not content.endswith(b"\n"):  # the signature needs a line of its own
            content += b"\n"
        with contextlib.suppress(SmolrunError):  # unsigned: resuming it needs the user's trust
            content += f"# signature: {sign(_IN_CONFIG + content)}\n".encode()
        atomic_write(self.config, content)

    def has_own_config(self) -> bool:
        """Whether `write_config` of this account on this machine wrote config.yaml as it is.
        SmolrunError if the account has no key."""
        try:
            content = read_bytes(self.config, MAX_YAML_BYTES)
        except (OSError, ValueError):
            return False
        found = _SIGNATURE.search(content)
        signature = found[1].decode() if found else ""
        return is_signed(_IN_CONFIG + _SIGNATURE.sub(b"", content), signature)

    def why_foreign(self) -> str | None:
        """Why config.yaml may not be this account's; None if its signature is right."""
        try:
            is_own = self.has_own_config()
        except SmolrunError as error:
            return f"whether this account wrote its config.yaml is unknown ({error})"
        return None if is_own else "this account on this machine did not write its config.yaml"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; numbers that are not finite become null."""
        encoded = msgspec.json.format(msgspec.json.encode(dict(summary)), indent=2)
        atomic_write(self.path / "summary.json", encoded + b"\n")

    def keep_tokenizer(self, tokenizer: Path) -> None:
        """Copy the tokenizer in a folder, so that the run's folder is complete."""
        (self.path / "tokenizer").mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:
            if name == TOKENIZER_FILES[0] or (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, self.path / "tokenizer" / name)

    def keep_model_config(self, model: Path) -> None:
        """Copy the configuration of a Hugging Face model, so that the run can be exported."""
        (self.path / "model").mkdir(exist_ok=True)
        for name in ("config.json", "generation_config.json"):
            if (model / name).is_file():
                shutil.copyfile(model / name, self.path / "model" / name)

    def write_driver(self, steps: int, *, unit: str = "tokens", has_log: bool = False) -> None:
        """Write driver.json, by which `task=status` distinguishes a running run from a dead one.

        `unit` is what its rates count, `has_log`: its output goes to `driver_log`. Stop requests
        to an earlier driver are removed.
        """
        me, before = _this_process(), self.driver()
        driver = {
            **me,
            "started_at": datetime.now().astimezone().isoformat(timespec="seconds"),
            "steps": steps,
            "unit": unit,
            "has_log": has_log,
        }
        # This driver may restart its run after a loss: stop requests made meanwhile stay.
        if self.summary() or any(before.get(key) != value for key, value in me.items()):
            self._stop.unlink(missing_ok=True)
        atomic_write(self.path / "driver.json", msgspec.json.encode(driver) + b"\n")

    def driver(self) -> DriverRecord:
        """driver.json; empty if it is missing or damaged."""
        try:
            content = read_bytes(self.path / "driver.json", _MAX_BYTES)
            return msgspec.json.decode(content, type=DriverRecord)
        except (OSError, ValueError, RecursionError):
            return {}

    def write_remote(self, remote: Mapping[str, Any]) -> None:
        """Write remote.json: the machine that drives the run, and its folder there.

        Signed, because it holds how to connect and what to run there. SmolrunError without a key.
        """
        content = msgspec.json.encode(dict(remote))
        signed = _Signed(msgspec.Raw(content), sign(content))
        atomic_write(self.path / "remote.json", msgspec.json.encode(signed) + b"\n")

    def remote(self) -> dict[str, Any] | None:
        """remote.json; None if it was not signed by this account on this machine. SmolrunError if
        the account has no key."""
        try:
            file = read_bytes(self.path / "remote.json", _MAX_BYTES)
            found = msgspec.json.decode(file, type=_Signed)
            content = bytes(found.remote)
            if not is_signed(content, found.signature):
                return None
            return msgspec.json.decode(content, type=dict[str, Any])
        except (OSError, ValueError, RecursionError):
            return None

    @property
    def is_driven_elsewhere(self) -> bool:
        """Whether `write_remote` was called for this run, on any machine."""
        return (self.path / "remote.json").is_file()

    def ask_to_stop(self) -> int:
        """Request a stop of the driver: at an agreed step, and by a second request at once. Returns
        the number of requests; OSError if that cannot be written, or the file is a link."""
        # Without O_NOFOLLOW (Windows) a link needs the rights of an administrator to be made.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        flags |= getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would block
        with os.fdopen(os.open(self._stop, flags, 0o666), "ab") as file:
            file.write(b"stop\n")
        return self.stop_requests()

    def stop_requests(self) -> int:
        """The number of stop requests since the driver started."""
        try:
            return self._stop.stat().st_size // len(b"stop\n")
        except OSError:
            return 0

    @property
    def _stop(self) -> Path:
        """A file instead of a signal works on every system, and over SSH."""
        return self.path / "stop"

    def summary(self) -> dict[str, Any]:
        """summary.json; empty if the run has not ended, or has been resumed since."""
        try:
            ended_at = (self.path / "summary.json").stat().st_mtime_ns
            if ended_at < (self.path / "driver.json").stat().st_mtime_ns:
                return {}
        except OSError:
            pass  # one of them is not there
        return _read_json(self.path / "summary.json", MAX_SUMMARY_BYTES)

    def refuse_links_outside(self) -> None:
        """CheckpointError for a link to the outside of the folder: writing and deleting must not
        follow it."""
        real = self.path.resolve()
        for place, folders, files in os.walk(self.path):
            for path in (Path(place, name) for name in (*folders, *files)):
                if is_link(path) and not path.resolve().is_relative_to(real):
                    raise CheckpointError(
                        f"{path} is a link to {os.path.realpath(path)}: outside of the run's own "
                        "folder; delete it, or replace it by its target"
                    )
            if Path(place) == self.path / "wandb":
                # W&B links its logs to its cache, in folders that are not written to again.
                folders.clear()

    def claim(self) -> bool:
        """Lock the run for this process; False if another living process has it."""
        lock = self.path / "driver.lock"
        mine = msgspec.json.encode(_this_process())
        for _ in range(2):
            try:
                with lock.open("xb") as file:
                    file.write(mine)
                return True
            except FileExistsError:
                if _is_alive(_read_json(lock, _MAX_BYTES)):
                    return False
                lock.unlink(missing_ok=True)  # of a driver that was killed
        return False

    def release(self) -> None:
        """Release the lock."""
        (self.path / "driver.lock").unlink(missing_ok=True)

    def driver_lives(self) -> bool:
        """Whether the run has not ended and its driver is a living process of this host."""
        return _is_alive(self.driver()) and self.summary().get("status", SERVING) == SERVING

    def become_latest(self) -> None:
        """Point `outputs/latest` here: a link, or a text file where links are not possible.

        OSError if something else is there, which stays."""
        latest = self.path.parent / LATEST
        if latest.exists() and not latest.is_symlink() and not _is_pointer(latest):
            raise OSError(f"{latest} is in the way")
        fresh = self.path.parent / f".{LATEST}-{self.path.name}"
        try:
            fresh.symlink_to(self.path.name, target_is_directory=True)
            os.replace(fresh, latest)
        except (OSError, NotImplementedError):
            with contextlib.suppress(OSError):
                fresh.unlink()
            atomic_write(latest, f"{self.path.name}\n".encode())


def run_id(title: str, *, now: datetime, suffix: str) -> str:
    """The name of a run: sorts by time, contains the title, is a valid file name on all systems."""
    return f"{now:%Y%m%d-%H%M%S}-{_for_names(title)}-{suffix}"


def _for_names(text: str) -> str:
    return _NOT_IN_NAMES.sub("_", text)[:80] or "_"


def _is_pointer(path: Path) -> bool:
    """Whether a file holds only the name of a run beside it."""
    try:
        name = path.read_text(encoding="utf-8").strip() if path.stat().st_size < 300 else ""
    except (OSError, ValueError):
        return False
    return bool(name) and (path.parent / name).is_dir()


def _this_process() -> dict[str, Any]:
    import psutil

    me = psutil.Process()
    return {"pid": me.pid, "host": platform.node(), "process_created": me.create_time()}


def _is_alive(process: Mapping[str, Any]) -> bool:
    """Whether the process that `_this_process` described still runs on this host."""
    import psutil

    pid, created = process.get("pid"), process.get("process_created")
    is_here = process.get("host") == platform.node()
    if not is_here or not isinstance(pid, int) or not isinstance(created, float):
        return False
    try:
        found = psutil.Process(pid)
        is_same = abs(found.create_time() - created) < _SAME_PROCESS_S
        return is_same and found.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):
        return False


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a file; empty where there is none that can be read."""
    try:
        return msgspec.json.decode(read_bytes(path, max_bytes), type=dict[str, Any])
    except (OSError, ValueError, RecursionError):
        return {}


def sign(data: bytes) -> str:
    """The signature of `data` as hex digits; SmolrunError if there can be no key."""
    return hmac.new(_signing_key(), data, hashlib.sha256).hexdigest()


def is_signed(data: bytes, signature: str) -> bool:
    """Whether `sign` of this account on this machine returned `signature` for `data`."""
    return hmac.compare_digest(sign(data).encode(), signature.encode())


def _signing_key() -> bytes:
    path = platformdirs.user_config_path("smolrun") / "run_folders.key"
    try:
        if not path.exists():
            _create_signing_key(path)
        key = path.read_bytes()
    except OSError as error:
        what = f"{path}, the key that signs run folders, cannot be read or made: {error.strerror}"
        raise SmolrunError(what) from None
    if len(key) != _KEY_BYTES:
        what = f"{path}, the key that signs run folders, does not have {_KEY_BYTES} bytes"
        raise SmolrunError(f"{what}: delete it")
    return key


def _create_signing_key(path: Path) -> None:
    """A new key, readable by this account only, complete or absent. One that another process
    created meanwhile stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)  # unlike a rename it never replaces a file
        except FileExistsError:
            pass
        except (OSError, NotImplementedError):  # a file system without hard links
            os.rename(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)

"""detach=true: the driver as a process of its own that needs neither this terminal nor its user.

    this process                          the driver, in a session of its own
      | -- configuration over stdin -------> |
      | <-- what it says, in a file -------- |  prepares the data
      | <-- where its run folder is -------- |  says the rest into driver.log there
      exits 0                                trains; its workers live only as long as it does

Detaching moves the driver, and nothing else: ending it ends its workers. No secret travels by
argument or environment beyond what this process has in its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from smolrun.config import RunConfig, resolved
from smolrun.driver.outputs import nothing_started
from smolrun.driver.prepare import with_pinned_model
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from smolrun.sanitize import echo
from smolrun.tracking.drivers import note_driver
from smolrun.tracking.run_folder import OUTPUTS, RunFolder

COMMAND = [sys.executable, "-P", "-m", "smolrun.cli"]
_LOG = "SMOLRUN_DRIVER_LOG"  # for the driver alone: the file that its output goes to at first
FOLDER = "smolrun-run-folder: "  # before the line that names it
OF_THIS_TERMINAL = {"detach": False, "console": "auto", "driver": None}  # for the driver itself
TYPED = "typed"  # beside the configuration's own keys
_POLL_S = 0.05
_END_S = 10.0  # for a driver that is to end before its run began


def drive(config: RunConfig) -> int:
    """Start the driver in the background; returns once it has its run folder, or has failed."""
    code, folder = begin(config)
    if folder is not None:
        echo("\n".join(how_to_go_on(folder.run_id)))
    return code


def begin(config: RunConfig) -> tuple[int, RunFolder | None]:
    """As `drive`; also returns the run, null where it has failed before it began."""
    config = with_pinned_model(config)
    code, path = start(with_words(config), lambda line: echo(line, error=True))
    return code, None if path is None else RunFolder(Path(path))


def with_words(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON values for a driver, with the words that were typed."""
    return {**resolved(config), TYPED: list(config.typed)}


def how_to_go_on(run_id: str) -> list[str]:
    """The commands for a run without a terminal."""
    return [
        f"{run_id} runs in the background",
        f"to see it:  smolrun task=attach attach.run={run_id}",
        f"to stop it: smolrun task=stop stop.run={run_id}",
    ]


def drive_sweep(name: str, words: Sequence[str]) -> int:
    """Start the driver of a sweep whose folder is written, which resumes it by these words of a
    command line; returns once it runs, or has failed."""
    code, path = _start("--sweep", msgspec.json.encode(words), lambda line: echo(line, error=True))
    if path is not None:
        echo("\n".join(how_to_go_on(name)))
    return code


def start(config: Mapping[str, Any], say: Callable[[str], None]) -> tuple[int, str | None]:
    """Start a driver of the resolved configuration; what it says before its run folder is there
    goes to `say`. Returns the exit code and the run folder, None where it has failed before."""
    plain = {**config, **OF_THIS_TERMINAL}
    return _start("--driver", msgspec.json.encode(plain), say)


def _start(flag: str, order: bytes, say: Callable[[str], None]) -> tuple[int, str | None]:
    """As `start`; the process reads `order` from stdin."""
    log = OUTPUTS / f".driver-{secrets.token_hex(4)}.log"
    with nothing_started():
        OUTPUTS.mkdir(parents=True, exist_ok=True)
        output = log.open("xb")
    try:
        with output:
            driver = _launch(flag, log, output.fileno())
        with log.open("rb") as said:
            assert driver.stdin is not None
            with contextlib.suppress(OSError):  # it has died; its exit code says so
                driver.stdin.write(order)
            with contextlib.suppress(OSError):
                driver.stdin.close()
            try:
                return _hear(driver, said, say)
            except BaseException:
                _end(driver)
                raise
    except KeyboardInterrupt:
        say("stopped by the user before training began")
        return EXIT_STOPPED, None
    finally:
        with contextlib.suppress(OSError):
            log.unlink(missing_ok=True)


def _launch(flag: str, log: Path, output: int) -> subprocess.Popen[bytes]:
    """The driver's process: no terminal, no parent that could take it along."""
    flags = getattr(subprocess, "DETACHED_PROCESS", 0)
    flags |= getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    # Windows ends all of a job with its session, an SSH session's too, unless it may break away.
    away = getattr(subprocess, "CREATE_BREAKAWAY_FROM_JOB", 0)
    for creationflags in dict.fromkeys((flags | away, flags)):
        try:
            return subprocess.Popen(  # noqa: S603  (our own interpreter)
                [*COMMAND, flag],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                bufsize=0,
                env={**os.environ, _LOG: str(log.absolute())},
                start_new_session=hasattr(os, "setsid"),
                creationflags=creationflags,
            )
        except PermissionError:
            if creationflags == flags:
                raise
    raise AssertionError("the second attempt returns or raises")


def _hear(
    driver: subprocess.Popen[bytes], said: Any, say: Callable[[str], None]
) -> tuple[int, str | None]:
    """Pass on what the driver says until it says where its folder is, or ends."""
    rest = b""
    while True:
        has_ended = driver.poll() is not None  # looked at first: then all it said is there
        while data := said.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                text = line.decode("utf-8", "replace").rstrip("\r")
                if text.startswith(FOLDER):
                    return EXIT_DONE, text.removeprefix(FOLDER)
                say(text)
        if has_ended:
            if rest:
                say(rest.decode("utf-8", "replace"))
            # Done without a run folder, as task=train never is: there is nothing to attach to.
            code = driver.returncode
            return code if code > 0 else EXIT_FAILED, None
        time.sleep(_POLL_S)


def _end(driver: subprocess.Popen[bytes]) -> None:
    """The user changed their mind while the data was being prepared."""
    driver.terminate()
    try:
        driver.wait(_END_S)
    except subprocess.TimeoutExpired:
        driver.kill()  # its workers, if there are any by now, end with it
        driver.wait(_END_S)


def log_into_run_folder() -> None:
    """What this process says goes into its run's own log once that begins, as if another one had
    started it; nothing of what it says before."""
    empty = OUTPUTS / f".driver-{secrets.token_hex(4)}.log"
    with nothing_started():
        OUTPUTS.mkdir(parents=True, exist_ok=True)
        empty.touch()
    os.environ[_LOG] = str(empty.absolute())
    atexit.register(empty.unlink, missing_ok=True)  # where no run begins


def begin_driving(
    folder: RunFolder, *, steps: int, unit: str, uses: Sequence[Path] | None = None
) -> None:
    """This process drives the run from now on; in the background, it now says so to whoever
    started it, and all else into the run's own log. `uses`: what task=clean must keep meanwhile;
    None: all caches."""
    log = os.environ.pop(_LOG, None)
    # A run that was started again says it there already.
    has_log = log is not None or _is_ours(folder.driver_log)
    folder.write_driver(steps, unit=unit, has_log=has_log)
    note_driver(folder, uses)
    if log is None:
        return
    with contextlib.suppress(OSError), folder.driver_log.open("ab") as own, open(log, "rb") as said:
        shutil.copyfileobj(said, own)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.write(1, f"{FOLDER}{folder.path.absolute()}\n".encode())
    own_fd = os.open(folder.driver_log, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
    for fd in (1, 2):
        os.dup2(own_fd, fd)
    os.close(own_fd)
    with contextlib.suppress(OSError):  # Windows: the starter has it open, and takes it away
        os.unlink(log)


def _is_ours(log: Path) -> bool:
    """Whether what this process says goes into that file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(1), log.stat())
    return False

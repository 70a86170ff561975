"""Drivers without a terminal; the process that starts one has composed and resolved the config.

`smolrun --driver`: be one; the configuration comes over stdin (see smolrun/driver/detach.py).
`smolrun --sweep`: be that of a sweep, whose folder is written (driver/detach.py).
`smolrun --job`: be that of a job of a sweep (sweep/runner.py).
`smolrun --estimate`: how long runs would take, for a sweep (cli/sweep.py).
`smolrun --service`: serve, as launchd or systemd starts it (driver/service.py).
`smolrun --start-driver`: start one here for another machine (driver/remote_driver.py).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from smolrun.cli.run import BAD_CONFIG, drive, run
from smolrun.config import validate
from smolrun.driver.outputs import JOB_FOLDER
from smolrun.errors import ConfigError, SmolrunError
from smolrun.files import to_null_device
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_STOPPED, EXIT_STOPPED_NOW
from smolrun.sanitize import echo

_BETWEEN_S = 0.1  # two that come at once count as one


def main() -> int:
    """Drive the run that stdin describes; returns its exit code."""
    _be_a_driver()
    from smolrun.driver.detach import TYPED

    try:
        plain = msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, Any])
        typed = map(str, plain.pop(TYPED, None) or [])
        config = validate(plain).with_typed(typed)
    except (ConfigError, ValueError) as error:
        echo(f"smolrun: the configuration over stdin cannot be used: {error}", error=True)
        return BAD_CONFIG
    to_null_device(sys.stdin.fileno())
    return drive(config)


def sweep_main() -> int:
    """Run the sweep that the words in stdin, those of a command line, mean; its exit code."""
    _be_a_driver()
    words = msgspec.json.decode(sys.stdin.buffer.read(), type=list[str])
    to_null_device(sys.stdin.fileno())
    return run(["-m", *words])


def service_main() -> int:
    """Serve as the other words of this command line say; returns its exit code, 0 also where the
    user has stopped it: a service manager would start it again."""
    _be_a_driver()
    from smolrun.driver.detach import log_into_run_folder
    from smolrun.driver.service import FLAG

    log_into_run_folder()
    code = run([word for word in sys.argv[1:] if word != FLAG])
    return EXIT_DONE if code in (EXIT_STOPPED, EXIT_STOPPED_NOW) else code


def _be_a_driver() -> None:
    if hasattr(signal, "SIGHUP"):  # no terminal of this process can be closed
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's own code, as for the command itself


def job_main() -> int:
    """Drive one job of a sweep; returns its exit code. The first line of stdin says which, every
    further one is a Ctrl-C, and so is its end."""
    # Ignored in what a shell starts by `&`, but here it is how the sweep stops its job.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        line, rest = _first_line()
        order = msgspec.json.decode(line, type=_JobOrder)
        config = validate(order.config).with_typed(order.typed)
    except (ConfigError, ValueError) as error:
        echo(f"smolrun: the configuration over stdin cannot be used: {error}", error=True)
        return BAD_CONFIG
    JOB_FOLDER.set(Path(order.folder))
    threading.Thread(target=_obey, args=(rest,), name="smolrun-job-stdin", daemon=True).start()
    return drive(config)


def _first_line() -> tuple[bytes, bytes]:
    """The first line of stdin, and what was read beyond it. Not by sys.stdin: a thread that waits
    in it would hold its lock at the end of this process."""
    read = b""
    while b"\n" not in read and (more := os.read(0, 1 << 16)):
        read += more
    line, _, rest = read.partition(b"\n")
    return line, rest


def _obey(lines: bytes) -> None:
    """A Ctrl-C for every further line. At the end of stdin the sweep's process has died: its job
    stops as by one Ctrl-C, saved, so that the sweep can be resumed."""
    while lines or (lines := os.read(0, 4096)):
        for _ in range(lines.count(b"\n")):
            _thread.interrupt_main()
            time.sleep(_BETWEEN_S)
        lines = b""
    _thread.interrupt_main()


def estimate_main() -> int:
    """Estimate the seconds of the runs whose configurations stdin holds, as by a dry run: a line
    of JSON for each, null where that is not known."""
    from smolrun.driver.prepare import spec_of
    from smolrun.estimate.dry_run import estimate
    from smolrun.estimate.dry_run_text import run_s

    answers = sys.stdout
    for plain in msgspec.json.decode(sys.stdin.buffer.read(), type=list[dict[str, Any]]):
        config = validate(plain)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # own models and data may print
                seconds = run_s(estimate(config, spec_of(config)))
        except (SmolrunError, OSError):  # its job will say so
            seconds = None
        print(msgspec.json.encode(seconds).decode(), file=answers, flush=True)
    return 0


def start_main() -> int:
    """Start a driver on this machine as stdin says; what it says, and its run folder, to stdout."""
    from smolrun.driver.detach import FOLDER, start

    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Order)
    has_begun = threading.Event()
    watch = threading.Thread(
        target=_end_with_stdin, args=(has_begun,), name="smolrun-start-driver", daemon=True
    )
    watch.start()
    folder = Path(order.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if order.own is not None:  # the user's modules lie beside the outputs, as they do at home
        shutil.copytree(order.own, folder, dirs_exist_ok=True)
    os.chdir(folder)
    code, run = start(order.config, echo)
    has_begun.set()
    if run is not None:
        print(f"{FOLDER}{run}", flush=True)  # noqa: T201  (a program reads the path as it is)
    return code


def _end_with_stdin(has_begun: threading.Event) -> None:
    """Whoever ordered the run has left before it began, by a Ctrl-C or for good: as if it came
    here. Once the run has begun it may leave."""
    while os.read(0, 4096):  # not sys.stdin: its lock would not survive the end of this process
        pass
    if not has_begun.is_set():
        _thread.interrupt_main()


class _JobOrder(msgspec.Struct):
    """What a job runs, in which folder, and the words of the command line that mean it."""

    config: dict[str, Any]
    folder: str
    typed: list[str]


class _Order(msgspec.Struct):
    """What to start, in which folder, and where the user's own modules lie."""

    config: dict[str, Any]
    folder: str
    own: str | None

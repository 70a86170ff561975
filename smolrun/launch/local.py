"""Workers on this machine, by subprocess.

A worker gets a session of its own, so that the terminal's Ctrl-C reaches the driver alone and a
kill reaches the worker's own children too. It gets no secret by argv or environment: what it must
know comes over stdin.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from smolrun.launch.hosts import WorkerPlan
from smolrun.launch.machine_memory import ended_by_linux, machine_memory

_READ_BYTES = 64 * 1024
_COUNT_EVERY_S = 1.0
_NICE = 10  # a ninth of the processor's time beside a program that wants all of it
_TRIES = 10
# A variable is a secret if a word of its name is one of these, in the singular or the plural:
# HF_TOKEN is one, TOKENIZERS_PARALLELISM is not.
_SECRET_WORDS = frozenset(
    ["TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "KEY", "APIKEY", "CREDENTIAL"]
)
_SECRET_NAMES = frozenset({"SSH_AUTH_SOCK", "SSH_AGENT_PID"})
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def worker_command() -> list[str]:
    """The entry point in worker mode, by this very interpreter.

    -P keeps the current folder away from the front of Python's path, where a file of the user's
    could hide a library; the worker puts it at the end.
    """
    return [sys.executable, "-P", "-m", "smolrun.cli", "--worker"]


# glibc gives freed memory back to the system, block by block, and a step asks for it again at once:
# with bfloat16 parameters five sixths of a step went into page faults. It may keep this much.
_KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 256 << 20, "MALLOC_MMAP_THRESHOLD_": 32 << 20}


def worker_environment(base: Mapping[str, str], threads: int) -> dict[str, str]:
    """`base` without secrets, with thread counts (which only count before numpy and torch load)."""
    environment = {name: value for name, value in base.items() if not is_secret(name)}
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    for name, size in _KEPT_MEMORY.items():
        environment.setdefault(name, str(size))
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONFAULTHANDLER"] = "1"  # a crash in C leaves its stack in the log
    environment["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # logs are UTF-8 on every system
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment


def is_secret(name: str) -> bool:
    """Whether a variable of this name is kept from workers."""
    words = (word.removesuffix("S") for word in name.upper().split("_"))
    return name.upper() in _SECRET_NAMES or not _SECRET_WORDS.isdisjoint(words)


class LocalHost:
    """This machine. `command` is what a worker runs (a test brings a small script of its own);
    `low_priority`: programs of people who work here come first."""

    def __init__(self, command: Sequence[str] | None = None, *, low_priority: bool = False) -> None:
        self._command = command
        self._low_priority = low_priority

    def start(self, plan: WorkerPlan) -> LocalProcess:
        """Start one worker in the current directory; OSError if the interpreter cannot be run."""
        threads = plan.start.threads
        return start_worker(self._command, threads=threads, low_priority=self._low_priority)


def start_worker(
    command: Sequence[str] | None,
    *,
    threads: int,
    low_priority: bool = False,
    cwd: Path | None = None,
) -> LocalProcess:
    """Start one worker on this machine, in the folder `cwd`; OSError if that cannot be done.
    `command`: see LocalHost."""
    owns_session = hasattr(os, "setsid")
    kills = machine_memory().kills
    # Windows has no sessions; a process group of its own keeps Ctrl-C away just as well.
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    if low_priority:
        flags |= getattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0)
    process = subprocess.Popen(
        list(command) if command is not None else worker_command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=worker_environment(os.environ, threads),
        cwd=cwd,
        start_new_session=owns_session,
        creationflags=flags,
    )
    if low_priority:
        _lower_priority(process.pid)
    owns_group = owns_session and hasattr(os, "killpg")
    return LocalProcess(process, owns_group=owns_group, kills_before=kills)


class LocalProcess:
    """A worker on this machine."""

    def __init__(
        self, process: subprocess.Popen[bytes], *, owns_group: bool, kills_before: int
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._owns_group = owns_group
        # Of the last seconds before its end; the older one counts, as it may have died before the
        # newer one.
        self._kills = deque([kills_before], maxlen=2)
        self._counted_s = time.monotonic()
        self._peak_bytes = self._code = 0
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def read_control(self) -> bytes:
        """Some bytes of its stdout; empty at the end."""
        now_s = time.monotonic()
        if now_s - self._counted_s >= _COUNT_EVERY_S:
            self._kills.append(machine_memory().kills)
            self._counted_s = now_s
        return _read(self._stdout)

    def read_log(self) -> bytes:
        """Some bytes of its stderr; empty at the end."""
        return _read(self._stderr)

    def write(self, data: bytes) -> None:
        """All of `data` into its stdin; blocks while it does not read."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._stdin.fileno(), rest) :]

    def close_input(self) -> None:
        """End its stdin."""
        self._stdin.close()

    def wait(self) -> int:
        """Its exit code once it has ended; -n for signal n. What it started is ended with it."""
        self._code = self._wait()
        self._kill_group()
        return self._code

    def _wait(self) -> int:
        if sys.platform == "linux":
            # `kill` asks for it too, and SIGCHLD may be ignored: then there is nothing to wait for.
            with contextlib.suppress(ChildProcessError):
                _, status, used = os.wait4(self._process.pid, 0)
                self._peak_bytes = used.ru_maxrss * 1024
                self._process.returncode = code = os.waitstatus_to_exitcode(status)
                return code  # that of `_process` is 0 if `kill` came between
        return self._process.wait()

    def out_of_memory(self) -> str | None:
        """After `wait`: a sentence if Linux may have ended this worker because memory was full."""
        memory = machine_memory()
        was_killed = self._code == -getattr(signal, "SIGKILL", 9)
        if not was_killed or memory.kills == self._kills[0]:
            return None
        return ended_by_linux(self._peak_bytes, memory.total)

    def lost(self) -> None:
        """Never: this machine is always in reach."""

    def is_silent(self) -> bool:
        """Never, for the same reason."""
        return False

    def kill(self) -> None:
        """SIGKILL to its process group, stopped or not; TerminateProcess on Windows."""
        if self._process.returncode is None:
            self._kill_group()
            self._process.kill()

    def _kill_group(self) -> None:
        # A group's number is free for others only when its last process is gone: then there is
        # nothing to find.
        if self._owns_group:
            # No process is left; macOS gives EPERM where only zombies are.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _lower_priority(pid: int) -> None:
    """Nice, on POSIX: an idle machine computes as fast as before. The worker has one thread yet,
    and all later ones inherit it."""
    if not hasattr(os, "setpriority"):
        return
    with contextlib.suppress(OSError):
        nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, 0))  # raising it is not allowed to all
        os.setpriority(os.PRIO_PROCESS, pid, nice)
    # Linux may schedule sessions first (autogroup): then nice counts within a session alone, and
    # the session has a number of its own. Without privileges it is set ten times a second at most.
    own = max(_NICE, session_nice())
    for _ in range(_TRIES):
        try:
            with open(f"/proc/{pid}/autogroup", "w", encoding="ascii") as file:
                file.write(str(own))
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return
        else:
            return


def session_nice() -> int:
    """Of our own session, `/autogroup-123 nice 10`; 0 where there is none."""
    try:
        text = Path("/proc/self/autogroup").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(text.split()[-1]) if text.strip() else 0


def _read(pipe: IO[bytes]) -> bytes:
    try:
        return os.read(pipe.fileno(), _READ_BYTES)
    except (OSError, ValueError):
        return b""  # closed under us, which is an end like any other

"""Makes the environment of a run on a host, step by step, as `setup_plan.py` decided.

    envs/.NAME.part-1a2b/   made here ...           envs/NAME/   ... and renamed when complete

So an environment under its final name is whole, and an interrupted one is ignored.
"""

from __future__ import annotations

import re
import secrets
import shlex
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from smolrun.data.fetch import Package, fetched
from smolrun.errors import DataError, HostError
from smolrun.launch.remote import probe
from smolrun.launch.remote.machine import Machine
from smolrun.launch.remote.shell import Shell
from smolrun.launch.setup import setup_plan
from smolrun.launch.setup.setup_plan import CPU_WHEELS, UV_VERSION, BlankHost, Plan
from smolrun.sanitize import without_credentials

_LOOK_S = 60.0
_STEP_S = 1800.0  # torch over a slow line, onto a slow card
_SHORT_S = 120.0
_TAIL = 6

Say = Callable[[str], None]


def look(machine: Machine, environment: str) -> BlankHost:
    """What the host has, blank or ready."""
    if machine.shell is not Shell.POSIX:
        return BlankHost(system="windows")
    places = probe.unix_probe_script(machine.workdir).encode()
    done = machine.run(["sh", "-s"], data=places, timeout_s=_LOOK_S)
    answer = probe.parse_answer(done.out.decode("utf-8", "replace"))
    pythons = answer.pythons if answer is not None else []
    text = setup_plan.question(machine.workdir, environment, pythons)
    done = machine.run(["sh", "-s"], data=text.encode(), timeout_s=_LOOK_S)
    return setup_plan.parse_blank_host(done.out.decode("utf-8", "replace"))


class EnvironmentMaker:
    """Sets one host up. The output of the commands there goes into the file `log`."""

    def __init__(self, machine: Machine, found: BlankHost, plan: Plan, log: Path, say: Say) -> None:
        self._machine = machine
        self._found = found
        self._plan = plan
        self._log = log
        self._say = say

    def make(self) -> None:
        """All steps, each with its time; HostError with the last lines of the one that failed."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.write_text("", encoding="utf-8")
        plan, envs = self._plan, f"{self._machine.workdir}/envs"
        name = plan.environment.rpartition("/")[2]
        part = f"{envs}/.{name}.part-{secrets.token_hex(2)}"
        self._sh(f"mkdir -p {shlex.quote(envs)}")
        self._sh(
            f"find {shlex.quote(envs)} -maxdepth 1 -name '.*.part-*' -mtime +1 -exec rm -rf {{}} +"
        )
        try:
            self._fill(part)
            target = shlex.quote(plan.environment)
            self._sh(f"[ -e {target} ] || mv {shlex.quote(part)} {target}")
        finally:
            self._sh(f"rm -rf {shlex.quote(part)}", must=False)

    def _fill(self, part: str) -> None:
        uv = self._uv()
        if uv is not None:
            try:
                self._by_uv(uv, part)
            except HostError as error:
                if not self._plan.has_pip:
                    raise
                self._say(f"{self._plan.host}: uv could not ({error.what}); now by pip")
                self._sh(f"rm -rf {shlex.quote(part)}")
            else:
                return
        self._by_pip(part)

    def _uv(self) -> str | None:
        """Where uv is on the host; None if pip must do."""
        plan, machine = self._plan, self._machine
        if not plan.brings_uv:
            return plan.uv
        place = f"{machine.workdir}/bin/uv-{setup_plan.UV_VERSION}"
        try:
            with self._step("copy uv there"):
                program = fetch_uv(plan.host, self._found)
                self._sh(f"mkdir -p {shlex.quote(machine.workdir)}/bin")
                machine.put(program, place)
                self._sh(f"chmod 755 {shlex.quote(place)} && {shlex.quote(place)} --version")
        except HostError as error:
            if not plan.has_pip:
                raise
            self._say(f"{plan.host}: no uv ({error.what}); pip does it")
            return None
        return place

    def _by_uv(self, uv: str, part: str) -> None:
        plan = self._plan
        if plan.python is None:
            with self._step(f"install Python {plan.version}"):
                self._run([uv, "python", "install", plan.version])
        python = plan.python or plan.version
        with self._step("make the environment"):
            self._run([uv, "venv", "--relocatable", "--python", python, part])
        # uv then looks for torch in PyTorch's own index alone, and for nothing else there.
        torch = [f"--torch-backend={'auto' if plan.torch == 'cuda' else plan.torch}"]
        torch = torch if plan.torch != "default" and self._torch else []  # macOS has one build
        with self._step(f"install {len(plan.requirements)} packages by uv"):
            where = ["--python", f"{part}/bin/python"]
            self._run([uv, "pip", "install", *where, *torch, *plan.requirements])

    def _by_pip(self, part: str) -> None:
        plan = self._plan
        assert plan.python is not None, "pip comes with a Python that is there"
        with self._step("make the environment"):
            self._run([plan.python, "-m", "venv", part])
        with self._step(f"install {len(plan.requirements)} packages by pip"):
            pip = [f"{part}/bin/python", "-m", "pip", "install", "--disable-pip-version-check"]
            if plan.torch == "cpu" and self._torch:
                # Two steps, each with an index of its own: with --extra-index-url pip takes the
                # higher version of any package from either.
                self._run([*pip, "--no-deps", "--index-url", CPU_WHEELS, *self._torch])
            self._run([*pip, *plan.requirements])

    @property
    def _torch(self) -> list[str]:
        """The requirement of torch, if it is one of ours."""
        return [line for line in self._plan.requirements if re.match(r"torch\b(?!-)", line)]

    def _sh(self, text: str, *, must: bool = True) -> None:
        self._run(["sh", "-c", text], timeout_s=_SHORT_S, must=must)

    def _run(self, argv: Sequence[str], *, timeout_s: float = _STEP_S, must: bool = True) -> None:
        done = self._machine.run(argv, env=self._machine.spec.env, timeout_s=timeout_s)
        said = without_credentials((done.out + done.err).decode("utf-8", "replace"))
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(argv)}\n{said}\n")
        if done.code and must:
            tail = "\n".join(f"  | {line}" for line in said.strip().splitlines()[-_TAIL:])
            what = f"`{shlex.join(argv)[:120]}` ended with {done.code}"
            raise HostError(self._plan.host, what, f"all of it is in {self._log}\n{tail}")

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        self._say(f"{self._plan.host}: {what}...")
        yield
        self._say(f"{self._plan.host}: {what}: {time.monotonic() - began:.1f} s")


_MOST_BYTES = 200_000_000
# (system, architecture, libc): platform tags in the wheel's name, sha256. Only systems that
# task=setup does not refuse; the wheel of aarch64 is static, for glibc and musl alike.
_WHEELS = {
    ("linux", "x86_64", "glibc"): (
        "manylinux_2_17_x86_64.manylinux2014_x86_64",
        "d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19",
    ),
    ("linux", "x86_64", "musl"): (
        "musllinux_1_1_x86_64",
        "2c45530751517d6c3bbc69a19473f6effe47cce047bede01ffd8af7ea7b36b25",
    ),
    ("linux", "aarch64", ""): (
        "manylinux_2_17_aarch64.manylinux2014_aarch64.musllinux_1_1_aarch64",
        "5435c5ce14a56431208ca0996416d310f1598e8c2c8ba707688985a16bb82dbe",
    ),
    ("darwin", "arm64", ""): (
        "macosx_11_0_arm64",
        "66c512266d633bef48384a1f53003f41f2a8e7b36fe6e7fbfd3e0fd52d96fa63",
    ),
    ("darwin", "x86_64", ""): (
        "macosx_10_12_x86_64",
        "c16ed11e013557536b3e60065f1b912f6407bd6518e041b961e23ef9e6b4fbf5",
    ),
}


def wheel_of(host: str, found: BlankHost) -> Package:
    """The wheel for that system; HostError where none is pinned."""
    machine = found.architecture
    if found.system == "linux" and machine == "arm64":
        machine = "aarch64"
    libc = "musl" if found.libc == "musl" else "glibc"
    key = (found.system, machine, libc)
    pinned = _WHEELS.get(key) or _WHEELS.get((*key[:2], ""))
    if pinned is None:
        raise HostError(
            host,
            f"no uv is pinned for {found.system} on {machine}",
            "install Python 3.12 with pip there, or uv itself",
        )
    tags, sha256 = pinned
    return Package(
        client="pip",
        name="uv",
        version=UV_VERSION,
        file=f"uv-{UV_VERSION}-py3-none-{tags}.whl",
        sha256=sha256,
        megabytes=18,
        platform=tags.partition(".")[0],
        otherwise="look at this machine's network, or install uv on the host",
    )


def fetch_uv(host: str, found: BlankHost) -> bytes:
    """The program for that system; HostError where this machine cannot get it."""
    package = wheel_of(host, found)
    try:
        cache = platformdirs.user_cache_path("smolrun") / "data"  # beside packages of data sets
        wheel = fetched(cache, package, lambda *_: None)
    except DataError as error:
        raise HostError(host, str(error)) from None
    return program_of(host, wheel)


def program_of(host: str, wheel: Path) -> bytes:
    """The program in a wheel of uv."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.filename.endswith("/scripts/uv") and info.file_size <= _MOST_BYTES:
                return archive.read(info)
    raise HostError(host, f"{wheel.name} has no program in it")

"""Remote call: runs one script of `on_host/`, and its prelude.py, by the host's own Python.

The script and its request travel over stdin, so that nothing has to be installed there first and
nothing stands in the list of processes; the reply is one line of stdout behind a mark that is new
for each call, so that whatever a login shell prints cannot be taken for it.

    driver                                      host
      | -- program (script + request) --> stdin of `python -I -`
      | <-- "\\n<mark> {json}\\n" -------- stdout, perhaps with noise before
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from importlib import resources
from typing import Any

import msgspec

from smolrun.errors import HostError
from smolrun.launch.remote.answers import checked
from smolrun.launch.remote.connection import Completed, Connection, error_tail
from smolrun.launch.remote.shell import Shell, command
from smolrun.sanitize import all_in_one_line, one_line

OLDEST_PYTHON = (3, 8)
_PACKAGE = "smolrun.launch.on_host"

# Python 2 must be able to read this much, to say that it is too old.
_PROGRAM = """\
import sys
if sys.version_info < {oldest}:
    print({mark} + " old " + sys.version.split()[0])
    sys.exit(0)
import json, types
def load(name, source):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name.replace(".", "/") + ".py", "exec"), module.__dict__)
    return module
load("{package}.prelude", {prelude})
reply = load("{package}.{script}", {source}).main(json.loads({request}))
sys.stdout.write("\\n" + {mark} + " " + json.dumps(reply) + "\\n")
sys.stdout.flush()
"""


def call(
    connection: Connection,
    python: str,
    script: str,
    request: dict[str, Any],
    timeout_s: float = 60.0,
    *,
    shell: Shell = Shell.POSIX,
    cluster: str = "NAME",
) -> dict[str, Any]:
    """What `main(request)` of on_host/<script>.py returns there; HostError in every other case."""
    mark = f"smolrun-{secrets.token_hex(8)}"
    line = command(shell, [python, "-I", "-"])
    program = _program(script, request, mark)
    done = connection.run(line, data=program.encode("ascii"), timeout_s=timeout_s)
    for text in done.out.decode("utf-8", "replace").splitlines():
        if text.startswith(mark):
            answer = text.removeprefix(mark).strip()
            return _reply(connection.name, python, script, request.get("do"), answer, cluster)
    raise _no_reply(connection.name, python, script, done, cluster)


def _program(script: str, request: dict[str, Any], mark: str) -> str:
    folder = resources.files(_PACKAGE)
    # ascii(), because the other side's stdin may have any encoding; double, as JSON is text there.
    return _PROGRAM.format(
        oldest=OLDEST_PYTHON,
        mark=ascii(mark),
        package=_PACKAGE,
        script=script,
        prelude=ascii(folder.joinpath("prelude.py").read_text(encoding="utf-8")),
        source=ascii(folder.joinpath(f"{script}.py").read_text(encoding="utf-8")),
        request=ascii(json.dumps(request)),
    )


def _reply(
    host: str, python: str, script: str, do: str | None, text: str, cluster: str
) -> dict[str, Any]:
    """The answer, as its types have it and without what a terminal would obey."""
    if text.startswith("old "):
        raise _too_old(host, python, one_line(text.removeprefix("old ")), cluster)
    try:
        plain = all_in_one_line(json.loads(text, parse_constant=_refuse))
        return checked(script, do, plain)
    except msgspec.ValidationError as error:
        what = f"its answer to {script!r} is not valid: {error}"
    except (ValueError, RecursionError):
        what = f"its answer to {script!r} cannot be read: {text[:200]!r}"
    raise HostError(
        host, what, "check that this is the right machine and that its Python is CPython"
    )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _too_old(host: str, python: str, version: str, cluster: str) -> HostError:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    what = f"its {python} is Python {version}, which is older than {oldest}"
    return HostError(host, what, _get_python(cluster))


def _no_reply(host: str, python: str, script: str, done: Completed, cluster: str) -> HostError:
    """Why there is no answer, by its exit code and the tail of its output."""
    last = error_tail(done.err, done.out)
    if b"Unknown option: -I" in done.err:  # Python 2 knows no -I
        return _too_old(host, python, "2", cluster)
    if done.code == 127 or "not found" in last or "No such file" in last:
        return HostError(host, f"there is no Python at {python} ({last})", _get_python(cluster))
    return HostError(host, f"its {python} could not do {script!r}, exit code {done.code}: {last}")


def no_python(host: str, cluster: str, failures: Sequence[HostError] = ()) -> HostError:
    """The error of a host without a Python that can run a script of on_host/."""
    tried = "; " + "; ".join(error.what for error in failures) if failures else ""
    what = f"has no Python 3.8 or newer in any of the usual places{tried}"
    return HostError(host, what, _get_python(cluster))


def _get_python(cluster: str) -> str:
    return (
        f"smolrun task=setup cluster={cluster} installs one, or set `python:` in the cluster file"
    )

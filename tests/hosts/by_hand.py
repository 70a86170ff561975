"""A lab to try things in: `make lab`. Stays until Ctrl-C; what one types breaks its hosts."""

from __future__ import annotations

import argparse
import inspect
import shlex
import signal
import sys
from pathlib import Path

from tests.hosts.host import Host
from tests.hosts.lab import Lab, lab, missing
from tests.hosts.network import LabError

# What can be typed, and how it is called.
COMMANDS = {
    "cut": "cut 2            nothing gets to lab2 or from it, and nobody is told",
    "cut_in": "cut_in 2         the same in one direction; cut_out 2: in the other",
    "cut_out": "",
    "rate": "rate 2 10mbit    both directions of its cable",
    "lose": "lose 2 5         5 % of its packets",
    "heal": "heal 2           its cable is as it was at first",
    "freeze": "freeze 2         its processes stand still; thaw 2: they go on",
    "thaw": "",
    "processes": "processes 2      what runs on it",
    "end_sessions": "end_sessions 2   all SSH connections to it break",
    "new_host_key": "new_host_key 2   its SSH server shows another key",
}


def main() -> int:
    """Open a lab, say what to type, serve until the end of the input or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make lab")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--folder", type=Path, default=Path("build/lab"))
    parser.add_argument("--internet", action="store_true")
    given = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"make lab: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, ends in order
    options = {"hosts": given.hosts, "rate": given.rate, "internet": given.internet}
    try:
        with lab(folder=given.folder, **options) as the_lab:
            name = f"lab{given.hosts}"
            the_lab.write_cluster(the_lab.folder / "conf", name)
            print(welcome(the_lab, name), flush=True)
            serve(the_lab)
    except LabError as error:
        print(f"make lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    print("\nThe lab is gone.")
    return 0


def welcome(the_lab: Lab, cluster: str) -> str:
    """What there is, and what to type."""
    config = shlex.quote(str(the_lab.ssh_config))
    reached = [f"    ssh -F {config} {host.ssh}    # {host.address}" for host in the_lab.hosts]
    smolrun = shlex.quote(str(Path(sys.executable).with_name("smolrun")))
    return "\n".join(
        [
            f"{len(the_lab.hosts)} hosts are up. In another terminal:",
            *reached,
            f"    cd {shlex.quote(str(the_lab.folder))} && {smolrun} cluster={cluster}",
            "Here, with the number of a host:",
            *(f"    {line}" for line in COMMANDS.values() if line),
            "Ctrl-C ends the lab and all that runs on its hosts.",
        ]
    )


def serve(the_lab: Lab) -> None:
    """Do what is typed, line by line. Without a terminal it just waits."""
    if not sys.stdin.isatty():
        signal.pause()
    for line in sys.stdin:
        try:
            answer = obey(the_lab.hosts, line)
        except (LabError, ValueError) as error:
            answer = str(error)
        print(answer, flush=True)


def obey(hosts: list[Host], line: str) -> str:
    """Do one line, as "rate 2 10mbit"; the answer for people."""
    if not line.strip():
        return ""
    name, *words = line.split()
    if name not in COMMANDS:
        raise ValueError(f"{name!r} is none of {', '.join(COMMANDS)}")
    if not words or not words[0].isdigit() or not 1 <= int(words[0]) <= len(hosts):
        raise ValueError(f"which host? 1 to {len(hosts)}, as in `{name} 1`")
    host = hosts[int(words[0]) - 1]
    method = getattr(host, name)
    arguments = [float(word) if name == "lose" else word for word in words[1:]]
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None
    found = method(*arguments)
    if name == "processes":
        return "\n".join(f"{one.pid_there} {' '.join(one.command)}" for one in found) or "nothing"
    return "done"


if __name__ == "__main__":
    sys.exit(main())

"""The command `smolrun`: quick answers are given here, the rest is imported when it is needed.

Exit codes: 0 done, 2 bad configuration (nothing started), 3 a host or rank failed, 130 stopped by
the user, 131 stopped at once.
"""

from __future__ import annotations

import sys
from importlib import import_module


def main() -> int:
    """Run the command line of this process and give back its exit code."""
    arguments = sys.argv[1:]
    if "--worker" in arguments:
        return int(import_module("smolrun.tasks.worker").main() or 0)
    if "--help" in arguments or "-h" in arguments:
        return _say(import_module("smolrun.cli.help").text())
    if "--version" in arguments:
        return _say("smolrun " + import_module("importlib.metadata").version("smolrun"))
    try:
        if "--driver" in arguments:
            return int(import_module("smolrun.cli.driver").main())
        if "--start-driver" in arguments:
            return int(import_module("smolrun.cli.driver").start_main())
        return int(import_module("smolrun.cli.run").run(arguments))
    except KeyboardInterrupt:
        return 130


def _say(text: str) -> int:
    try:
        print(text, flush=True)  # noqa: T201  (our own text; nothing has to be loaded for it)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
    return 0

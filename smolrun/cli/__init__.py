"""The command `smolrun`: quick answers are given here, the rest is imported when it is needed.

Exit codes: 0 done, 2 bad configuration (nothing started), 3 a host or rank failed, 130 stopped by
the user, 131 stopped at once.
"""

from __future__ import annotations

import sys
from importlib import import_module

# Processes that another one of ours starts.
_DRIVERS = {
    "--driver": "main",
    "--sweep": "sweep_main",
    "--job": "job_main",
    "--estimate": "estimate_main",
    "--service": "service_main",
    "--start-driver": "start_main",
}
_READER_LEFT = 141  # what a shell reports of a program that SIGPIPE ended


def main() -> int:
    """Run the command line of this process and give back its exit code.

    A reader of stdout that leaves, such as `head`, ends it quietly.
    """
    try:
        code = _main(sys.argv[1:])
        sys.stdout.flush()  # here, as Python's own flush at the end would complain
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_left():
            raise  # of another pipe
        return _READER_LEFT
    return code


def _main(arguments: list[str]) -> int:
    if "--worker" in arguments:
        return int(import_module("smolrun.worker.process").main() or 0)
    if "--help" in arguments or "-h" in arguments:
        print(import_module("smolrun.cli.help").text())  # noqa: T201  (nothing has to be loaded)
        return 0
    if "--version" in arguments:
        print("smolrun " + import_module("importlib.metadata").version("smolrun"))  # noqa: T201
        return 0
    if "--trials" in arguments:
        return int(import_module("smolrun.cli.trials").main())
    for flag, start in _DRIVERS.items():
        if flag in arguments:
            return int(getattr(import_module("smolrun.cli.driver"), start)())
    return int(import_module("smolrun.cli.run").run(arguments))


def _reader_left() -> bool:
    """Whether stdout is a pipe without a reader; then what is left in its buffer goes nowhere."""
    try:
        # What could not be written is forgotten, so that a flush alone would succeed.
        print(flush=True)  # noqa: T201
    except BrokenPipeError:
        import_module("smolrun.files").to_null_device(sys.stdout.fileno())
        return True
    return False

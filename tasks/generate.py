"""task=generate: one answer of a model to stdout; everything else is said on stderr.

smolrun task=generate prompt="Why is the sky blue?"
smolrun task=generate model.run=latest < story.txt > rest.txt
"""

from __future__ import annotations

import contextlib
import os
import sys

from smolrun.config import RunConfig
from smolrun.driver.serving_client import CUT, connected, prompt_or_refuse
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_STOPPED
from smolrun.sanitize import echo, printable
from smolrun.tracking.console import Console


def drive(config: RunConfig) -> int:
    """Write the answer; returns the exit code. ConfigError, HostError: nothing was started."""
    prompt = prompt_or_refuse(config.generate.prompt, lambda: sys.stdin.read(), sys.stdin.isatty())
    console = Console(steps=1, world_size=1, stream=sys.stderr)
    try:
        with connected(config, console.say, console.preparing) as client:
            console.close()
            with contextlib.closing(client.answer([{"role": "user", "content": prompt}])) as answer:
                for text, is_thought in answer:
                    if not is_thought:
                        write(text)
            write("\n")
            if client.was_cut:
                echo(f"smolrun: {CUT}", error=True)
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except BrokenPipeError:  # the reader has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        console.close()
    return EXIT_DONE


def write(text: str) -> None:
    """To stdout at once: as it is into a file or a pipe, without control characters to a
    terminal."""
    shown = printable(text) if sys.stdout.isatty() else text
    sys.stdout.write(shown.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
    sys.stdout.flush()

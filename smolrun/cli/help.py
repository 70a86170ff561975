"""`smolrun --help`.

Written for people, made from conf/, and instant because nothing heavy is imported.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

from smolrun.cli import choices

HEAD = """\
smolrun trains and serves neural networks across the machines you already own.
It starts one process per rank, here or over SSH; ranks communicate over plain TCP sockets.

usage: smolrun [group=choice ...] [key=value ...]     one run; plain `smolrun` is a good first one
       smolrun -m group=a,b key=1,2                   a run for each combination, one after another

Config groups and options; * is the default. Each option is a file conf/<group>/<option>.yaml,
and a folder ./conf of your own has priority:
"""

TAIL = """
Every key of these files can be set too. The ones people change most:
  training.steps      training.global_batch_size   optimizer.lr   cluster.ranks   staleness.bound
  data.path           model.layers                 seed           run_name

Examples:
  smolrun                                                 a small GPT on two ranks of this machine
  smolrun algorithm=single training.steps=50              the same on one rank, shorter
  smolrun model=gpt_small cluster.ranks=4 precision=bf16  a larger model on four ranks
  smolrun model=mlp                                       another model, which brings its own data
  smolrun task=init                                       list your machines: cluster=home
  smolrun task=setup cluster=home                         install on them; task=doctor checks them
  smolrun cluster=home detach=true                        train on them, without this terminal
  smolrun -m staleness.bound=0,1,4 seed=1,2               six runs to compare

Also: --cfg job (the composed configuration, unchecked)   --info   --version   --hydra-help
      --config-dir DIR (more choices)   --config-name NAME (instead of config.yaml)
Tab completion: eval "$(smolrun -sc install=bash)"   (zsh and fish too; for your shell's start file)
Exit codes: 0 done, 2 bad configuration and nothing started, 3 a host or rank failed,
            130 stopped by you, 131 stopped at once
Every key is explained in docs/configuration.md."""


def text(beside: Path | None = None) -> str:
    """The whole help, as seen from the folder `beside` (default: the current one)."""
    own = choices.own_folder(beside or Path.cwd())
    folders = [own, choices.shipped_folder()] if own else [choices.shipped_folder()]
    found, defaults = choices.groups(folders), choices.defaults(folders)
    lines = []
    for group in [
        *(name for name in defaults if name in found),
        *sorted(found.keys() - defaults.keys()),
    ]:
        default = defaults.get(group)
        for number, choice in enumerate(
            sorted(found[group], key=lambda name: (name != default, name))
        ):
            title, star = group if number == 0 else "", "*" if choice == default else " "
            start = f"  {title:<12} {star} {choice:<18} "
            lines += wrap(
                found[group][choice], 100, initial_indent=start, subsequent_indent=" " * 36
            )
    return HEAD + "\n".join(lines) + "\n" + TAIL

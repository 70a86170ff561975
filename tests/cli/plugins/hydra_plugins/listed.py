"""A sweeper and a launcher of Hydra's, as small as they can be: the folder above on PYTHONPATH
installs them.

`hydra/sweeper=listed` runs the values that it is given, and writes what it is told into
`told.json` of the sweep. `hydra/launcher=pool` runs jobs in two processes at once. An environment
variable may name a script that runs in place of each job.
"""

# No `from __future__ import annotations`: Hydra runs this before the module is in sys.modules,
# where dataclasses would look for names.
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from smolrun.comparison import plots
from smolrun.sweep import runner

FAKE_JOB = "SMOLRUN_TESTS_FAKE_JOB"

if FAKE_JOB in os.environ:
    runner.COMMAND[:] = [sys.executable, "-S", "-E", os.environ[FAKE_JOB]]
    plots.can_plot = lambda: False  # that would take longer than the jobs


@dataclass
class ListedSweeperConf:
    """`n_jobs`: how many values are run before the sweeper looks at their results."""

    _target_: str = "hydra_plugins.listed.ListedSweeper"
    key: str = "optimizer.lr"
    values: list[Any] = field(default_factory=list)
    n_jobs: int = 1
    direction: str = "minimize"
    max_failure_rate: float = 0.0


@dataclass
class PoolLauncherConf:
    """Without keys."""

    _target_: str = "hydra_plugins.listed.PoolLauncher"


ConfigStore.instance().store(group="hydra/sweeper", name="listed", node=ListedSweeperConf)
ConfigStore.instance().store(group="hydra/launcher", name="pool", node=PoolLauncherConf)


class ListedSweeper(Sweeper):
    """Told in advance what to try."""

    def __init__(
        self, key: str, values: list[Any], n_jobs: int, direction: str, max_failure_rate: float
    ) -> None:
        self._jobs = [f"{key}={value}" for value in values]
        self._n_jobs = n_jobs
        self._max_failure_rate = max_failure_rate

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._folder = Path(config.hydra.sweep.dir)
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        items = OverridesParser.create().parse_overrides(arguments)
        steady = [str(item.input_line) for item in items if not item.is_sweep_override()]
        told: list[Any] = []
        for first in range(0, len(self._jobs), self._n_jobs):
            batch = [[job, *steady] for job in self._jobs[first : first + self._n_jobs]]
            # Counts from 0 each time, as a careless sweeper does.
            told += map(self._result, self._launcher.launch(batch, initial_job_idx=0))
            (self._folder / "told.json").write_text(json.dumps(told))

    def _result(self, returned: JobReturn) -> Any:
        try:
            return returned.return_value
        except Exception as error:
            if self._max_failure_rate < 1.0:
                raise
            return str(error)


class PoolLauncher(Launcher):
    """Two processes, which bring up Hydra by themselves, as those of joblib do."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._given = (hydra_context, task_function, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            jobs = [
                pool.submit(_execute, initial_job_idx + index, list(overrides), *self._given)
                for index, overrides in enumerate(job_overrides)
            ]
            return [job.result() for job in jobs]


def _execute(
    number: int,
    overrides: list[str],
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
) -> JobReturn:
    setup_globals()
    of_job = hydra_context.config_loader.load_sweep_config(config, overrides)
    of_job.hydra.job.id = of_job.hydra.job.num = number
    done = run_job(
        hydra_context=hydra_context,
        task_function=task_function,
        config=of_job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    done.hydra_cfg = None  # plain pickle cannot take it along
    return done

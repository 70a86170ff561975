"""The training loop: draw micro-batches, let the algorithm take a step, run the callbacks.

    before_training
    for every step:  before_step -> algorithm.train_step -> after_update (0 or more times)
    after_training

Everything else a run does beside training is a `Callback`. Every rank runs the same loop; the order
of the callbacks is one list in worker/train.py.

Knows no algorithm's name and no rank's number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from smolrun.algorithms.base import Algorithm, StepResult
from smolrun.algorithms.contract import BatchPart
from smolrun.data.splits import Batch
from smolrun.errors import CheckpointError


class Loader(Protocol):
    """Loads this rank's micro-batches."""

    def load(self, step: int, part: BatchPart | None = None) -> list[Batch]:
        """The micro-batches of one step, of this rank's share or of `part`; some may be empty."""


@dataclass
class TrainOutcome:
    """How training ended on this rank."""

    steps: int = 0  # updates, those before a resume included
    was_stopped: bool = False
    final_train_loss: float | None = None
    final_eval_loss: float | None = None  # of the last evaluation; None: this rank has none


class Callback:
    """Base class of what a run does beside training. Methods do nothing by default and run on the
    training thread. They may be collective: all ranks have their callbacks in the same order."""

    def before_training(self) -> None:
        """Called once, before the first step and after `restore`."""

    def before_step(self, step: int) -> None:
        """Called before every step of this rank."""

    def after_update(self, result: StepResult) -> None:
        """Called after every update of the run that this rank sees. `result.step` rises, but may
        skip numbers where a rank fell behind."""

    def after_training(self, outcome: TrainOutcome) -> None:
        """Called once, after the last update, also where the run was stopped; not after an
        error."""

    def state(self) -> Mapping[str, Any]:
        """The callback's keys in the training state of a checkpoint, as JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes its keys out of the training state of all callbacks and of the trainer. KeyError,
        TypeError or ValueError if they cannot be used."""


class Periodic(Callback):
    """Calls `run` after every `every` updates; 0: never."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._updates = 0

    def run(self, step: int, due: int) -> None:
        """Called right after the update of `step`; `due` is the multiple of `every` that was
        reached."""

    def after_update(self, result: StepResult) -> None:
        """Calls `run` if a multiple was reached. Where numbers were skipped, it runs once."""
        before, self._updates = self._updates, result.step + 1
        due = self._updates // self.every * self.every if self.every else 0
        if due > before:
            self.run(result.step, due)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the count of updates."""
        self._updates = int(state["steps"])


class Trainer:
    """Runs up to `steps` steps. `should_stop` is called once a step; when it returns True on any
    rank, all ranks stop at the same step. A stopped run finishes its pending updates only with
    `drain_on_stop`; otherwise they belong into a checkpoint, for the run that resumes it."""

    def __init__(
        self,
        algorithm: Algorithm,
        loader: Loader,
        *,
        steps: int,
        callbacks: Sequence[Callback],
        should_stop: Callable[[], bool],
        drain_on_stop: bool = True,
    ) -> None:
        self._algorithm = algorithm
        self._loader = loader
        self._steps = steps
        self._callbacks = callbacks
        self._should_stop = should_stop
        self._drain_on_stop = drain_on_stop
        self._outcome = TrainOutcome()

    def state(self) -> dict[str, Any]:
        """The training state of a checkpoint, as JSON: one flat mapping."""
        state = {"steps": self._outcome.steps, "train_loss": self._outcome.final_train_loss}
        for callback in self._callbacks:
            state |= callback.state()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues after the updates that a checkpoint has; call it before `fit`. CheckpointError
        if the state cannot be used."""
        try:
            self._outcome.steps = int(state["steps"])
            self._outcome.final_train_loss = state["train_loss"]
            for callback in self._callbacks:
                callback.restore(state)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved state of training cannot be used: {error}") from None

    def fit(self) -> TrainOutcome:
        """Trains to the end, or to the step at which the run was asked to stop."""
        algorithm, outcome = self._algorithm, self._outcome
        for callback in self._callbacks:
            callback.before_training()
        while not outcome.was_stopped and (share := algorithm.next_assignment(self._steps)):
            algorithm.wants_stop = self._should_stop()
            for callback in self._callbacks:
                callback.before_step(share.step)
            result = algorithm.train_step(self._loader.load(share.step, share.part))
            if result is not None:
                self._after_update(result)
        # A stop requested in the last step changes nothing.
        is_complete = algorithm.steps_begun >= self._steps
        if is_complete or self._drain_on_stop:
            for result in algorithm.drain():
                self._after_update(result)
        outcome.was_stopped = not is_complete
        for callback in self._callbacks:
            callback.after_training(outcome)
        return outcome

    def _after_update(self, result: StepResult) -> None:
        outcome = self._outcome
        outcome.steps, outcome.final_train_loss = result.step + 1, result.loss
        outcome.was_stopped |= result.wants_stop
        for callback in self._callbacks:
            callback.after_update(result)

"""The training loop, and nothing else: draw micro-batches, let the algorithm take a step, tell what
happened.

It holds no algorithm's name and no rank's number: every rank runs the same loop, and whoever
listens decides which rank's words count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from smolrun.algorithms.base import Algorithm, EvalSums, StepResult
from smolrun.algorithms.contract import BatchPart
from smolrun.data.base import Batch
from smolrun.errors import CheckpointError, TrainingError
from smolrun.events import (
    EvalDone,
    Event,
    GradientDropped,
    Norms,
    Note,
    RankStep,
    ReplicaHash,
    StepDone,
    StepSkipped,
)
from smolrun.parts.replicas import first_difference, gather_hashes, parameter_hash
from smolrun.training.balance import Balance
from smolrun.training.drift import Resync
from smolrun.training.spans import SpanRecorder
from smolrun.training.vitals import Vitals

# A float16 run skips a few steps while its loss scale settles; more in a row means that something
# is broken.
_MAX_SKIPPED = 20


class Samples(Protocol):
    """Where this rank's micro-batches come from."""

    def step(self, step: int, part: BatchPart | None = None) -> list[Batch]:
        """The micro-batches of one step, of this rank's share or of that part; some may be
        empty."""


@dataclass
class Outcome:
    """How training ended on this rank."""

    steps: int = 0
    was_stopped: bool = False
    final_train_loss: float | None = None
    final_eval_loss: float | None = None


class Trainer:
    """Runs up to `steps` steps. `should_stop` is asked once a step; when any rank is told to stop,
    all stop at the same step. `save(updates)` is called after every `save_every` updates and at the
    end, on all ranks alike; None: nothing is saved. `balance` hears of every update, and may give
    ranks other shares of the batch."""

    def __init__(
        self,
        algorithm: Algorithm,
        feed: Samples,
        *,
        steps: int,
        evaluate: Callable[[], EvalSums],
        eval_every: int,
        check_replicas: bool,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
        save_every: int = 0,
        save: Callable[[int], None] | None = None,
        timeline_steps: int = 0,
        resync_every: int | Literal["auto"] = 0,
        balance: Balance | None = None,
    ) -> None:
        self.outcome = Outcome()
        self._algorithm = algorithm
        self._feed = feed
        self._steps = steps
        self._evaluate = evaluate
        self._eval_every = eval_every
        self._check_replicas = check_replicas
        self._emit = emit
        self._should_stop = should_stop
        self._save_every = save_every
        self._save = save
        self._balance = balance
        self._mesh = algorithm.context.mesh
        self._vitals = Vitals()
        self._resync = Resync(algorithm, resync_every, emit)
        # Ranks that do not begin every step together have no common moment to count from.
        spans = timeline_steps if algorithm.is_lockstep else 0
        self._spans = SpanRecorder(algorithm, steps=spans, emit=emit)
        self._skipped_in_a_row = 0
        self._bytes = (0, 0)
        self._last_step_at = 0.0
        self._started_at = 0.0
        self._earlier_s = 0.0  # what the run had trained before it was interrupted
        self._evaluated_at = 0
        self._saved_at = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers of the loop, as JSON."""
        return {
            "time_s": self._earlier_s + time.perf_counter() - self._started_at,
            "steps": self.outcome.steps,
            "train_loss": self.outcome.final_train_loss,
            "eval_loss": self.outcome.final_eval_loss,
            "evaluated_at": self._evaluated_at,
            "skipped_in_a_row": self._skipped_in_a_row,
            "balance": self._balance.state() if self._balance else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on after the updates that a checkpoint has; call it before `fit`."""
        try:
            self._earlier_s = float(state["time_s"])
            self.outcome.steps = self._saved_at = int(state["steps"])
            self.outcome.final_train_loss = state["train_loss"]
            self.outcome.final_eval_loss = state["eval_loss"]
            self._evaluated_at = int(state["evaluated_at"])
            self._skipped_in_a_row = int(state["skipped_in_a_row"])
            if self._balance and state.get("balance"):
                self._balance.restore(state["balance"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved state of training cannot be used: {error}") from None

    def fit(self) -> Outcome:
        """Trains to the end, or to the step at which the run was asked to stop."""
        self._bytes = (self._mesh.bytes_sent, self._mesh.bytes_received)
        self._started_at = self._last_step_at = time.perf_counter()
        while share := self._algorithm.next_assignment(self._steps):
            self._algorithm.wants_stop = self._should_stop()
            self._spans.before(share.step, self._steps)
            result = self._algorithm.train_step(self._feed.step(share.step, share.part))
            if result is not None:
                self._finish(result)
            if self.outcome.was_stopped:
                break
        self._spans.finish()
        # Who was told to stop in the last step has nothing left to stop.
        is_over = self._algorithm.steps_begun >= self._steps
        # A run that was stopped goes on later: then its late gradients belong into the checkpoint.
        if is_over or self._save is None:
            for result in self._algorithm.drain():
                self._finish(result)
        self.outcome.was_stopped = not is_over
        if self._evaluated_at != self.outcome.steps and not self.outcome.was_stopped:
            self._eval()
        if self._save is not None and self._saved_at != self.outcome.steps:
            self._save(self.outcome.steps)
        return self.outcome

    def _finish(self, result: StepResult) -> None:
        """Everything that follows an update."""
        before, self.outcome.steps = self.outcome.steps, result.step + 1
        self.outcome.final_train_loss = result.loss
        self.outcome.was_stopped |= result.wants_stop
        self._tell(result)
        for rank, so_far in result.late.items():
            self._emit(GradientDropped(result.step, rank, so_far))
        self._check_finite(result)
        if _last_due(before, self.outcome.steps, self._resync.every):
            self._resync.run(result.step)
        if self._balance:
            told = self._balance.heard(result, self._algorithm.steps_begun, self._steps)
            if told:
                self._emit(Note("info", told))
        if self._check_replicas:
            self._compare_replicas(result.step)
        if _last_due(before, self.outcome.steps, self._eval_every):
            self._eval()
        # `fit` saves the last one, when all is done.
        due = _last_due(before, self.outcome.steps, self._save_every)
        if self._save and due and self.outcome.steps < self._steps:
            self._saved_at = self.outcome.steps
            self._save(due)

    def _compare_replicas(self, step: int) -> None:
        """TrainingError if any tensor that must be equal on all ranks is not; collective."""
        collectives, tensors = self._algorithm.collectives, self._algorithm.replica_tensors()
        if not tensors:
            return
        hashes = gather_hashes(collectives, parameter_hash(tensors.values()))
        self._emit(ReplicaHash(step, hashes))
        if len(set(hashes)) > 1:
            name = first_difference(collectives, tensors)
            raise TrainingError(f"replicas differ after step {step} in {name}: {', '.join(hashes)}")

    def _tell(self, result: StepResult) -> None:
        now = time.perf_counter()
        duration, self._last_step_at = now - self._last_step_at, now
        sent, received = self._mesh.bytes_sent, self._mesh.bytes_received
        figures: dict[str, Any] = {
            "compute_s": max(0.0, result.compute_s),  # a difference of sums: rounding may go below
            "wait_s": result.wait_s,
            "bytes_sent": sent - self._bytes[0],
            "bytes_received": received - self._bytes[1],
        }
        self._bytes = (sent, received)
        for event in result.events:
            self._emit(event)
        self._emit(
            RankStep(
                result.step,
                self._mesh.rank,
                waited_for=result.waited_for,
                samples=result.samples[self._algorithm.collectives.index]
                if result.samples
                else None,
                **figures,
                **self._vitals.read(),
            )
        )
        self._emit(
            StepDone(
                step=result.step,
                time_s=self._earlier_s + now - self._started_at,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.learning_rate,
                tokens=result.weight,
                tokens_per_s=result.weight / duration if duration > 0 else 0.0,
                **figures,
            )
        )

        if result.norms is not None:
            norms = result.norms
            self._emit(
                Norms(
                    result.step, norms["gradients"], norms.get("parameters"), norms.get("updates")
                )
            )

    def _check_finite(self, result: StepResult) -> None:
        if result.grad_norm is not None:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        self._emit(StepSkipped(result.step, list(result.culprits)))
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            ranks = ", ".join(str(rank) for rank in result.culprits) or "none alone"
            is_rounded = self._algorithm.context.precision.is_rounded
            raise TrainingError(
                f"{_MAX_SKIPPED} steps in a row had a gradient that is not a number, "
                f"last of rank {ranks} at step {result.step}; "
                f"lower optimizer.lr{', or try precision=float32' if is_rounded else ''}"
            )

    def _eval(self) -> None:
        if not self._algorithm.can_evaluate:
            return
        sums = self._evaluate()
        loss = sums.loss / sums.weight if sums.weight else float("nan")
        accuracy = None if sums.correct is None else sums.correct / max(1, sums.weight)
        self.outcome.final_eval_loss = loss
        self._evaluated_at = self.outcome.steps
        self._emit(EvalDone(self.outcome.steps - 1, loss, sums.weight, accuracy))
        # The next step's tokens per second are not about this.
        self._last_step_at = time.perf_counter()


def _last_due(before: int, now: int, every: int) -> int:
    """The last multiple of `every` that was reached; 0 if none was. A rank that was left behind
    may jump over steps, but not over what is due in them."""
    reached = now // every * every if every else 0
    return reached if reached > before else 0

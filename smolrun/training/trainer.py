"""The training loop, and nothing else: draw micro-batches, let the algorithm take a step, tell what
happened.

It holds no algorithm's name and no rank's number: every rank runs the same loop, and whoever
listens decides which rank's words count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from smolrun.algorithms.base import Algorithm, StepResult
from smolrun.data.base import Batch
from smolrun.errors import TrainingError
from smolrun.events import EvalDone, Event, RankStep, ReplicaHash, StepDone, StepSkipped
from smolrun.parts.replicas import gather_hashes, parameter_hash
from smolrun.training.feed import Feed
from smolrun.training.vitals import Vitals

# A float16 run skips a few steps while its loss scale settles; more in a row means that something
# is broken.
_MAX_SKIPPED = 20


@dataclass
class Outcome:
    """How training ended on this rank."""

    steps: int = 0
    was_stopped: bool = False
    final_train_loss: float | None = None
    final_eval_loss: float | None = None


class Trainer:
    """Runs `steps` steps. `should_stop` is asked once a step; when any rank is told to stop, all
    stop at the same step."""

    def __init__(
        self,
        algorithm: Algorithm,
        feed: Feed,
        *,
        steps: int,
        evaluate: Callable[[], tuple[float, int]],
        eval_every: int,
        check_replicas: bool,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
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
        self._mesh = algorithm.context.mesh
        self._vitals = Vitals()
        self._skipped_in_a_row = 0
        self._bytes = (0, 0)
        self._last_step_at = 0.0
        self._evaluated_at = 0

    def fit(self) -> Outcome:
        """Trains to the end, or to the step at which the run was asked to stop."""
        self._bytes = (self._mesh.bytes_sent, self._mesh.bytes_received)
        self._started_at = self._last_step_at = time.perf_counter()
        for step in range(self._steps):
            self._algorithm.wants_stop = self._should_stop()
            result = self._algorithm.train_step(self._feed.step(step))
            if result is not None:
                self._finish(result)
            if self.outcome.was_stopped:
                break
        for result in self._algorithm.drain():
            self._finish(result)
        if self._evaluated_at != self.outcome.steps and not self.outcome.was_stopped:
            self._eval()
        return self.outcome

    def _finish(self, result: StepResult) -> None:
        """Everything that follows an update."""
        self.outcome.steps = result.step + 1
        self.outcome.final_train_loss = result.loss
        self.outcome.was_stopped |= result.wants_stop
        self._tell(result)
        self._check_finite(result)
        if self._check_replicas and self._algorithm.replica_tensors():
            hashes = gather_hashes(
                self._algorithm.collectives, parameter_hash(self._algorithm.replica_tensors())
            )
            self._emit(ReplicaHash(result.step, hashes))
            if len(set(hashes)) > 1:
                raise TrainingError(
                    f"replicas differ after step {result.step}: {', '.join(hashes)}"
                )
        if self._eval_every and self.outcome.steps % self._eval_every == 0:
            self._eval()

    def _tell(self, result: StepResult) -> None:
        now = time.perf_counter()
        duration, self._last_step_at = now - self._last_step_at, now
        sent, received = self._mesh.bytes_sent, self._mesh.bytes_received
        figures: dict[str, Any] = {
            "compute_s": result.compute_s,
            "wait_s": result.wait_s,
            "bytes_sent": sent - self._bytes[0],
            "bytes_received": received - self._bytes[1],
        }
        self._bytes = (sent, received)
        self._emit(
            RankStep(
                result.step,
                self._mesh.rank,
                waited_for=result.waited_for,
                **figures,
                **self._vitals.read(),
            )
        )
        self._emit(
            StepDone(
                step=result.step,
                time_s=now - self._started_at,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.learning_rate,
                tokens=result.weight,
                tokens_per_s=result.weight / duration if duration > 0 else 0.0,
                **figures,
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
            raise TrainingError(
                f"{_MAX_SKIPPED} steps in a row had a gradient that is not a number, "
                f"last of rank {ranks} at step "
                f"{result.step}; lower optimizer.lr, or try precision=float32"
            )

    def _eval(self) -> None:
        loss_sum, weight = self._evaluate()
        loss = loss_sum / weight if weight else float("nan")
        self.outcome.final_eval_loss = loss
        self._evaluated_at = self.outcome.steps
        self._emit(EvalDone(self.outcome.steps - 1, loss, weight))
        self._last_step_at = (
            time.perf_counter()
        )  # the next step's tokens per second are not about this


@torch.no_grad()
def write_text(
    logits: Callable[[torch.Tensor], torch.Tensor],
    prompt: list[int],
    num_tokens: int,
    *,
    context_length: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 40,
) -> list[int]:
    """Token ids that the model writes after `prompt`; collective where `logits` is, and equal on
    all ranks.

    Every token runs the whole context again, so that it works for every way of splitting a model.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-context_length:]])
        last = logits(window)[0, -1]
        values, ids = last.topk(min(top_k, len(last)))
        choice = torch.multinomial(torch.softmax(values / temperature, 0), 1, generator=generator)
        tokens.append(int(ids[choice]))
    return tokens[len(prompt) :]


def evaluate(
    algorithm: Algorithm, batches: Callable[[], Iterable[list[Batch]]]
) -> tuple[float, int]:
    """Sum of losses and number of targets over all samples of all ranks; collective."""
    total, weight = 0.0, 0
    for micro_batches in batches():
        loss_sum, count = algorithm.eval_step(micro_batches)
        total, weight = total + loss_sum, weight + count
    return total, weight

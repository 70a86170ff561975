"""Model parallelism: every rank holds a stage of the model's layers, and a batch goes through all
stages and back.

    rank 0   [forward]                                  [backward]   update
    rank 1            [forward]              [backward]              update
    rank 2                     [forward][backward]                   update

So a model can be trained that no rank could hold; but all ranks but one wait (algorithm=mp_pipeline
keeps them busy). All ranks read the same samples: the first stage needs the tokens, the last the
targets. Each has the optimizer for its own layers; no parameter travels, only hidden states and
gradients of them. Where embedding and head are one matrix, the last stage has a copy: it sends its
gradient to the first one, which updates and saves the matrix, and sends the new values.

Source: Dean et al., "Large Scale Distributed Deep Networks", 2012 (model parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smolrun.algorithms import layer_cut
from smolrun.algorithms.base import Context, PendingUpdate
from smolrun.algorithms.partial_model import PartialModel
from smolrun.algorithms.single import Single
from smolrun.algorithms.stage_gradients import OpenStep, StageGradients
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice, Writer
from smolrun.collectives.api import new_group
from smolrun.data.splits import IGNORE_INDEX, Batch
from smolrun.models.base import StagedModel
from smolrun.parts.norms import combine_norms
from smolrun.parts.placement import DataCoordinates, least_of_stages, replica_weights
from smolrun.parts.replicas import model_tensors, sync_replicas
from smolrun.parts.stage_links import ACTIVATIONS, GRADIENTS, PendingReceive, StageLinks


class ModelParallel(PartialModel, Single):
    """One stage of layers; gradients wait for their update as in `single`."""

    more_copies = 0  # of the weights, beside those that every stage needs

    def __init__(
        self, context: Context, replicas: int = 1, *, layers: Sequence[Sequence[int]] | None
    ) -> None:
        super().__init__(context)
        self._layers = layers
        self.replicas, self.stages = replicas, self.collectives.size // replicas
        self.replica, self.stage = divmod(self.collectives.index, self.stages)
        self.is_first, self.is_last = self.stage == 0, self.stage == self.stages - 1
        alike = range(self.stage, self.collectives.size, self.stages)
        self.replica_group = new_group(context.mesh, alike, f"replicas of stage {self.stage}")
        self.logits_index = self.stages - 1
        self._speeds: list[float] = []  # as measured
        self.seed_words = (self.stage,) if self.stage else ()  # stages draw differently
        dtype = context.precision.parameters  # of hidden states, also under autocast
        first = self.replica * self.stages
        self.links = StageLinks(context.mesh, self.clock, dtype, context.quantization, first)

    def place(self, model: nn.Module) -> None:
        """Keeps this rank's stage of the model, and gives it its first values."""
        context, speeds = self.context, list(self.context.speeds or ())
        if is_measured := context.speeds is None and self._layers is None:
            speeds = layer_cut.measured_speeds(model, self.output_of, self.clock, self.collectives)
            self._speeds = speeds
        layers = layer_cut.cut_layers(
            model,
            self._layers,
            self.stages,
            precision=context.precision,
            copies=self.more_copies
            + layer_cut.copies_held(context.make_optimizer, context.precision, context.staleness),
            speeds=least_of_stages(speeds, self.stages),
            memory_bytes=least_of_stages(context.memory_bytes, self.stages),
        )
        assert isinstance(model, StagedModel), "else there is no cut"
        if is_measured:
            cut = layer_cut.cut_text(layers, replicas=self.replicas)
            self.note = f"speeds as measured: {cut}"
        self.width, tied = model.shape.width, model.tied_parameter
        self.layers = layers[self.stage]
        self.keep_part(model, lambda: model.keep_stage(self.layers, self.is_first, self.is_last))
        layer_cut.check_stage(model, context.mesh.rank)
        self._copied = tied if self.is_last and not self.is_first else None
        super().place(model)
        sync_replicas(self.replica_group, list(model.parameters()))
        self.running: nn.Module = model  # what a forward uses
        self.stage_gradients = StageGradients(self.replica_group, self.links, self.clock)
        matrix = dict(model.named_parameters()).get(tied or "")
        if matrix is not None and matrix.requires_grad and self.stages > 1:
            self.stage_gradients.tie(matrix, self.trained())

    def data_coordinates(self, speeds: Sequence[float]) -> DataCoordinates:
        """All stages of a replica read the same samples."""
        weights = replica_weights(self._speeds or speeds, self.stages)
        return DataCoordinates(self.replica, weights)

    def replica_tensors(self) -> dict[str, Tensor]:
        """This stage, where others hold it too."""
        return dict(model_tensors(self.model)) if self.replicas > 1 else {}

    # -- one micro-batch ----

    def forward(self, batch: Batch) -> Tensor | None:
        """Of a batch that needs no backward."""
        # So that a fast stage does not fill its memory with hidden states. Gradients of training
        # may still wait for the next step, in which they are received.
        self.links.finish(ACTIVATIONS)
        _, output = self.run_forward(batch, self.links.take(self.post_inputs(batch)))
        return output if self.is_last else None

    def post_inputs(self, batch: Batch) -> PendingReceive | None:
        """Starts to receive what this stage computes from; the first one has it."""
        shape = (*batch.inputs.shape, self.width)
        if self.is_first:
            return None
        return self.links.post(ACTIVATIONS, self.stage - 1, shape, exact=not self.model.training)

    def run_forward(self, batch: Batch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inputs and outputs of this stage, from the hidden states of the one before; sends the
        outputs to the next one."""
        inputs = batch.inputs if hidden is None else hidden.requires_grad_()
        batch = Batch(inputs, batch.targets, batch.position)
        if self.is_last:
            self.stage_gradients.refresh()
            return inputs, self.checked_logits(self.running, batch)
        output = self.output_of(self.running, batch)
        # An evaluation is that of the model that is saved, which runs without quantization.
        self.links.send(ACTIVATIONS, self.stage + 1, output, exact=not self.model.training)
        return inputs, output

    def post_gradient(self, batch: Batch) -> PendingReceive | None:
        """Starts to receive the gradient of this stage's outputs; the last one has the loss."""
        shape = (*batch.inputs.shape, self.width)
        return None if self.is_last else self.links.post(GRADIENTS, self.stage + 1, shape)

    def run_backward(
        self, batch: Batch, inputs: Tensor, output: Tensor, gradient: Tensor | None
    ) -> dict[str, float]:
        """Adds to every `parameter.grad`, from the gradient of the outputs or from the loss; sends
        the gradient of the inputs to the stage before."""
        stats = {"loss_sum": 0.0, "num_targets": 0.0}
        if gradient is None:
            loss = self.context.loss_sum(output, batch.targets)
            (loss * self.loss_scale.value).backward()
            num_targets = int((batch.targets != IGNORE_INDEX).sum())
            stats = {"loss_sum": loss.item(), "num_targets": num_targets}
        elif output.requires_grad:  # else all before this is frozen
            output.backward(gradient.to(output))
        if inputs.grad is not None:
            self.links.send(GRADIENTS, self.stage - 1, inputs.grad)
        return stats

    # -- a step ----

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """One micro-batch after the other, through all stages and back."""
        self.begin_step()
        stats = {"loss_sum": 0.0, "num_targets": 0.0}
        for batch in micro_batches:
            if len(batch.inputs):
                gradient = self.post_gradient(batch)
                passed = self.run_forward(batch, self.links.take(self.post_inputs(batch)))
                added = self.run_backward(batch, *passed, self.links.take(gradient))
                stats = {name: stats[name] + added[name] for name in stats}
        self.end_step()
        return stats

    def begin_step(self) -> OpenStep:
        """No gradients yet."""
        self.model.zero_grad(set_to_none=True)
        return self.stage_gradients.begin(self.steps_begun, self.loss_scale.value)

    def end_step(self) -> None:
        """The gradients are whole."""
        self.links.finish()
        self.stage_gradients.complete(self.steps_begun, self.keep_gradients())

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """Which stages have finite gradients is known in `wait_for`."""
        stats["is_finite"] = 1.0
        return PendingUpdate(self.steps_begun, *self.share_stats(stats))

    def wait_for(self, pending: PendingUpdate) -> None:
        """Blocks until the norms of all stages are known."""
        self._squares, are_finite = self.stage_gradients.wait(pending.step)
        super().wait_for(pending)
        pending.stats.replace("is_finite", are_finite)

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """Ends the step."""
        self.stage_gradients.refresh()
        norm = super().update(pending, weight, learning_rate)
        self.stage_gradients.end(pending.step, is_updated=norm is not None)
        return norm

    def norm_squared(self, gradients: list[Tensor]) -> float:
        """Over all stages; `wait_for` has waited for it."""
        return float(self._squares.sum())

    def measured_params(self) -> list[tuple[str, nn.Parameter]]:
        """Those of a stage, by one of its replicas."""
        return self.optimized_params if self.replica == 0 else []

    def whole_norms(self, norms: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Of all layers, on all ranks."""
        return combine_norms(norms, self.trained_names(), self.all_ranks)

    def wait_for_transfers(self) -> None:
        """Of a tied embedding."""
        self.stage_gradients.refresh()

    # -- what a checkpoint holds: the keys that the whole model would have ----

    def writer(self, name: str) -> Writer:
        """Any replica of its stage; the first stage writes what the last one has a copy of."""
        return "other" if name == self._copied else "any"

    def owned(self) -> Iterator[TensorSlice]:
        """Statistics of pending updates are written by the replicas of the first stage."""
        for part in super().owned():
            is_theirs = part.key.endswith("/facts") and not self.is_first
            yield replace(part, writer="other") if is_theirs else part

    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """Gradients in flight are those of all stages; their norm is not in a checkpoint."""
        super().restore(checkpoint, state)
        for pending in self.pending_updates:
            self.stage_gradients.resume(pending.step, self.pending_gradients(pending))

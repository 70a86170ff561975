"""Model parallelism: every rank holds a stage of the model's layers, and a batch goes through all
stages and back.

    rank 0   [forward]                                  [backward]   update
    rank 1            [forward]              [backward]              update
    rank 2                     [forward][backward]                   update

So a model can be trained that no rank could hold; but all ranks but one wait (algorithm=mp_pipeline
keeps them busy). All ranks read the same samples: the first stage needs the tokens, the last the
targets. Each has the optimizer for its own layers; no parameter travels, only hidden states and
gradients of them. Where embedding and head are one matrix, the first and the last stage both hold
it: they sum its gradient, and step it alike; the first one saves it and counts it in the norm.

Source: Dean et al., "Large Scale Distributed Deep Networks", 2012 (model parallelism); Press and
Wolf, "Using the Output Embedding to Improve Language Models", 2017 (tied embeddings).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Context, PendingUpdate
from smolrun.algorithms.layer_cut import copies_held, cut_layers
from smolrun.algorithms.single import Single
from smolrun.checkpoints.tensor_slice import TensorSlice, Writer
from smolrun.collectives.api import new_group
from smolrun.data.splits import IGNORE_INDEX, Batch
from smolrun.errors import ConfigError
from smolrun.mesh.mesh import Work
from smolrun.models.base import StagedModel
from smolrun.parts.norms import combine_norms, layer_of
from smolrun.parts.placement import DataCoordinates
from smolrun.parts.replicas import model_tensors, persistent_buffers
from smolrun.parts.stage_links import ACTIVATIONS, GRADIENTS, PendingReceive, StageLinks


class ModelParallel(Single):
    """One stage of layers; gradients wait for their update as in `single`."""

    needs_full_model = False
    more_copies = 0  # of the weights, beside those that every stage needs

    def __init__(self, context: Context, *, layers: Sequence[Sequence[int]] | None) -> None:
        super().__init__(context)
        self._layers = layers
        self.stage, self.stages = self.collectives.index, self.collectives.size
        self.is_first, self.is_last = self.stage == 0, self.stage == self.stages - 1
        self.logits_index = self.stages - 1
        self.seed_words = (self.stage,) if self.stage else ()  # stages draw differently
        dtype = context.precision.parameters  # of hidden states, also under autocast
        self.links = StageLinks(context.mesh, self.clock, dtype, context.quantization)

    def place(self, model: nn.Module) -> None:
        """Keeps this rank's stage of the model, and gives it its first values."""
        context = self.context
        layers = cut_layers(
            model,
            self._layers,
            self.stages,
            precision=context.precision,
            copies=self.more_copies
            + copies_held(context.make_optimizer, context.precision, context.staleness),
            speeds=context.speeds,
            memory_bytes=context.memory_bytes,
        )
        assert isinstance(model, StagedModel), "else there is no cut"
        self.width, tied = model.shape.width, model.tied_parameter
        self._whole = {
            name: nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
            for name, tensor in model_tensors(model)
        }
        self.layers = layers[self.stage]
        model.keep_stage(self.layers, self.is_first, self.is_last)
        for name, parameter in model.named_parameters():
            value = self.context.first_value(model, name, parameter)
            parameter.data = value.to(parameter.device, parameter.dtype)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"rank {context.mesh.rank} would have nothing to train: all parameters of its "
                "layers are frozen; set algorithm.layers so that each rank has some that are not"
            )
        if buffers := sorted(persistent_buffers(model)):
            raise ConfigError(
                f"the model has buffers ({', '.join(buffers[:3])}): a forward of one stage may "
                "change them unseen by the others; take algorithm=fsdp or classicdp"
            )
        super().place(model)
        self.running: nn.Module = model  # what a forward uses
        is_shared = tied is not None and self.stages > 1 and (self.is_first or self.is_last)
        self._tied = tied if is_shared else None
        if is_shared:
            ends = [self.collectives.ranks[0], self.collectives.ranks[-1]]
            self._ends = new_group(self.context.mesh, ends, "tied embedding")

    def data_coordinates(self, speeds: Sequence[float]) -> DataCoordinates:
        """All stages read the same samples."""
        return DataCoordinates(0, [1.0])

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
        self.optimizer.zero_grad(set_to_none=True)
        stats = {"loss_sum": 0.0, "num_targets": 0.0}
        for batch in micro_batches:
            if len(batch.inputs):
                gradient = self.post_gradient(batch)
                passed = self.run_forward(batch, self.links.take(self.post_inputs(batch)))
                added = self.run_backward(batch, *passed, self.links.take(gradient))
                stats = {name: stats[name] + added[name] for name in stats}
        self.links.finish()
        return stats

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """Both ends of the model sum the gradient of a matrix that they share."""
        pending = super().synchronize(stats)
        pending.works += self.sum_tied(self._delayed[-1])
        return pending

    def sum_tied(self, gradients: list[Tensor]) -> list[Work]:
        """Starts to sum the gradient of a matrix that this stage shares, if it does."""
        if self._tied not in (names := trained_names(self.model.named_parameters())):
            return []
        index = names.index(self._tied)
        gradients[index] = gradients[index].cpu()
        return [self._ends.all_reduce(gradients[index], async_op=True)]

    def norm_squared(self, gradients: list[Tensor]) -> float:
        """Over all stages."""
        return self._all_stages(self.own_squares(gradients)).item()

    def own_squares(self, gradients: list[Tensor]) -> Tensor:
        """The squared norm of what this stage adds to the gradient: each parameter counts once."""
        named = zip(trained_names(self.model.named_parameters()), gradients, strict=True)
        own = [gradient for name, gradient in named if self.writer(name) == "this"]
        return torch.tensor(super().norm_squared(own), dtype=torch.float64)

    def whole_norms(self, norms: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Of all layers, on all ranks."""
        if self._tied is not None and self.is_last:
            for kind in norms.values():
                kind.pop(layer_of(self._tied), None)
        return combine_norms(norms, trained_names(self._whole.items()), self._all_stages)

    def _all_stages(self, own: Tensor) -> Tensor:
        """The sum over all stages, in place."""
        self.clock.wait(self.collectives.all_reduce(own, async_op=True))
        return own

    # -- what a checkpoint holds: the keys that the whole model would have ----

    def writer(self, name: str) -> Writer:
        """The first stage writes what the last one holds too."""
        return "other" if self.is_last and name == self._tied else "this"

    def model_slices(self) -> Iterator[TensorSlice]:
        """This stage's, and no element of the others."""
        yield from super().model_slices()
        held = dict(model_tensors(self.model))
        for name, parameter in self._whole.items():
            if name not in held:
                nothing = torch.empty(0, dtype=parameter.dtype)
                yield TensorSlice(f"model/{name}", tuple(parameter.shape), 0, nothing, "other")

    def is_on_other_rank(self, name: str) -> bool:
        """Whether this rank has no part of a parameter."""
        return name in self._whole and name not in dict(self.optimized_params)

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """Of all stages, without values."""
        yield from self._whole.values()


def trained_names(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Of the parameters that are trained."""
    return [name for name, parameter in named if parameter.requires_grad]

"""Expert parallelism: every rank holds some of the experts of every block and a replica of all
else, and trains on its share of the batch.

    rank 0   attention, router ][ dispatch ][ experts 0 to 2 ][ combine ] next block ...
    network                    tokens to their experts,   and back
    rank 1   attention, router ][ dispatch ][ experts 3 to 5 ][ combine ] next block ...

A token's hidden state goes to the ranks that hold its experts, and what they make of it comes back;
backward takes the same way in the other direction (parts/token_exchange.py). So an expert sees the
tokens of all ranks and its gradient is complete where it is. All other gradients are summed in
buckets as in classicdp, by collectives of another group, so they travel beside the tokens.

With staleness K all updates, those of experts too, apply the gradients of K steps ago; the exchange
of tokens is part of computing them and is never late.

Source: Lepikhin et al., "GShard", 2020; Fedus et al., "Switch Transformers", 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.algorithms.classicdp import ClassicDP, device_class, gather_classes
from smolrun.algorithms.layer_cut import copies_held
from smolrun.algorithms.partial_model import PartialModel
from smolrun.algorithms.single import unscaled_gradient
from smolrun.checkpoints.tensor_slice import Writer
from smolrun.collectives.api import new_group
from smolrun.data.splits import Batch
from smolrun.errors import ConfigError
from smolrun.models.feed_forward import MixtureOfExperts
from smolrun.parts.norms import combine_norms, squared_norm
from smolrun.parts.placement import cut
from smolrun.parts.token_exchange import TokenExchange


def ep(context: Context, *, bucket_mb: float) -> Algorithm:
    """Experts over ranks; replicas of the rest may differ where ranks are of different device
    classes. Collective."""
    algorithm = ExpertParallel(context, bucket_mb=bucket_mb)
    classes = gather_classes(algorithm.collectives, device_class(context.device))
    algorithm.replicas_may_differ = len(set(classes)) > 1
    return algorithm


class ExpertParallel(PartialModel, ClassicDP):
    """Experts are trained where they are, all else as in classicdp."""

    runs_empty_batches = True

    def place(self, model: nn.Module) -> None:
        """Keeps this rank's experts and a replica of the rest. Collective."""
        context = self.context
        self.experts = expert_ranges(
            model,
            self.collectives.size,
            number_bytes=context.precision.parameters.itemsize
            * copies_held(context.make_optimizer, context.precision, context.staleness),
            speeds=context.speeds or (),
            memory_bytes=context.memory_bytes,
        )
        own = self.experts[self.collectives.index]
        placed = (f"{one[0]} to {one[-1]} on rank {rank}" for rank, one in enumerate(self.experts))
        self.note = f"experts of every block: {', '.join(placed)}"
        group = new_group(self.context.mesh, self.collectives.ranks, "tokens")
        exchange = TokenExchange(group, self.experts, self.clock.wait)

        def keep_own() -> None:
            for layer in layers_of_experts(model):
                layer.keep(own)
                layer.run_experts = functools.partial(exchange.run, layer.run_own)

        self.keep_part(model, keep_own)
        self._own = {own for one in layers_of_experts(model) for own in one.experts.parameters()}
        self._names = {name for name, own in model.named_parameters() if own in self._own}
        self._gradients: dict[int, list[Tensor]] = {}  # of own experts, by step, until its update
        super().place(model)
        self._trained = [own for _, own in self.optimized_params if own.requires_grad]

    def replicated(self) -> list[nn.Parameter]:
        """All but the experts."""
        return [own for own in self.model.parameters() if own not in self._own]

    def replica_tensors(self) -> dict[str, Tensor]:
        """All but the experts."""
        whole = super().replica_tensors()
        return {name: whole[name] for name in whole if name not in self._names}

    # -- a step ----

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Backward leaves the gradients of own experts, summed over the tokens of all ranks."""
        trained = [own for own in self._trained if own in self._own]
        for parameter in trained:
            parameter.grad = None
        stats = super().forward_backward(micro_batches)
        gradients = [unscaled_gradient(own, self.loss_scale.value) for own in trained]
        self._gradients[self.steps_begun] = gradients
        self._is_finite &= all(bool(torch.isfinite(one).all()) for one in gradients)
        return stats

    def bind_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """The buckets, then those of own experts."""
        own = self._gradients.pop(pending.step)
        trained = (parameter for parameter in self._trained if parameter in self._own)
        for parameter, gradient in zip(trained, own, strict=True):
            parameter.grad = gradient.to(parameter.device)
        return [*super().bind_gradients(pending), *own]

    def norm_squared(self, gradients: list[Tensor]) -> float:
        """The buckets are equal on all ranks; experts are added up."""
        shared = len(self.buckets.buckets)
        own = torch.tensor([squared_norm(gradients[shared:])], dtype=torch.float64)
        return squared_norm(gradients[:shared]) + float(self.all_ranks(own))

    def measured_params(self) -> list[tuple[str, nn.Parameter]]:
        """Own experts; the first rank also takes the norms of what all have."""
        is_first = self.collectives.index == 0
        return [(name, p) for name, p in self.optimized_params if is_first or p in self._own]

    def whole_norms(self, norms: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Of all ranks."""
        return combine_norms(norms, self.trained_names(), self.all_ranks)

    # -- what a checkpoint holds ----

    def writer(self, name: str) -> Writer:
        """An expert has one rank that can write it."""
        return "this" if name in self._names else "any"

    def pending_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """In the order of the model; of experts, memory to load into where a run resumes."""
        experts = [own for own in self._trained if own in self._own]
        own = self._gradients.setdefault(pending.step, [torch.zeros_like(p) for p in experts])
        shared = iter(super().pending_gradients(pending))
        found = dict(zip(experts, own, strict=True))
        return [found[p] if p in found else next(shared) for p in self._trained]


def layers_of_experts(model: nn.Module) -> list[MixtureOfExperts]:
    """One for each block."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def expert_ranges(
    model: nn.Module,
    num_ranks: int,
    *,
    number_bytes: int,
    speeds: Sequence[float] = (),
    memory_bytes: Sequence[float] = (),
) -> list[range]:
    """Which experts of every block each rank holds: those with which the slowest is done as early
    as possible if all experts get equally many tokens, within the ranks' memory. A parameter takes
    `number_bytes`, its gradient and the optimizer included; no speeds: all alike; no bytes: without
    limit. ConfigError where that cannot be."""
    layers = layers_of_experts(model)
    if not layers:
        raise ConfigError(
            f"algorithm=ep places experts, and {type(model).__name__} has none that it knows; take "
            "model=moe_tiny or moe_small, or algorithm=classicdp"
        )
    count = layers[0].moe.experts
    if count < num_ranks:
        raise ConfigError(
            f"the model has {count} experts in a block, too few for {num_ranks} ranks: every rank "
            f"needs one; take cluster.ranks={count}, or a model with more model.moe.experts"
        )
    experts = number_bytes * sum(p.numel() for one in layers for p in one.experts.parameters())
    shared = number_bytes * sum(p.numel() for p in model.parameters()) - experts
    found = cut(
        [1.0] * count,
        speeds or [1.0] * num_ranks,
        sizes=[experts / count] * count,
        limits=[limit - shared for limit in memory_bytes] or None,
    )
    if found is None:
        free = ", ".join(f"{limit / 2**30:.1f} GB" for limit in memory_bytes)
        raise ConfigError(
            f"every rank needs {shared / 2**30:.1f} GB for what is no expert, and the experts "
            f"{experts / 2**30:.1f} GB together, with gradients and optimizer; no placement fits "
            f"the ranks' memory_gb ({free}); add hosts, or take algorithm=fsdp"
        )
    return found.layers

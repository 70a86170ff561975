"""The feed-forward layer of a block: a dense one, or experts of which every token goes through a
few.

    hidden [T, D] -> router -> the top-k experts of each token
                  -> rows [A, D], one for a token and expert, sorted by expert -> experts
                  -> weighted sum of the rows of each token

A layer of experts gives its rows to `run_experts`: its own experts, unless an algorithm puts others
there. It knows nothing of ranks.

Shape suffixes: B batch, T tokens, D width, F feed-forward width, E experts, K experts per token,
A assignments (a token and one of its experts).

Source: arXiv:2002.05202 (SwiGLU), 1606.08415 (GELU), 2101.03961 (Switch: balance loss, capacity),
2202.08906 (ST-MoE: z-loss), 2401.04088 (Mixtral: top-k, weights that add up to 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolrun.models.shape import DecoderShape, MoeShape


class FeedForward(nn.Module):
    """Feed-forward of each token: width -> ffn_width -> width."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.is_gated = shape.activation == "swiglu"
        if self.is_gated:
            self.gate = nn.Linear(shape.width, shape.ffn_width, bias=shape.mlp_bias)
        self.up = nn.Linear(shape.width, shape.ffn_width, bias=shape.mlp_bias)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=shape.mlp_bias)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        if self.is_gated:
            inner_BTF = F.silu(self.gate(hidden_BTD)) * self.up(hidden_BTD)
        else:
            # GPT-2's GELU is the tanh approximation; its checkpoints need exactly this one.
            inner_BTF = F.gelu(self.up(hidden_BTD), approximate="tanh")
        output_BTD: Tensor = self.down(inner_BTF)
        return output_BTD


class Routing(NamedTuple):
    """What a router decided in one forward: tokens that every expert gets, assignments that were
    dropped for lack of capacity, and its auxiliary losses for each sequence."""

    tokens_E: Tensor  # int64
    dropped: int
    auxiliary_B: Tensor


class _Assignments(NamedTuple):
    """Sorted by expert: which token, and its expert's weight."""

    token_A: Tensor
    weight_A: Tensor


class MixtureOfExperts(nn.Module):
    """A router, and experts that are feed-forward layers of their own."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        assert shape.moe is not None, "a layer of experts"
        self.moe = shape.moe
        self.router = Router(shape.width, shape.moe.experts, bias=False)
        numbers = range(shape.moe.experts)
        self.experts = nn.ModuleDict({str(number): FeedForward(shape) for number in numbers})
        # (rows [A, D] sorted by expert, how many belong to each) -> what the experts make of them
        self.run_experts: Callable[[Tensor, Tensor], Tensor] = self.run_own

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Routing]:
        """What the experts add, and where the tokens went. Capacity holds in training only."""
        logits_BTE = self.router(hidden_BTD)
        capacity = self.moe.capacity(hidden_BTD.shape[1]) if self.training else None
        assignments, routing = route(logits_BTE, self.moe, capacity)
        rows_TD = hidden_BTD.flatten(0, 1)
        made_AD = self.run_experts(rows_TD[assignments.token_A], routing.tokens_E)
        made_AD = made_AD * assignments.weight_A.to(made_AD.dtype).unsqueeze(1)
        added_TD = torch.zeros_like(rows_TD, dtype=made_AD.dtype)
        added_TD = added_TD.index_add(0, assignments.token_A, made_AD)
        return added_TD.view_as(hidden_BTD), routing

    def keep(self, experts: range) -> None:
        """Drops all others, in place."""
        for number in [number for number in self.experts if int(number) not in experts]:
            del self.experts[number]

    def run_own(self, rows_AD: Tensor, tokens_E: Tensor) -> Tensor:
        """All experts held here, each on its rows. One without rows runs too: so its gradients are
        zeros, and the graph is the same on all ranks."""
        parts = rows_AD.split(tokens_E.tolist())
        pairs = zip(self.experts.values(), parts, strict=True)
        return torch.cat([expert(part) for expert, part in pairs])


class Router(nn.Linear):
    """Logits of the experts, in the weight's precision, also under autocast."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def route(logits_BTE: Tensor, moe: MoeShape, capacity: int | None) -> tuple[_Assignments, Routing]:
    """The experts of every token. Of each sequence an expert takes `capacity` tokens at most: first
    choices before second ones, earlier tokens before later ones. So what is dropped does not depend
    on the other sequences of a batch, nor on how many ranks share it."""
    prob_BTE, weight_BTK, expert_BTK = choose(logits_BTE, moe)
    chosen_BTKE = F.one_hot(expert_BTK, moe.experts)
    token = torch.arange(expert_BTK[..., 0].numel(), device=expert_BTK.device)
    token_A = token.repeat_interleave(moe.experts_per_token)
    weight_A, expert_A = weight_BTK.flatten(), expert_BTK.flatten()
    if capacity is not None:
        kept = _within(chosen_BTKE, capacity).flatten()
        token_A, weight_A, expert_A = token_A[kept], weight_A[kept], expert_A[kept]
    order = expert_A.argsort(stable=True)
    return _Assignments(token_A[order], weight_A[order]), Routing(
        F.one_hot(expert_A, moe.experts).sum(0),
        expert_BTK.numel() - len(expert_A),
        auxiliary_loss(logits_BTE.to(prob_BTE.dtype), prob_BTE, chosen_BTKE, moe),
    )


def choose(logits_E: Tensor, moe: MoeShape) -> tuple[Tensor, Tensor, Tensor]:
    """For logits [..., E]: the probabilities, and [..., K] weights and numbers of the experts."""
    dtype = torch.promote_types(logits_E.dtype, torch.float32)
    prob_E = logits_E.softmax(-1, dtype=dtype)
    weight_K, expert_K = prob_E.topk(moe.experts_per_token)
    if moe.norm_topk_prob:
        weight_K = weight_K / weight_K.sum(-1, keepdim=True)
    return prob_E, weight_K, expert_K


def _within(chosen_BTKE: Tensor, capacity: int) -> Tensor:
    """[B, T, K]: whether an assignment is among the first `capacity` of its sequence and expert."""
    in_order_BAE = chosen_BTKE.transpose(1, 2).flatten(1, 2)
    place_BA = (in_order_BAE.cumsum(1) * in_order_BAE).sum(-1)
    kept_BKT: Tensor = (place_BA <= capacity).unflatten(1, chosen_BTKE.shape[2:0:-1])
    return kept_BKT.transpose(1, 2)


def auxiliary_loss(
    logits_BTE: Tensor, prob_BTE: Tensor, chosen_BTKE: Tensor, moe: MoeShape
) -> Tensor:
    """[B], of each sequence alone, so that the losses of any batches add up: `balance_loss` times
    what is 1 where all experts get equally many of its tokens and more where they do not, and
    `z_loss` times the mean square of logsumexp, which keeps logits small."""
    share_BE = chosen_BTKE.to(prob_BTE.dtype).mean((1, 2))
    balance_B = moe.experts * (share_BE * prob_BTE.mean(1)).sum(-1)
    z_B = logits_BTE.logsumexp(-1).square().mean(1)
    loss_B: Tensor = moe.balance_loss * balance_B + moe.z_loss * z_B
    return loss_B

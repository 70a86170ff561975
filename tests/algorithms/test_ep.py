"""ep against `single` on the same global batches, whatever the ranks hold, wherever tokens go."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from smolrun.algorithms.ep import ExpertParallel, ep, expert_ranges
from smolrun.algorithms.experts import expert_tokens
from smolrun.cli.compose import compose
from smolrun.collectives.api import new_group
from smolrun.data.splits import Batch
from smolrun.errors import ConfigError, PeerLost
from smolrun.mesh.mesh import Mesh
from smolrun.models.decoder import Decoder
from smolrun.models.shape import completed_shape
from smolrun.parts.norms import LayerNorms
from smolrun.parts.quantization import Quantization
from smolrun.parts.token_exchange import TokenExchange
from smolrun.testing import run_ranks
from tests.algorithms import worlds
from tests.algorithms.test_equivalence import difference
from tests.algorithms.test_saved import contents, run_part, same
from tests.algorithms.worlds import Trace, train
from tests.models.tiny import MOE, TINY

INT8 = Quantization("int8")


@functools.cache
def one_rank(model: str, staleness: int = 0, optimizer: str = "sgd") -> Trace:
    return train("single", model, 1, steps=5, staleness=staleness, optimizer=optimizer)[0]


def assert_equal(traces: list[Trace], reference: Trace) -> None:
    for trace in traces:
        assert difference(trace, reference) <= 1e-12
        assert trace.losses == pytest.approx(reference.losses, abs=1e-12)
        assert [one.grad_norm for one in trace.results] == pytest.approx(
            [one.grad_norm for one in reference.results], abs=1e-12
        )
        assert trace.hashes == traces[0].hashes
        for found, expected in zip(trace.results, reference.results, strict=True):
            assert expert_tokens(found.stats) == expert_tokens(expected.stats)
        assert trace.eval is not None
        assert reference.eval is not None
        assert trace.eval.loss == pytest.approx(reference.eval.loss, abs=1e-10)
        assert trace.logits is not None
        assert torch.allclose(trace.logits, reference.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("model", ["experts", "dropping"])
def test_equals_single(model: str, world_size: int) -> None:
    reference = one_rank(model)
    dropped = sum((expert_tokens(one.stats) or ([], 0))[1] for one in reference.results)
    assert (dropped > 0) is (model == "dropping")
    assert_equal(train("ep", model, world_size, steps=5), reference)


def test_equals_single_on_torch_distributed() -> None:
    assert_equal(train("ep", "experts", 3, steps=5, kind="torch"), one_rank("experts"))


def test_equals_single_with_recomputed_blocks_and_a_tied_embedding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = functools.partial(worlds.experts, tie_embeddings=True)
    monkeypatch.setitem(worlds.DECODERS, "plain", make)
    monkeypatch.setitem(worlds.DECODERS, "again", functools.partial(make, recompute=True))
    reference = train("single", "plain", 1, steps=3)[0]
    assert_equal(train("ep", "again", 3, steps=3, micro_batch_size=1), reference)


@pytest.mark.parametrize(
    "speeds", [pytest.param([3.0, 1.0], marks=pytest.mark.soak), [1.0, 0.0, 2.0]]
)
def test_shares_by_speed_change_who_computes_but_not_what(speeds: list[float]) -> None:
    """A rank without samples computes the tokens of the others."""
    traces = train("ep", "experts", len(speeds), steps=5, speeds=speeds, micro_batch_size=2)
    assert_equal(traces, one_rank("experts"))


@pytest.mark.parametrize(
    ("staleness", "optimizer"), [(1, "adamw"), pytest.param(3, "sgd", marks=pytest.mark.soak)]
)
def test_late_updates_of_experts_equal_a_single_process(staleness: int, optimizer: str) -> None:
    keys: dict[str, Any] = {"steps": 5, "staleness": staleness, "optimizer": optimizer}
    assert_equal(train("ep", "experts", 3, **keys), one_rank("experts", staleness, optimizer))


@pytest.mark.parametrize(
    "precision",
    [
        "bf16",
        pytest.param("float32", marks=pytest.mark.soak),
        pytest.param("fp16", marks=pytest.mark.soak),
    ],
)
def test_replicas_are_bit_equal_over_sockets(precision: str) -> None:
    keys: dict[str, Any] = {"steps": 4, "optimizer": "adamw", "kind": "tls"}
    keys["more"] = {"expected_weight": 1 << 14}
    traces = train("ep", "experts", 3, precision=precision, staleness=1, **keys)
    assert traces[0].hashes == traces[1].hashes == traces[2].hashes
    assert len(set(traces[0].hashes)) > 2
    reference = train("single", "experts", 1, precision=precision, steps=4)[0]
    assert traces[0].losses[0] == pytest.approx(reference.losses[0], rel=0.01)


def test_gradients_of_replicas_travel_in_fewer_bits() -> None:
    exact = one_rank("experts")
    for trace in train("ep", "experts", 2, steps=5, more={"quantization": INT8}):
        assert trace.losses == pytest.approx(exact.losses, rel=0.01)
        assert 0 < difference(trace, exact) < 0.05


def test_all_of_the_model_learns_in_one_step() -> None:
    torch.manual_seed(0)
    before = worlds.DECODERS["experts"]().double()
    after = train("ep", "experts", 3, steps=1)[0].parameters
    assert any("experts.3.down" in name for name in after)
    for name, value in before.named_parameters():
        assert not torch.equal(value, after[name]), name


def favourite(model: torch.nn.Module) -> torch.nn.Module:
    """Every token goes to experts 0 and 1."""
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            torch.nn.init.zeros_(parameter)
    return model


def test_all_tokens_to_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    make = functools.partial(worlds.experts, experts_per_token=1, balance_loss=0.0)
    monkeypatch.setitem(worlds.DECODERS, "favourite", lambda: favourite(make()))
    reference = train("single", "favourite", 1, steps=2)[0]
    tokens, _ = expert_tokens(reference.results[0].stats) or ([], 0)
    assert [sorted(layer)[:3] for layer in tokens] == [[0, 0, 0]] * 2
    assert_equal(train("ep", "favourite", 4, steps=2), reference)


@pytest.mark.parametrize("kind", ["all"])
def test_norms_of_layers_are_those_of_the_whole(kind: Any) -> None:
    more = {"norms": LayerNorms(kind, 2)}
    reference = train("single", "experts", 1, steps=3, more=more)[0].results
    for trace in train("ep", "experts", 3, steps=3, more=more):
        for one, other in zip(trace.results, reference, strict=True):
            assert (one.norms is None) == (other.norms is None)
            for what, layers in (other.norms or {}).items():
                assert (one.norms or {})[what] == pytest.approx(layers, rel=1e-9)


def test_a_nan_in_one_expert_is_skipped_by_all_and_its_rank_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backward = ExpertParallel.forward_backward

    def poisoned(self: ExpertParallel, micro_batches: Any) -> dict[str, float]:
        hurt = dict(self.model.named_parameters()).get("blocks.1.feed_forward.experts.3.up.weight")
        hooks = []
        if self.steps_begun == 2 and hurt is not None:
            hooks.append(hurt.register_hook(lambda gradient: gradient * torch.nan))
        stats = backward(self, micro_batches)
        for hook in hooks:
            hook.remove()
        return stats

    monkeypatch.setattr(ExpertParallel, "forward_backward", poisoned)
    for trace in train("ep", "experts", 3, steps=5):
        assert [one.step for one in trace.results if one.grad_norm is None] == [2]
        assert trace.results[2].nonfinite_ranks == (2,)
        assert trace.hashes[1] == trace.hashes[2] != trace.hashes[3]
        assert all(torch.isfinite(tensor).all() for tensor in trace.parameters.values())


def test_a_rank_lost_during_dispatch_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    move, lost = TokenExchange.move, []

    def dies(self: TokenExchange, *args: Any) -> torch.Tensor:
        if self._group.index == 1 and not lost:
            lost.append(True)
            self._group.mesh.close()
        return move(self, *args)

    found: list[BaseException] = []

    def rank_main(mesh: Mesh) -> None:
        runner = ep(worlds.context(mesh, "float64", "sgd", 0), bucket_mb=4.0)
        torch.manual_seed(0)
        runner.place(copy.deepcopy(start))
        plan = worlds.plan_of(runner)
        monkeypatch.setattr(TokenExchange, "move", dies)
        try:
            runner.train_step(worlds.share(worlds.sample("experts", 0), plan, 0))
        except Exception as error:
            if mesh.rank != 1:
                found.append(error)

    start = worlds.DECODERS["experts"]().double()
    run_ranks(3, rank_main, kind="tcp")
    assert len(found) == 2
    assert all(isinstance(error, PeerLost) for error in found), found


def test_a_peer_cannot_announce_any_number_of_rows() -> None:
    def rank_main(mesh: Mesh) -> str:
        exchange = TokenExchange(new_group(mesh), [range(1), range(1, 2)], lambda work: work.wait())
        counts = torch.tensor([1, 2**40 if mesh.rank else 1])
        try:
            exchange.run(lambda rows, counts: rows, torch.zeros(2, 3), counts)
        except Exception as error:
            return str(error)
        return ""

    for message in run_ranks(2, rank_main):
        assert "announced [2, 1099511627777] rows" in message


def test_bytes_are_those_of_the_rows_that_change_their_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a step over sockets; rows go to their experts and back, and their gradients too."""
    width, rows = 192, [0, 0]
    move = TokenExchange.move

    def counted(self: TokenExchange, tensor: Any, sends: Any, receives: Any) -> torch.Tensor:
        rows[self._group.index] += sum(sends) - sends[self._group.index]
        return move(self, tensor, sends, receives)

    monkeypatch.setattr(TokenExchange, "move", counted)

    def rank_main(mesh: Mesh) -> tuple[int, int]:
        runner = ep(worlds.context(mesh, "float32", "sgd", 0), bucket_mb=4.0)
        keys = {**TINY, "layers": 2, "width": width, "max_sequence_length": 64, "moe": MOE}
        shape = completed_shape(**{key: keys[key] for key in keys if key != "vocab_size"})
        torch.manual_seed(0)
        runner.place(Decoder(shape, 64))
        tokens = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(mesh.rank))
        before = mesh.bytes_sent
        runner.train_step([Batch(tokens, tokens, mesh.rank)])
        shared = sum(p.nbytes for p in runner.replicated())
        return mesh.bytes_sent - before, shared

    for rank, (sent, shared) in enumerate(run_ranks(2, rank_main, kind="tcp")):
        expected = 4 * width * rows[rank] + shared  # 2 (N - 1) / N of an all_reduce is 1
        print(f"rank {rank}: sent {sent}, {sent / expected:.4f} of what the counts say")
        assert rows[rank] > 4 * 2 * 200
        assert expected <= sent <= 1.02 * expected


# -- who holds what --


def test_experts_follow_speed_and_memory() -> None:
    model = worlds.experts(experts=8)
    expert = 16 * sum(p.numel() for n, p in model.named_parameters() if ".experts.0." in n)
    shared = 16 * sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)

    def sizes(num_ranks: int, **keys: Any) -> list[int]:
        return [len(part) for part in expert_ranges(model, num_ranks, number_bytes=16, **keys)]

    assert sizes(2) == [4, 4]
    assert sizes(2, speeds=(3.0, 1.0)) == [6, 2]
    assert sizes(2, memory_bytes=(shared + 2.5 * expert, shared + 6.5 * expert)) == [2, 6]
    assert sorted(sizes(3)) == [2, 3, 3]
    with pytest.raises(ConfigError, match="no placement fits the ranks' memory_gb"):
        sizes(2, memory_bytes=(shared + 3.5 * expert, shared + 3.5 * expert))


def test_what_cannot_be_placed_is_refused() -> None:
    for model, message in (("experts", "4 experts in a block, too few for 5 ranks"),):
        with pytest.raises(ConfigError, match=message):
            train("ep", model, 5, steps=1)
    with pytest.raises(ConfigError, match="Decoder has none that it knows"):
        train("ep", "decoder", 2, steps=1)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["model=gpt_tiny"], "model = gpt_tiny: has no experts to place"),
        (["model=mlp", "data=digits"], "model = mlp: has no experts to place"),
        (["model=moe_tiny", "model.moe.experts=2", "cluster.ranks=3"], "too few for 3 ranks"),
        (["model=moe_tiny", "model.moe.capacity_factor=0"], "model.moe.capacity_factor = 0"),
        (["model=moe_tiny", "model.moe.experts_per_token=9"], "must be at most experts = 8"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(typed: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["algorithm=ep", *typed])
    assert message in str(caught.value)


# -- checkpoints --


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.soak), 2])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, staleness: int) -> None:
    keys: dict[str, Any] = {"model": worlds.experts, "staleness": staleness}
    whole, hashes = run_part(tmp_path / "a", "ep", 3, until=6, **keys)
    first, _ = run_part(tmp_path / "b", "ep", 3, until=3, **keys)
    second, again = run_part(tmp_path / "b", "ep", 3, until=6, resume=first, **keys)
    assert again == hashes
    assert same(whole, second)


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.soak), 2])
def test_other_ranks_and_algorithms_resume_it(tmp_path: Path, staleness: int) -> None:
    keys: dict[str, Any] = {"model": worlds.experts, "staleness": staleness}
    whole, _ = run_part(tmp_path / "a", "single", 1, until=7, **keys)
    checkpoint: Path | None = None
    ways = (("single", 1), ("ep", 1), ("ep", 3), ("classicdp", 2), ("ep", 4), ("ep", 2))
    for number, (algorithm, size) in enumerate((*ways, ("single", 1)), start=1):
        place = tmp_path / str(number)
        checkpoint, _ = run_part(place, algorithm, size, until=number, resume=checkpoint, **keys)
    assert checkpoint is not None
    expected, found = contents(whole), contents(checkpoint)
    assert expected.keys() == found.keys()
    for key in expected:
        if "facts" not in key:
            assert torch.allclose(expected[key], found[key], rtol=0, atol=1e-12), key

"""The arithmetic of memory against real tensors, and the search for what would make a run fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smolrun.config.sharding import Sharding
from smolrun.estimate.memory import (
    Rank,
    Remedy,
    Setting,
    best_switches,
    checkpoint_bytes,
    fitting_micro_batch,
    need,
    optimizer_bytes,
    sent_bytes,
    smallest_change,
    switches,
)
from smolrun.estimate.trace import Trace
from smolrun.parts.optimizer_state import optimizer_state
from smolrun.parts.quantization import Quantization
from smolrun.training.optimizer import NAMES, make_optimizer
from tests.training.test_optimizer import KEYS, run, small

SETTING = Setting("float32", recompute=False, micro_batch_size=8, optimizer="adamw")
RANK = Rank(shapes=((1000, 500), (500,)), frozen=100, world_size=4, process_bytes=7)
TRAINED = 1000 * 500 + 500


@pytest.mark.parametrize("precision", ["float32", "float64", "bf16_params"])
@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_remembers_as_much_as_is_counted(name: str, precision: str) -> None:
    dtypes = {"float32": torch.float32, "float64": torch.float64, "bf16_params": torch.bfloat16}
    model = small(dtypes[precision])
    optimizer = make_optimizer(model.named_parameters(), name, **KEYS[name])
    run(optimizer, model, range(2))
    state = optimizer_state(optimizer, model.named_parameters())
    counted = optimizer_bytes(
        Rank(tuple(tuple(p.shape) for p in model.parameters()), 0, 1, 0),
        Setting(precision, recompute=False, micro_batch_size=1, optimizer=name),
    )
    # Counters have 4 or 8 bytes.
    assert abs(sum(value.nbytes for value in state.values()) - counted) <= 8 * 2 * 3


def test_the_bytes_per_parameter_that_the_docs_promise() -> None:
    for precision, optimizer, expected in (
        ("float32", "adamw", 8),
        ("float32", "lion", 4),
        ("float32", "sgd", 4),
        ("float32", "adafactor", 0),
        ("bf16", "adamw", 8),
        ("bf16_params", "adamw", 4),
        ("bf16_params", "lion", 2),
        ("float64", "adamw", 16),
    ):
        setting = replace(SETTING, precision=precision, optimizer=optimizer)
        parts = need(RANK, setting, None).parts
        weight = {"float64": 8, "bf16_params": 2}.get(precision, 4)
        assert parts["parameters"] == weight * (TRAINED + 100)
        assert parts["gradients"] == weight * TRAINED
        assert parts["optimizer"] / TRAINED == pytest.approx(expected, abs=0.02)


def test_late_gradients_staging_norms_and_checkpoints_are_counted() -> None:
    plain = need(RANK, SETTING, None).parts
    assert (
        plain["late gradients"] == plain["staging"] == plain["checkpoint"] == plain["update"] == 0
    )
    rank = replace(RANK, slots=3, is_staged=True, saves=True, copies_for_norms=True)
    parts = need(rank, SETTING, None).parts
    assert parts["late gradients"] == 2 * 4 * TRAINED
    assert parts["staging"] == 3 * 4 * TRAINED
    assert parts["update"] == 4 * TRAINED
    whole = parts["parameters"] + parts["optimizer"] + parts["late gradients"]
    assert checkpoint_bytes(rank, SETTING) == whole
    assert parts["checkpoint"] == whole // 4
    assert need(rank, SETTING, None).total == sum(parts.values())


def test_small_blocks_are_not_given_back_for_large_ones() -> None:
    work = Trace(peak=100, small_peak=80, large_peak=60, flops=0, moved=0)
    parts = need(RANK, SETTING, work).parts
    assert parts["activations"] == 140
    assert parts["slack"] - need(RANK, SETTING, None).parts["slack"] == 16


def test_the_ring_moves_twice_all_but_one_share() -> None:
    assert sent_bytes(RANK, SETTING, 1) == 2 * 3 * 4 * TRAINED // 4
    assert sent_bytes(replace(RANK, world_size=1), SETTING, 1) == 0
    assert (
        sent_bytes(RANK, replace(SETTING, precision="bf16_params"), 1) == 2 * 3 * 2 * TRAINED // 4
    )


def test_a_server_has_room_for_all_workers_and_a_worker_has_no_optimizer() -> None:
    server = replace(
        RANK, slots=2, saves=True, sharding=Sharding(links=3, push_buffers=3, averages=1)
    )
    worker = replace(server, sharding=Sharding(stage=1, share=0.0, links=1))
    parts, others = need(server, SETTING, None).parts, need(worker, SETTING, None).parts
    assert parts["pushes"] == 2 * 3 * 4 * TRAINED and others["pushes"] == 0
    assert parts["average"] == 4 * TRAINED and others["average"] == 0
    assert parts["optimizer"] == pytest.approx(8 * TRAINED, rel=1e-3) and others["optimizer"] == 0
    assert parts["checkpoint"] == checkpoint_bytes(server, SETTING) and others["checkpoint"] == 0
    assert others["late gradients"] == parts["late gradients"] == 4 * TRAINED
    assert sent_bytes(server, SETTING, 1) == 3 * 4 * TRAINED
    assert sent_bytes(worker, SETTING, 1) == 4 * TRAINED


# -- what would make it fit --

COST = {"adamw": 40, "lion": 20, "sgd": 20, "adafactor": 5}


def total(setting: Setting) -> int:
    """A machine to reason about: the optimizer, 8 per sample, halved by each kind of thrift."""
    samples = 8 * setting.micro_batch_size // (2 if setting.recompute else 1)
    size = COST[setting.optimizer] + samples
    return size // 2 if setting.precision == "bf16_params" else size


def remedy(limit: int, current: Setting = SETTING) -> Remedy | None:
    return smallest_change(current, total, limit, can_recompute=True)


def keys_of(found: Remedy | None) -> tuple[str, ...]:
    assert found is not None
    assert total(found.setting) == found.total
    return found.keys


def test_what_leaves_the_results_as_they_are_comes_first() -> None:
    assert total(SETTING) == 104
    assert keys_of(remedy(80)) == ("training.recompute=true",)
    assert keys_of(remedy(50)) == ("training.micro_batch_size=1",)
    assert keys_of(remedy(44)) == ("training.recompute=true", "training.micro_batch_size=1")
    assert keys_of(remedy(40))[-1] == "optimizer=lion" or len(keys_of(remedy(40))) <= 2
    assert remedy(4) == Remedy(
        (
            "training.recompute=true",
            "training.micro_batch_size=1",
            "optimizer=adafactor",
            "precision=bf16_params",
        ),
        Setting("bf16_params", True, 1, "adafactor"),
        4,
    )
    assert remedy(3) is None


def test_the_micro_batch_is_as_large_as_fits() -> None:
    found = remedy(72)
    assert keys_of(found) == ("training.recompute=true",)
    found = remedy(60)
    assert keys_of(found) == ("training.micro_batch_size=1",)
    assert found is not None
    larger = fitting_micro_batch(found, 8, total, 60)
    assert larger.keys == ("training.micro_batch_size=2",)
    assert larger.setting.micro_batch_size == 2
    assert larger.total == total(larger.setting) <= 60


def test_only_lighter_choices_are_offered() -> None:
    assert set(switches(SETTING, can_recompute=True)) == {
        "training.recompute=true",
        "training.micro_batch_size=1",
        "optimizer=lion",
        "optimizer=adafactor",
        "optimizer=sgd",
        "precision=bf16_params",
    }
    thrifty = Setting("bf16_params", recompute=True, micro_batch_size=1, optimizer="adafactor")
    assert switches(thrifty, can_recompute=True) == {}
    assert "training.recompute=true" not in switches(SETTING, can_recompute=False)
    assert "optimizer=sgd" not in switches(replace(SETTING, optimizer="lion"), can_recompute=True)


def test_the_best_two_save_most_and_are_not_of_one_group() -> None:
    best = best_switches(SETTING, total, can_recompute=True)
    assert [found.keys for found in best] == [
        ("training.micro_batch_size=1",),
        ("precision=bf16_params",),
    ]
    four = best_switches(SETTING, total, can_recompute=True, count=9)
    assert len({found.keys[0].split("=")[0] for found in four}) == len(four) == 4


def test_a_switch_that_saves_nothing_is_no_advice() -> None:
    assert best_switches(SETTING, lambda _: 5, can_recompute=True) == []


def test_what_fsdp_cuts_is_divided_and_what_it_moves_is_counted() -> None:
    for stage, expected in ((0, 16), (1, 10), (2, 7), (3, 4)):
        rank = replace(RANK, frozen=0, sharding=Sharding(stage, 0.25, 100, 2, 1000))
        parts = need(rank, SETTING, None).parts
        held = parts["parameters"] + parts["gradients"] + parts["optimizer"]
        assert held == pytest.approx(expected * TRAINED, rel=1e-4)
        assert parts["passing"] == {0: 0, 1: 0, 2: 800, 3: 4800}[stage]
    share = 3 * 4 * TRAINED // 4
    for stage, micro_batches, times in ((1, 5, 2), (2, 1, 2), (2, 5, 6), (3, 1, 3), (3, 5, 15)):
        rank = replace(RANK, frozen=0, sharding=Sharding(stage, 0.25))
        assert sent_bytes(rank, SETTING, micro_batches) == times * share
        frozen = replace(rank, frozen=TRAINED)  # is never reduced, and at stage 3 gathered twice
        more = 2 * share * micro_batches if stage == 3 else 0
        assert sent_bytes(frozen, SETTING, micro_batches) == times * share + more
    assert sent_bytes(rank, replace(SETTING, precision="bf16"), 5) == 10 * share


def test_gradients_in_fewer_bits_send_less_and_remember_more() -> None:
    int8 = replace(RANK, quantization=Quantization("int8"))
    part = 3 * TRAINED / 4  # of a number's bytes
    for stage, expected in ((0, 2.03125), (1, 5.015625), (2, 9.078125), (3, 45.078125)):
        rank = replace(int8, frozen=0, sharding=Sharding(stage, 0.25))
        assert sent_bytes(rank, SETTING, 5) == pytest.approx(expected * part, rel=1e-4)
    half = replace(RANK, quantization=Quantization("fp16", error_feedback=False))
    assert sent_bytes(half, SETTING, 5) == pytest.approx(4 * part, rel=1e-4)
    assert need(half, SETTING, None).parts["residuals"] == 0
    assert need(int8, SETTING, None).parts["residuals"] == 8 * TRAINED
    late = replace(int8, slots=3)
    assert need(late, SETTING, None).parts["residuals"] == 3 * 8 * TRAINED
    more = checkpoint_bytes(int8, SETTING) - checkpoint_bytes(RANK, SETTING)
    assert more == 4 * 4 * TRAINED, "each of the four ranks has its own"

"""training.dry_run=true from the command line: what it counts, what it says, and that it starts
nothing."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import rich.console
import torch

from smolrun.cli.compose import compose
from smolrun.config import resolved
from smolrun.driver.prepare import spec_of
from smolrun.estimate import dry_run, dry_run_stages, dry_run_text
from smolrun.estimate.dry_run import GB, Estimate, Process, estimate
from smolrun.estimate.dry_run_text import memory_verdict, report, verdict
from smolrun.estimate.stages import cut_line
from smolrun.mesh.mesh import Mesh
from smolrun.tasks import train
from smolrun.testing import run_ranks
from smolrun.worker.train import place_algorithm

LLAMA = ("cluster=macmini3", "cluster.memory_gb=16", "model=llama32_1b", "data.sequence_length=512")


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading torch in another process takes seconds; one test does it."""
    monkeypatch.setattr(dry_run, "start_probe", lambda: None)


def made(*overrides: str) -> Estimate:
    config = compose([*overrides, "training.dry_run=true"])
    spec = spec_of(config)
    return estimate(config, spec, notes=spec.notes)


def total(estimate: Estimate) -> int:
    return estimate.total(estimate.places[0], estimate.setting)


def test_it_is_reached_from_the_command_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.drive(compose(["training.dry_run=true", "staleness.bound=2"])) == 0
    assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dry run: model=gpt_tiny, 1,")
    assert lines[-1].startswith("fits; 300 steps take at least ")
    assert all(line.isascii() for line in lines)
    assert any("gradients of late steps" in line for line in lines)
    assert any(line.startswith("network: each rank sends and receives 4.7 MB") for line in lines)
    assert any(line.startswith("time: about ") and "measured now" in line for line in lines)


@pytest.mark.soak  # a minute of one core: several dry runs of 1.2 billion parameters
def test_three_mac_minis_cannot_train_a_llama_of_1b_and_are_told_what_can(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report(made(*LLAMA)) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("does not fit: mini1 needs ")
    assert lines[-1].count(" of 16.0 GB") == 3
    advice = lines[lines.index("what would make it fit, with 15% to spare:") + 1 : -1]
    good = [line for line in advice if line.endswith("fits") and "fsdp" not in line]
    assert good
    keys = [word for word in good[-1].split(":")[0].split() if "=" in word]
    better = made(*LLAMA, *keys)
    assert memory_verdict(better) == (True, "fits")
    assert any("algorithm=fsdp algorithm.stage=3: " in line for line in advice)
    assert any(line.startswith("time: unknown on these machines; ") for line in lines)
    assert any("Gbit/s" in line for line in lines if line.startswith("network: "))


def test_the_parts_of_llama_by_hand() -> None:
    estimate = made(*LLAMA, "checkpoint.every=0")
    parts = estimate.need(estimate.places[0], estimate.setting).parts
    parameters = 1_235_814_400
    assert parts["parameters"] == parts["gradients"] == parts["staging"] == 4 * parameters
    assert parts["optimizer"] == pytest.approx(8 * parameters, rel=1e-4)
    assert parts["checkpoint"] == 0
    assert estimate.wire() == 2 * 2 * 4 * parameters // 3


def test_ranks_of_one_host_add_up_and_share_libraries() -> None:
    four = made("cluster.ranks=4")
    alone = four.need(four.places[0], four.setting).total - four.process.size
    four.process = Process(300, 100)
    assert total(four) == 4 * (alone + 300) - 3 * 100


def test_owners_hold_their_part_of_the_optimizer() -> None:
    optimizer = [
        made("cluster.ranks=3", f"algorithm.shard_optimizer={value}") for value in ("true", "false")
    ]
    held = [one.need(one.places[0], one.setting).parts["optimizer"] for one in optimizer]
    assert 3 * held[0] == pytest.approx(held[1], rel=1e-6)


def test_micro_batches_recompute_and_precision_change_it_as_they_should() -> None:
    plain = made()
    for override in (
        "training.micro_batch_size=2",
        "training.recompute=true",
        "precision=bf16_params",
        "optimizer=adafactor",
    ):
        assert total(made(override)) < total(plain), override
    assert made("training.micro_batch_size=2").micro_batches == 8


@pytest.mark.parametrize(
    ("overrides", "outputs"),
    [
        (("data.tokenizer=bytes",), 256),
        (("data.vocab_size=999",), 999),
        (("model=mlp", "data=digits"), 10),
    ],
)
def test_what_the_model_must_fit_is_known_without_the_data(
    overrides: tuple[str, ...], outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> None:
        raise AssertionError("data must not be prepared")

    monkeypatch.setattr("smolrun.driver.prepare.prepare_data", nothing)
    assert made(*overrides).spec.num_outputs == outputs


def test_a_tokenizer_folder_tells_its_size_and_a_name_is_assumed(tmp_path: Path) -> None:
    known = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 5}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(known))
    assert made(f"data.tokenizer={tmp_path}").spec.num_outputs == 6
    assumed = made("data.tokenizer=some/name", "data.vocab_size=5000")
    assert assumed.spec.num_outputs == 5000
    assert "is not known here: 5000 assumed" in assumed.notes[0]


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.layer = nn.Linear(spec.num_inputs, spec.num_outputs)
        self.size = int(torch.ones(()).item())

    def forward(self, inputs):
        return self.layer(inputs)

def build(spec, *, flavour):
    return Net(spec)
"""


def test_own_code_that_needs_values_is_counted_without_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needs_values.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ["data=digits", "model=mlp", "model.target=needs_values:build", "+model.flavour=1"]
    estimate = made(*overrides, "~model.widths", "~model.activation")
    assert estimate.shapes == ((10, 784), (10,))
    assert estimate.need(estimate.places[0], estimate.setting).parts["activations"] == 0
    assert "cannot be built without values" in estimate.cannot_trace


def test_a_disk_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=10**6)
    monkeypatch.setattr("smolrun.estimate.dry_run_text.shutil.disk_usage", lambda _: usage)
    estimate = made("checkpoint.every=10", "checkpoint.keep=3", "checkpoint.keep_best=true")
    size = 4 * 3 * estimate.rank(estimate.places[0]).trained  # parameters, and AdamW's two memories
    assert estimate.checkpoint() == pytest.approx(size, rel=1e-3)
    line = dry_run_text._disk(estimate)
    assert f"up to 5 at a time: {5 * estimate.checkpoint() / 1e6:.1f} MB of 1.0 MB free" in line
    assert line.endswith("which is NOT ENOUGH")
    fits, text = verdict(estimate)
    assert not fits
    assert text.startswith("does not fit on the disk: 5 checkpoints of ")
    assert dry_run_text._disk(made("checkpoint.every=0")).startswith("no checkpoints")


@pytest.mark.parametrize(
    ("share", "start"),
    [(0.99, "does not fit: local needs "), (1.01, "fits narrowly, if at all: "), (1.2, "fits")],
)
def test_a_narrow_fit_is_called_so(share: float, start: str) -> None:
    estimate = made()
    estimate.places = [replace(estimate.places[0], room=int(share * total(estimate)))]
    fits, text = memory_verdict(estimate)
    assert text.startswith(start)
    assert fits == (not start.startswith("does not"))
    assert (text == "fits") == (estimate.lacking(estimate.setting) <= 0)


def test_no_number_of_the_table_is_cut_at_80_columns() -> None:
    names = ("raspberry_pi_5", "workstation", "laptop_of_mine", "mini", "server_in_the_cellar")
    hosts = [f"{{name: {name}, memory_gb: {16 + at}}}" for at, name in enumerate(names)]
    table = dry_run_text._table(made(f"cluster.hosts=[{', '.join(hosts)}]"), is_plain=False)
    shown = io.StringIO()
    rich.console.Console(file=shown, width=80).print(table)
    assert max(map(len, shown.getvalue().splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.getvalue()
    assert "16.00 17.00 18.00 19.00 20.00" in " ".join(shown.getvalue().split())


def test_an_unknown_memory_is_no_yes() -> None:
    estimate = made()
    estimate.places = [replace(estimate.places[0], name="pi", room=None)]
    text = "fits, as far as is known: the memory of pi is not (memory_gb)"
    assert memory_verdict(estimate) == (True, text)


def test_fewer_ranks_are_among_what_would_make_it_fit() -> None:
    one = made("cluster.ranks=1")
    room = int(dry_run.MARGIN * total(one)) + 1
    four = made("cluster.ranks=4", "training.micro_batch_size=1", "training.recompute=true")
    four.places = [replace(four.places[0], room=room)]
    (line,) = dry_run_text._with_fewer_ranks(four)
    assert line.startswith("  cluster.ranks=1: ")
    assert line.endswith(" on local, fits")


def test_no_remedy_is_refused_by_the_checks() -> None:
    """Adafactor looks at whole matrices, which fsdp cuts."""
    whole, cut = [
        [remedy.keys[0] for remedy in made(f"algorithm={name}", "model=gpt_small").best_switches(9)]
        for name in ("classicdp", "fsdp")
    ]
    assert "optimizer=adafactor" in whole
    assert "optimizer=adafactor" not in cut


def test_a_run_that_is_nearly_all_network_is_told_so_with_what_is_quicker() -> None:
    slow = ("algorithm=fsdp", "training.micro_batch_size=1", "precision=bf16_params")
    estimate = made(*LLAMA, *slow, "model.layers=2", "training.steps=1000")
    hours = 1000 * 8 * estimate.wire() / 1e9 / 3600
    fits, text = verdict(estimate)
    assert fits
    start, _, quicker = text.partition("; quicker: ")
    assert start == f"fits, but the network alone takes {hours:.0f} h for 1,000 steps at 1 Gbit/s"
    assert quicker.startswith("training.micro_batch_size=")
    assert ", algorithm.stage=0 (" in quicker
    assert "quantization" not in quicker, "gradients are a sixth of what travels"


def test_emulated_links_are_reckoned_with() -> None:
    estimate = made("cluster=sim/pi3", "model=gpt_small", "training.steps=3000")
    assert " at 100 Mbit/s (as emulated)" in dry_run_text._network(estimate)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dry_run_text, "measure_speed", lambda: (1e14, 1e14))
        text = verdict(estimate)[1]
    assert "3,000 steps take at least 3.6 h, nearly all network at 100 Mbit/s; quicker: " in text
    assert "quantization=int8 (55 min), a larger training.global_batch_size in fewer steps" in text


def test_an_empty_process_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    process = dry_run.end_probe(dry_run.start_probe())
    assert process is not None
    assert 0 <= process.shared < process.size
    assert 0.1 * GB < process.size < GB


def test_a_server_and_its_workers_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    server = (
        "cluster=macmini3",
        "cluster.memory_gb=16",
        "cluster.server=mini2",
        "algorithm=syncps",
        "model=gpt_small",
    )
    assert report(made(*server)) == 0
    lines = capsys.readouterr().out.splitlines()
    (room,) = [line for line in lines if "receive buffers of the server" in line]
    cells = [cell.strip() for cell in room.split("|")]
    assert cells[2:4] == ["0.076", "0.000"], "mini2 first, then the others"
    assert any("server sends and receives 81.8 MB per step, others 40.9 MB" in x for x in lines)
    one = made("algorithm=syncps", "cluster.ranks=3", "model=gpt_small")
    of_worker = one.need(one.places[0], one.setting, local_rank=1).total
    first = one.need(one.places[0], one.setting).total
    assert total(one) == first + 2 * (of_worker - one.process.shared)
    assert first > of_worker


def test_a_bound_of_edp_costs_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    edp = ("algorithm=edp", "cluster.ranks=4", "quantization=int8")
    late, prompt = made(*edp, "staleness.bound=2"), made(*edp, "staleness.bound=auto")
    needs = [
        each.need(each.places[0], each.setting, rank) for each in (late, prompt) for rank in (0, 1)
    ]
    assert needs[:2] == needs[2:]
    assert late.checkpoint() == prompt.checkpoint()
    assert report(made(*edp, "staleness.bound=2")) == 0
    shown = capsys.readouterr().out
    assert "1 micro-batch of 11 sequences of" in shown
    assert "on each rank that trains" in shown


# -- stages of layers ----

STAGES = ("algorithm=mp_pipeline", "cluster.ranks=3", "model.layers=6", "data.tokenizer=bytes")
HOSTS = (
    "cluster.hosts=[{name: a, speed: 2}, {name: b, ranks: 2}]",
    "algorithm=mp_pipeline",
    "model.layers=8",
    "data.tokenizer=bytes",
)


def stage_parts(estimate: Estimate, part: str) -> list[int]:
    return [
        estimate.need(place, estimate.setting, number).parts[part]
        for place in estimate.places
        for number in range(place.ranks)
    ]


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_stage_has_its_layers_and_its_end_of_the_model(tied: str) -> None:
    estimate = made(*STAGES, f"model.tie_embeddings={tied}")
    assert [stage.layers for stage in estimate.stages(estimate.setting)] == [
        range(2),
        range(2, 4),
        range(4, 6),
    ]
    whole = made(*STAGES, f"model.tie_embeddings={tied}", "algorithm=single", "cluster.ranks=1")
    embedding = 4 * whole.spec.num_outputs * whole.config.model.keywords()["width"]
    expected = stage_parts(whole, "parameters")[0] + (embedding if tied == "true" else 0)
    assert sum(stage_parts(estimate, "parameters")) == expected
    assert stage_parts(estimate, "gradients") == stage_parts(estimate, "parameters")
    assert estimate.checkpoint() == whole.checkpoint()
    first, middle, last = stage_parts(estimate, "optimizer")
    assert middle < first and middle < last


@pytest.mark.parametrize(
    ("keys", "held"),
    [
        (["algorithm.schedule=1f1b"], [3, 2, 1]),
        (["algorithm.schedule=1f1b", "algorithm.micro_batches=2"], [2, 2, 1]),
        (["algorithm.schedule=gpipe"], [12, 12, 12]),
        (["algorithm.schedule=gpipe", "training.micro_batch_size=1"], [32, 32, 32]),
        (["algorithm=mp", "training.micro_batch_size=4"], [1, 1, 1]),
    ],
)
def test_activations_are_those_of_the_micro_batches_that_a_stage_holds(
    keys: list[str], held: list[int]
) -> None:
    estimate = made(*STAGES, *keys)
    assert estimate.held(estimate.setting) == held
    kinds = [stage.kind for stage in estimate.stages(estimate.setting)]
    for kind, count, found in zip(kinds, held, stage_parts(estimate, "activations"), strict=True):
        work = estimate.trace(estimate.setting, kind)
        assert work is not None
        received = 2 * estimate.hop_bytes(estimate.setting)
        assert found == work.peak + (count - 1) * work.small_kept + received


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (STAGES, "rank 0 layers 0 to 1, rank 1 layers 2 to 3, rank 2 layers 4 to 5"),
        (HOSTS, "rank 0 (a) layers 0 to 3, rank 1 (b) layers 4 to 5, rank 2 (b) layers 6 to 7"),
        (
            (*HOSTS, "cluster.hosts.0.memory_gb=0.011"),
            "rank 0 (a) layers 0 to 2, rank 1 (b) layers 3 to 5, rank 2 (b) layers 6 to 7",
        ),
        (
            (*STAGES, "algorithm=mp", "algorithm.layers=[[0,2],[3,3],[4,5]]"),
            "rank 0 layers 0 to 2, rank 1 layer 3, rank 2 layers 4 to 5",
        ),
    ],
)
def test_it_cuts_as_the_run_does(keys: tuple[str, ...], line: str) -> None:
    estimate = made(*keys)
    config = resolved(estimate.config)

    def rank_main(mesh: Mesh) -> list[int]:
        algorithm = place_algorithm(config, estimate.spec, mesh, torch.device("cpu"))
        micro_batches = algorithm.data_coordinates([1.0] * 3).micro_batches
        assert micro_batches == (12 if config["algorithm"]["name"] == "mp_pipeline" else 1)
        return [int(name) for name in algorithm.model.blocks]

    promised = [list(stage.layers) for stage in estimate.stages(estimate.setting)]
    assert run_ranks(3, rank_main) == promised
    assert cut_line(estimate.config, estimate.spec) == line


def test_pipelines_side_by_side_are_cut_and_counted_alike(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hosts = "cluster.hosts=[{name: a, speed: 2, ranks: 2}, {name: b, ranks: 2}]"
    keys = ("algorithm=mp_pipeline", "model.layers=6", "data.tokenizer=bytes")
    keys += ("model.tie_embeddings=true",)
    one, two = made(*keys, "cluster.ranks=2"), made(*keys, hosts, "algorithm.replicas=2")
    assert stage_parts(two, "optimizer") == 2 * stage_parts(one, "optimizer")
    assert stage_parts(two, "staging") == stage_parts(two, "gradients")
    assert stage_parts(one, "staging") == [0, 0]
    assert two.checkpoint() == one.checkpoint() and two.tied_bytes(two.setting) > 0
    # Twice as fast, so two thirds of 32 samples, in 8 micro-batches as for two ranks.
    assert (two.samples, two.count(two.setting), two.setting.micro_batch_size) == (21, 8, 3)
    held = stage_parts(two, "parameters")
    copy = two.tied_bytes(two.setting)
    assert [two.replica_bytes(stage) for stage in (0, 1)] == [held[0], held[1] - copy]
    assert two.stage_wire(0) == 21 * two.hop_bytes(two.setting) // 3 + copy + held[0]
    text = "ranks 0 (a), 2 (b) layers 0 to 2, ranks 1 (a), 3 (b) layers 3 to 5"
    assert cut_line(two.config, two.spec) == text
    assert report(two) == 0
    shown = capsys.readouterr().out
    assert "8 micro-batches of 3 sequences of 64 tokens through each of the pipelines" in shown
    assert "sums over 2 replicas: " in shown


def test_a_step_is_that_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait less with more micro-batches; without a schedule, all but one wait."""
    monkeypatch.setattr(dry_run_stages, "measure_speed", lambda: (1e9, 1e30))
    steps = {}
    for keys in ("algorithm.micro_batches=4", "algorithm.micro_batches=32", "algorithm=mp"):
        estimate = made(*STAGES, keys, "model.layers=24")
        steps[keys] = dry_run_stages.stage_step(estimate)
    (four_s, four), (many_s, many), (one_s, one) = steps.values()
    assert (four, many, one) == (
        pytest.approx(2 / 6, abs=0.02),
        pytest.approx(2 / 34, abs=0.02),
        pytest.approx(2 / 3, abs=0.02),
    )
    assert many_s is not None and four_s is not None and one_s is not None
    assert four_s / many_s == pytest.approx((6 / 4) / (34 / 32), rel=0.02)
    assert one_s / many_s == pytest.approx(3 / (34 / 32), rel=0.02)


def test_the_parameters_of_the_title_are_those_of_the_model() -> None:
    counts = [
        dry_run_text._title(made(*STAGES, algorithm)).split(", ")[1]
        for algorithm in ("algorithm=classicdp", "algorithm=mp", "algorithm=mp_pipeline")
    ]
    assert counts[0].endswith(" parameters") and len(set(counts)) == 1


def test_hops_take_what_the_links_let_through() -> None:
    slow = made("cluster=sim/pi3", "algorithm=mp_pipeline", "model.layers=6")
    size = slow.hop_bytes(slow.setting)
    assert size == 3 * 64 * slow.config.model.keywords()["width"] * 4
    assert slow.stage_wire(1) == 2 * size * 32 // 3
    assert dry_run_stages._hop_s(slow, 0.1) == pytest.approx(0.0005 + 8 * size / 1e8)
    assert "at 100 Mbit/s (as emulated)" in dry_run_stages._hops(slow)
    fewer = made("cluster=sim/pi3", "algorithm=mp_pipeline", "quantization=int8")
    assert fewer.hop_bytes(fewer.setting) == pytest.approx(size / 4, rel=0.1)


@pytest.mark.soak  # traces gpt_small three times
def test_a_cut_by_hand_that_does_not_fit_is_answered_by_one_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hosts = "{name: a, memory_gb: 1}, {name: b, memory_gb: 0.5}"
    keys = (f"cluster.hosts=[{hosts}]", "model=gpt_small", "data.sequence_length=512")
    by_hand = made(*keys, "algorithm=mp_pipeline", "algorithm.layers=[[0,0],[1,5]]")
    assert report(by_hand) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("does not fit: b needs ")
    assert any(line.startswith("  algorithm.layers=null: ") for line in lines)
    gpipe = made(*STAGES, "algorithm.schedule=gpipe")
    assert [line.split(":")[0] for line in dry_run_text._lighter(gpipe)] == [
        "  algorithm.schedule=1f1b"
    ]


def test_a_rank_of_experts_has_its_own_and_sends_their_tokens() -> None:
    keys = ("model=moe_tiny", "algorithm=ep", "model.vocab_size=2048")
    run = made(*keys, "cluster.ranks=3")
    (place,) = run.places
    ranks = [run.rank(place, number) for number in range(3)]
    whole = sum(map(math.prod, run.shapes))
    expert = 3 * 3 * 128 * 192
    assert sorted(rank.experts for rank in ranks) == [2 * expert, 3 * expert, 3 * expert]
    shared = whole - 8 * expert
    assert all(rank.trained == shared + rank.experts for rank in ranks)
    assert sum(rank.experts for rank in ranks) == 8 * expert
    tokens, length = run.tokens, 64
    assert tokens == 11 * length  # the largest share of 32 sequences
    exchanged = 4 * tokens * 2 * 128 * 3 * 4 * 2 // 3
    assert run.wire() == pytest.approx(exchanged + 2 * 4 * shared * 2 / 3, rel=1e-6)
    assert total(made(*keys, "cluster.ranks=3")) < total(made(*keys[::2], "cluster.ranks=3"))

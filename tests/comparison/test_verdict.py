"""The verdict, on runs made by hand whose winner is known."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from smolrun.comparison.cells import Cell, Repeat, make_cells
from smolrun.comparison.verdict import (
    SPEED,
    TIME_TO_LOSS,
    common_target,
    fit,
    rank,
    ratios,
    t_quantile,
    values,
    verdict,
)
from tests.comparison.runs import config, events, job


def compared(tmp_path: Path, *runs: tuple[dict[str, Any], list[dict[str, Any]]]) -> list[Cell]:
    made = [job(tmp_path / f"r{n}", config(**c), rows) for n, (c, rows) in enumerate(runs)]
    return make_cells([one for one, _ in made], [run for _, run in made])[1]


def said(cells: list[Cell], tune: str | None = None) -> list[str]:
    return ["".join(parts) for parts in verdict(cells, common_target(cells), tune)]


EDP = {"algorithm__name": "edp"}
LR = {"optimizer__lr": 0.1}


def test_a_clear_winner(tmp_path: Path):
    # Mean of 4 steps: 5 - 0.1 * (step - 1.5), so 3.25 at the end of the slower descent at step 19.
    cells = compared(
        tmp_path,
        ({}, events(step_s=2.0, sent=100)),
        (EDP, events(step_s=1.0, sent=200, slope=0.2)),
    )
    target = common_target(cells)
    assert target is not None and (target.loss, target.steps) == (pytest.approx(3.25), 4)
    first, speed, sent, memory, sure = said(cells)
    assert first == (
        "edp is fastest to training loss 3.250 (the lowest that both have reached, as a mean of 4"
        " steps), 12 s: classicdp takes 3.33x as long; it is an easy loss, as the best one is"
        " 1.500."
    )
    assert speed == "edp has the highest throughput, 1,000 tokens/s: 2.00x that of classicdp."
    assert sent == "classicdp sends least, 4 kB: edp sends 2.00x as much."
    assert memory == "peak memory is equal within noise (1 kB to 1 kB)."
    assert "cannot say who wins beyond 5 %" in sure and "sweep.repeats=3" in sure


def test_a_small_difference_of_one_run_each_is_called_equal(tmp_path: Path):
    cells = compared(tmp_path, ({}, events()), (EDP, events(step_s=1.04)))
    first, speed, *_ = said(cells)
    assert first.startswith("time to training loss 3.250 ")
    assert first.endswith("is equal within noise (20 s to 20.8 s).")
    assert speed == "throughput is equal within noise (962 to 1,000 tokens/s)."


def test_an_unsteady_run_tells_less(tmp_path: Path):
    rows, jump = events(step_s=1.3), events()
    for row in jump:
        if row["event"] == "step" and row["step"] >= 10:
            row["time_s"] = 10 + 2.0 * (row["step"] - 9)  # half as fast from the middle on
    cells = compared(tmp_path, ({}, events()), (EDP, rows))
    assert "1.30x that of edp" in said(cells)[1]
    cells = compared(tmp_path / "jump", ({}, jump), (EDP, rows))
    assert "throughput has no sure winner (667 to 769 tokens/s; all within noise)" in said(cells)[1]


def repeated(tmp_path: Path, factors: list[float], machine: list[float]) -> list[Cell]:
    """Two cells on a machine whose speed changes; the second one takes `factors` as long."""
    runs = []
    for seed, (factor, slow) in enumerate(zip(factors, machine, strict=True)):
        runs += [({"seed": seed}, events(step_s=slow))]
        runs += [({**EDP, "seed": seed}, events(step_s=slow * factor))]
    return compared(tmp_path, *runs)


def test_pairs_find_what_means_do_not(tmp_path: Path):
    cells = repeated(tmp_path, [1.10, 1.11, 1.12], [1.0, 2.0, 3.0])
    ranking = rank(SPEED, cells, None)
    assert ranking.tied == 1
    one = ranking.ratios[1]
    assert 1 / one.value == pytest.approx(1.11, rel=1e-3) and one.pairs == 3
    logs = [math.log(factor) for factor in (1.10, 1.11, 1.12)]
    half = 4.303 * statistics.stdev(logs) / math.sqrt(3)
    assert 1 / one.high == pytest.approx(math.exp(statistics.fmean(logs) - half), rel=1e-3)
    text = " ".join(said(cells))
    assert "classicdp has the highest throughput" in text and "1.11x (1.09 to 1.14)" in text
    assert "3 repeats each" in text and "3 pairs cannot promise much" in text


def test_repeats_that_do_not_agree_have_no_winner(tmp_path: Path):
    cells = repeated(tmp_path, [1.2, 0.9, 1.1], [1.0, 1.0, 1.0])
    assert rank(SPEED, cells, None).tied == 2
    assert "throughput is equal within noise" in said(cells)[1]
    cells = repeated(tmp_path / "more", [1.9, 0.9, 1.2], [1.0, 1.0, 1.0])
    assert "throughput has no sure winner (" in said(cells)[1]


def test_other_rows_say_how_much_is_chance():
    """Two repeats of two rows tell almost nothing; three more rows that repeat well tell more."""
    first, second = repeats(1.0, 1.01), repeats(1.7, 1.8)
    alone = ratios([first, second], [0, 0], 0.01)[1]
    others = [repeats(3.0, 3.1), repeats(4.0, 4.0), repeats(5.0, 5.1)]
    among = ratios([first, second, *others], [0] * 5, 0.01)[1]
    assert alone.value == pytest.approx(among.value)
    assert alone.low < 1.3 < 1.6 < among.low < 1.74 < among.high < 1.9


def repeats(*figures: float) -> dict[Repeat, float]:
    """Of the seeds from 0 on."""
    return {Repeat(seed): figure for seed, figure in enumerate(figures)}


def test_a_repeat_that_a_row_lacks_does_not_count():
    first, second = repeats(1.0, 1.0, 9.0), repeats(2.0, 2.0)
    found = ratios([first, second], [0, 0], 0.01)[1]
    assert (found.value, found.pairs) == (pytest.approx(2), 2)


def test_only_seeds_that_all_have_decide_who_is_first(tmp_path: Path):
    """The third repeat of one alone is slow: their pairs still say that it is faster."""
    pairs = [({**EDP, "seed": seed}, events(step_s=1.2)) for seed in range(2)]
    ours = [({"seed": seed}, events(step_s=9.0 if seed == 2 else 1.0)) for seed in range(3)]
    ranking = rank(SPEED, compared(tmp_path, *ours, *pairs), None)
    assert [cell.label for cell, _ in ranking.rows] == ["classicdp", "edp"]
    assert ranking.rows[0][1] == pytest.approx(1000)


def test_runs_of_other_seeds_are_no_pairs(tmp_path: Path):
    ours = [({"seed": seed}, events()) for seed in (0, 1)]
    theirs = [({**EDP, "seed": seed}, events(step_s=1.5)) for seed in (1, 2)]
    sure = said(compared(tmp_path, *ours, *theirs))[-1]
    assert "pair by pair" not in sure and "no two seeds that link all jobs" in sure


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    draw = random.Random(7)
    inside = 0
    for _ in range(1000):
        ours = repeats(*(math.exp(draw.gauss(0.3, 0.2)) for _ in range(4)))
        found = ratios([dict.fromkeys(ours, 1.0), ours], [0, 0], 0.01)[1]
        inside += found.low <= math.exp(0.3) <= found.high
    assert 930 <= inside <= 970


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.706), (2, 4.303), (10, 2.228), (12, 2.179), (30, 2.042)]
)
def test_t_is_that_of_the_tables(degrees: int, t: float):
    assert t_quantile(degrees) == pytest.approx(t, abs=0.005)


def test_a_loss_that_scatters_makes_the_time_to_it_unsure(tmp_path: Path):
    def noisy(step_s: float) -> list[dict[str, Any]]:
        rows = events(step_s=step_s, slope=0.02, steps=100)
        for row in rows:
            if row["event"] == "step":
                row["loss"] += 0.5 if row["step"] % 2 else -0.5
        return rows

    cells = compared(tmp_path, ({}, noisy(1.0)), (EDP, noisy(1.3)))
    assert rank(TIME_TO_LOSS, cells, common_target(cells)).tied == 2
    assert rank(SPEED, cells, None).tied == 1


def test_a_run_that_does_not_learn_sets_no_loss(tmp_path: Path):
    cells = compared(tmp_path, ({}, events()), (EDP, events(slope=-0.1)))
    assert said(cells)[0] == (
        "Only classicdp has reached training loss 3.250 (its lowest, as a mean of 4 steps), in 20"
        " s: edp learns less."
    )
    cells = compared(tmp_path / "none", ({}, events(slope=0.0)), (EDP, events(slope=-0.1)))
    assert common_target(cells) is None
    assert said(cells)[0].startswith("There is no training loss that all of them have reached")


def test_a_job_that_learns_clearly_less_does_not_make_the_loss_an_easy_one(tmp_path: Path):
    """The median falls by 1.6 (means of 4 steps): 90 % of it are a loss of 3.41, at step 17.4."""
    jobs = [({}, events()), (EDP, events(step_s=2.0)), ({"seed": 1, **LR}, events(slope=0.05))]
    cells = compared(tmp_path, *jobs)
    target = common_target(cells)
    assert target is not None and target.loss == pytest.approx(3.25)
    first = said(cells)[0]
    assert "(the lowest that 2 of 3 have reached, as a mean of 4 steps), 20 s" in first
    assert first.endswith("takes 2.00x as long; classicdp, lr=0.1 did not get there.")
    almost = [*jobs[:2], ({**LR}, events(slope=0.095))]
    target = common_target(compared(tmp_path / "almost", *almost))
    assert target is not None and target.loss == pytest.approx(5 - 0.095 * 17.5)


def test_a_cell_of_which_one_repeat_does_not_get_there_has_no_time(tmp_path: Path):
    """The mean of the repeats that do would be too good."""
    good = [({"seed": seed, **change}, events()) for seed in (0, 1) for change in ({}, LR)]
    other = [({**EDP, "seed": 0}, events(step_s=0.5)), ({**EDP, "seed": 1}, events(slope=0.01))]
    cells = compared(tmp_path, *good, *other)
    target = common_target(cells)
    assert target is not None and target.loss == pytest.approx(3.25)
    assert [len(values(TIME_TO_LOSS, cell, target)) for cell in cells] == [2, 2, 0]
    assert said(cells)[0].endswith("; edp, lr=0.003 did not get there.")


def test_one_job_with_one_finished_repeat_does_not_make_all_others_single_runs(tmp_path: Path):
    rows: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for seed, slow in enumerate([1.0, 1.5, 2.0]):
        rows += [({"seed": seed}, events(step_s=slow))]
        rows += [({**EDP, "seed": seed}, events(step_s=slow * (1.2 + 0.01 * seed)))]
    cells = compared(tmp_path, *rows, ({**LR, "seed": 1}, events(step_s=3.0)))
    ranking = rank(SPEED, cells, None)
    assert [cell.label.rpartition("=")[2] for cell, _ in ranking.rows] == ["0.003", "0.003", "0.1"]
    assert [one.pairs for one in ranking.ratios] == [3, 3, 1]
    assert 1 / ranking.ratios[2].value == pytest.approx(2.0, rel=1e-3)  # 3.0 to 1.5, of that seed
    assert "1 to 3 repeats each" in said(cells)[-1] and "1 pair cannot promise" in said(cells)[-1]


def test_a_fit_of_rows_with_other_seeds_is_that_of_least_squares():
    """Rows of 1, 2, 4 times a seed's own number, each without one of the seeds."""
    seeds = [1.0, 3.0, 0.5]
    rows = [
        {Repeat(n): factor * seeds[n] for n in range(3) if n != left}
        for left, factor in enumerate([1.0, 2.0, 4.0])
    ]
    found = fit(rows)
    assert found is not None and found.degrees == 1 and found.variance < 1e-12
    assert [math.exp(one - found.rows[0]) for one in found.rows] == pytest.approx([1, 2, 4])
    assert fit([rows[0], {Repeat(9): 1.0, Repeat(10): 2.0}]) is None  # nothing links them


def test_shares_of_the_batch_that_were_measured_are_no_chance(tmp_path: Path):
    """The run is twice as fast from step 11 on, and says why."""

    def faster() -> list[dict[str, Any]]:
        rows = [row for row in events() if row["event"] == "step"]
        for row in rows:
            row["time_s"] = min(row["step"] + 1, 10) + 0.5 * max(0, row["step"] - 9)
        return rows

    sure = said(compared(tmp_path, ({}, faster()), (EDP, faster())))[-1]
    assert "cannot say who wins beyond 95 %" in sure
    note = {"event": "note", "message": "batch shares from step 11: 3+1 samples, before 2+2; x"}
    noted = [*faster()[:10], note, *faster()[10:]]
    sure = said(compared(tmp_path / "noted", ({}, noted), (EDP, noted)))[-1]
    assert "cannot say who wins beyond 5 %" in sure


def test_runs_of_a_few_steps_say_nothing_about_who_is_faster(tmp_path: Path):
    cells = compared(tmp_path, ({}, events(steps=3)), (EDP, events(steps=3, step_s=2.0)))
    assert "throughput has no sure winner (500 to 1,000 tokens/s" in said(cells)[1]
    assert "cannot say who is faster (runs of so few steps" in said(cells)[-1]


def test_classifiers_have_samples_per_second(tmp_path: Path):
    cells = compared(tmp_path, ({}, events()), (EDP, events(step_s=2.0)))
    for cell in cells:
        cell.runs[Repeat(0)].unit = "samples"
    assert "1,000 samples/s" in said(cells)[1]


def test_only_finished_runs_that_did_not_diverge_count(tmp_path: Path):
    cells = compared(tmp_path, ({}, events()), (EDP, events(step_s=0.5)))
    cells[1].runs[Repeat(0)].diverged = True
    assert said(cells) == ["Only classicdp has finished, so there is no winner."]
    cells[0].runs[Repeat(0)].state = "running"
    assert said(cells) == ["No run here has finished, so there is nothing to compare yet."]


def test_one_run_and_repeats_of_one_configuration(tmp_path: Path):
    assert said(compared(tmp_path, ({}, events())))[0].startswith("There is one run only")
    cells = compared(tmp_path / "two", ({}, events()), ({"seed": 1}, events(step_s=3)))
    assert "no winner" in said(cells)[0]


def test_a_run_alone_sends_nothing(tmp_path: Path):
    cells = compared(tmp_path, ({"algorithm__name": "single"}, events(sent=0)), (EDP, events()))
    assert "single sends nothing, edp 4 kB." in said(cells)


def test_one_learning_rate_for_all_is_said_with_the_command_that_tunes(tmp_path: Path):
    cells = compared(tmp_path, ({}, events()), (EDP, events(step_s=2)))
    assert "not tuned per algorithm (COMMAND tunes it)" in said(cells, "COMMAND")[-1]
    assert "tuned" not in said(cells)[-1]

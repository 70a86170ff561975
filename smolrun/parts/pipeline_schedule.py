"""Pipeline schedules: in which order a stage runs its micro-batches forward and backward. Pure
data, and a simulator of the time that they take.

    gpipe   stage 0   F0 F1 F2 F3 .  .  B0 B1 B2 B3     all micro-batches forward, then all backward
            stage 1   .  F0 F1 F2 F3 B0 B1 B2 B3 .
    1f1b    stage 0   F0 F1 .  B0 F2 B1 F3 B2 .  B3     backward as soon as possible, which frees
            stage 1   .  F0 B0 F1 B1 F2 B2 F3 B3 .      the activations of that micro-batch

A forward needs the same micro-batch's forward on the stage before, a backward its backward on the
stage after. With p stages, m micro-batches and equal times, a stage idles for (p - 1) / (m + p - 1)
of a step in both; gpipe holds the activations of m micro-batches, 1f1b of min(p - stage, m).

Source: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline
Parallelism", 2019; Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN
Training", 2019, and "Memory-Efficient Pipeline-Parallel DNN Training", 2021 (1F1B with a flush).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class StageAction(NamedTuple):
    """What a stage does with one micro-batch; where it is says what it receives and sends."""

    kind: Literal["forward", "backward"]
    micro_batch: int


Schedule = Callable[[int, int, int], list[StageAction]]


def gpipe(stage: int, stages: int, micro_batches: int) -> list[StageAction]:
    """The actions of a stage: all micro-batches forward, then all backward."""
    forward = [StageAction("forward", number) for number in range(micro_batches)]
    return forward + [StageAction("backward", number) for number in range(micro_batches)]


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> list[StageAction]:
    """The actions of a stage: a warm-up of one forward for every stage after it, then a forward and
    a backward in turns, then a cool-down of the backwards that are missing."""
    cool_down = range(micro_batches - min(stages - stage - 1, micro_batches), micro_batches)
    steady = without_flush(stage, stages, micro_batches, 0)
    return steady + [StageAction("backward", number) for number in cool_down]


def without_flush(
    stage: int, stages: int, micro_batches: int, outstanding: int
) -> list[StageAction]:
    """The actions of a stage in one step of many: as `one_f_one_b` without its cool-down, which
    belongs to the next step. `outstanding` backwards of the step before precede its own, with the
    numbers -outstanding to -1; its warm-up needs so many forwards less."""
    warm_up = min(stages - stage - 1, micro_batches)
    forward = [StageAction("forward", number) for number in range(micro_batches)]
    backward = [StageAction("backward", n) for n in range(-outstanding, micro_batches - warm_up)]
    turns = zip(forward[warm_up - outstanding :], backward, strict=True)
    return forward[: warm_up - outstanding] + [action for pair in turns for action in pair]


SCHEDULES: Mapping[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b}


@dataclass(frozen=True)
class TimedAction:
    """An action in a simulation, in seconds from the beginning of the step."""

    action: StageAction
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """One step: what every stage does when."""

    stages: list[list[TimedAction]]

    @property
    def seconds(self) -> float:
        """Until the last stage has done its last action."""
        return max(stage[-1].end_s for stage in self.stages)

    @property
    def bubble(self) -> float:
        """Share of the step in which stages idle, all together."""
        busy_s = sum(timed.end_s - timed.begin_s for stage in self.stages for timed in stage)
        return 1 - busy_s / (len(self.stages) * self.seconds)

    def held(self, stage: int) -> int:
        """The most micro-batches whose activations a stage has at one time."""
        changes = [1 if t.action.kind == "forward" else -1 for t in self.stages[stage]]
        return max(sum(changes[: number + 1]) for number in range(len(changes)))


def simulate(
    actions: Sequence[Sequence[StageAction]],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    hop_s: float = 0.0,
) -> Simulation:
    """A step of stages that take so many seconds for a micro-batch each, where a tensor takes
    `hop_s` to the next stage, one after the other in each direction. ValueError where the actions
    of the stages wait for each other for ever."""
    done: dict[tuple[int, StageAction], float] = {}  # when it is where the neighbour needs it
    link_free_s: dict[tuple[int, str], float] = {}
    stages: list[list[TimedAction]] = [[] for _ in actions]
    is_moving = True
    while is_moving:
        is_moving = False
        for stage, todo in enumerate(actions):
            while len(stages[stage]) < len(todo):
                action = todo[len(stages[stage])]
                arrives_s = _arrival(done, stage, action, len(actions))
                if arrives_s is None:
                    break
                is_forward = action.kind == "forward"
                free_s = stages[stage][-1].end_s if stages[stage] else 0.0
                begin_s = max(free_s, arrives_s)
                end_s = begin_s + (forward_s if is_forward else backward_s)[stage]
                stages[stage].append(TimedAction(action, begin_s, end_s))
                sent_s = max(end_s, link_free_s.get((stage, action.kind), 0.0)) + hop_s
                link_free_s[stage, action.kind] = done[stage, action] = sent_s
                is_moving = True
    stuck = [stage for stage, todo in enumerate(actions) if len(stages[stage]) < len(todo)]
    if stuck:
        raise ValueError(f"stages {stuck} wait for each other")
    return Simulation(stages)


def _arrival(
    done: Mapping[tuple[int, StageAction], float], stage: int, action: StageAction, stages: int
) -> float | None:
    """When what an action needs is there; None where that is not known yet."""
    neighbour = stage - 1 if action.kind == "forward" else stage + 1
    if 0 <= neighbour < stages:
        return done.get((neighbour, action))
    own = StageAction("forward", action.micro_batch)
    return 0.0 if action.kind == "forward" or (stage, own) in done else None

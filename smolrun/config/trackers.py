"""Group `tracker`: who reads the events of a run, beside the console."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smolrun.config.base import Name, Natural, Positive, Section

_TIMELINE = Field(description="Steps that timeline.json shows, from the sixth on; 0 = no timeline")


class JsonLines(Section):
    """Only the file metrics.jsonl of the run's folder, which every tracker writes too."""

    kind: Literal["jsonl"] = Field(description="jsonl = nothing but metrics.jsonl")
    timeline_steps: Natural = _TIMELINE


class TensorBoard(Section):
    """Also TensorBoard's event files, in the folder `tensorboard` of the run's folder."""

    kind: Literal["tensorboard"] = Field(description="tensorboard = TensorBoard's files too")
    timeline_steps: Natural = _TIMELINE


class Wandb(Section):
    """Also one W&B run, in the folder `wandb` of the run's folder and online if logged in."""

    kind: Literal["wandb"] = Field(description="wandb = a W&B run too")
    mode: Literal["auto", "online", "offline"] = Field(
        description="auto = online if a key is found (wandb login), else offline"
    )
    project: Name = Field(description="W&B's project")
    entity: Name | None = Field(description="W&B's user or team; null = your default one")
    group: Name | None = Field(description="Runs of one group stand together; null = none")
    tags: list[Name] = Field(description="Words to find the run by")
    timeout_s: Positive = Field(
        description="Longest wait for W&B's server: at the start (nobody waits), and at the end"
    )
    timeline_steps: Natural = _TIMELINE


Tracker = Annotated[JsonLines | TensorBoard | Wandb, Field(discriminator="kind")]

"""One choice of a request: its tokens, and how many of them a batch has brought to the stages.

    tokens      p p p p p p g g g        prompt, then generated
    scheduled   ------------->           in the cache once all batches are through
    pending                  g g         to be scheduled: the rest of the prompt, or the last token

Pure data.
"""

from __future__ import annotations

from dataclasses import dataclass

from smolrun.serving.messages import Submit


@dataclass(eq=False, slots=True)
class Sequence:
    """A choice from its submission to its end. `slot`: where its keys and values are, None while it
    waits and after its end."""

    request: Submit
    choice: int
    tokens: list[int]
    max_length: int  # of prompt and generated tokens
    slot: int | None = None
    scheduled: int = 0
    # Tokens of the prompt that another request has computed; of the first choice, as the others
    # share its prompt.
    cached: int = 0
    last_batch: int = -1  # the number of the batch that it was in last
    is_finished: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of the prompt are to be scheduled."""
        return self.scheduled < self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens that are known and not scheduled; 0 while the next one is being computed."""
        return len(self.tokens) - self.scheduled

    @property
    def generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.prompt_length


def sequences_of(request: Submit, capacity: int) -> list[Sequence]:
    """One sequence per choice. A slot of `capacity` tokens ends a sequence early."""
    max_length = min(len(request.prompt_ids) + request.max_tokens, capacity)
    return [
        Sequence(request, choice, list(request.prompt_ids), max_length)
        for choice in range(max(1, request.choices))  # there is one to be refused
    ]

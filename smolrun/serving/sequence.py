"""One choice of a request: its tokens, and how many of them a batch has brought to the stages.

    tokens      p p p p p p g g g        prompt, then generated
    scheduled   ------------->           in the cache once all batches are through
    pending                  g g         to be scheduled: the rest of the prompt, or the last token

After the loss of a stage `scheduled` is 0 again, and generated tokens are brought like the prompt.

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
    # Tokens generated before its stages or its replica were lost: they are computed again as the
    # prompt is.
    replayed: int = 0
    is_first: bool = True  # of its request: it brings the prompt, which the other choices share
    slot: int | None = None
    scheduled: int = 0
    # Tokens of the prompt that another request has computed; of the first choice, as the others
    # share its prompt.
    cached: int = 0
    last_batch: int = -1  # the number of the batch that it was in last
    was_admitted: bool = False  # by a scheduler whose stages are lost
    reported: int = 0  # tokens of the prompt whose progress was reported
    is_finished: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def prefill_left(self) -> int:
        """Tokens to be scheduled of those that were known when it was admitted."""
        return max(0, self.prompt_length + self.replayed - self.scheduled)

    @property
    def pending(self) -> int:
        """Tokens that are known and not scheduled; 0 while the next one is being computed."""
        return len(self.tokens) - self.scheduled

    def restart(self, capacity: int) -> None:
        """Its stages are lost: everything is computed again, in a slot of `capacity` tokens."""
        self.slot, self.scheduled, self.last_batch = None, 0, -1
        self.replayed = self.generated
        self.max_length = min(self.max_length, capacity)

    @property
    def generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.prompt_length


def sequences_of(request: Submit, capacity: int) -> list[Sequence]:
    """One sequence per choice. A slot of `capacity` tokens ends a sequence early."""
    max_length = min(len(request.prompt_ids) + request.max_tokens, capacity)
    sequences: list[Sequence] = []
    for choice in sorted(request.continued) or range(max(1, request.choices)):  # one to be refused
        replayed = request.continued.get(choice, [])
        tokens, is_first = [*request.prompt_ids, *replayed], not sequences
        sequences.append(Sequence(request, choice, tokens, max_length, len(replayed), is_first))
    return sequences

"""The task messages of task=serve. Between the driver and rank 0, or every replica, topic `TOPIC`:

    driver                                          rank 0
      | <------------------------------ Ready ------- |   a token has flowed through all stages
      | -- Submit (token ids, sampling) ------------> |
      | <------------------------- StepOutput ------- |   new tokens of all requests, once a step
      | -- Cancel (the client is gone) -------------> |
      | <------------------------- Recovering ------- |   a stage is lost; Ready follows

Before that between the driver and every rank, topic `LOADING`:

    driver                                          rank
      | -- Probe (the model's shape) -------------> |   measures one layer, for about a second
      | <------------------------- Probed --------- |
      | -- Load (layers, slots) ------------------> |
      | <------------------ Loading ... Loaded ---- |

Token ids only: text, templates and stop strings belong to the driver. Pure data.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from smolrun.models.sampling import Sampling

TOPIC = "serving"
LOADING = "serving.loading"
HOSTS = "serving.hosts"
VOCABULARY = "serving.vocabulary"
VOCABULARY_TOKENS = 20_000  # in one message

RequestId = Annotated[str, Meta(max_length=100)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
FinishReason = Literal["stop", "length", "cancelled", "error"]
# A token's log-probability, and the likeliest ids in its place with theirs, best first.
Score = tuple[float, list[tuple[TokenId, float]]]
# Of weights; computation and links between stages are bf16 unless they are float32.
ServingDtype = Literal["float32", "bf16", "int8", "int4"]


class Submit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="submit"):
    """A request: `choices` continuations of one prompt, each of at most `max_tokens` tokens.

    A choice ends at a token of `stop_ids`, which is reported too. `top_logprobs`: None reports no
    log-probabilities, n those of the chosen token and of the n likeliest ones. `echo_logprobs`
    reports them for the tokens of the prompt as well.

    `continued`: the request ran elsewhere, and these choices go on after the tokens that they have
    so far; others have ended, unless it is empty. `version`: of the weights, as of Load.
    """

    request: RequestId
    prompt_ids: list[TokenId]
    max_tokens: int
    choices: int = 1
    sampling: Sampling = Sampling()
    stop_ids: list[TokenId] = []
    top_logprobs: int | None = None
    echo_logprobs: bool = False
    continued: dict[int, list[TokenId]] = {}
    version: int = 0


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cancel"):
    """End a request, or one choice of it; answered by `Finished`, unless it has finished before."""

    request: RequestId
    choice: int | None = None


class Ping(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ping"):
    """To a replica, a few times a second: answered at once by an empty StepOutput, also while its
    engine computes. There is no mesh whose heartbeats would show that it is frozen."""


class Retire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="retire"):
    """To a replica: no more requests for weights of this version come. Their engine ends with its
    last answer, and gives its memory back."""

    version: int


ToEngine = Submit | Cancel | Ping | Retire


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new token. `top` are the likeliest ids with their log-probabilities, best first."""

    request: RequestId
    choice: int
    id: TokenId
    logprob: float | None = None
    top: list[tuple[TokenId, float]] | None = None


class Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A choice has ended, after its last token. `cached_tokens` of the prompt were not computed
    anew; 0 for other choices than the first, which share its prompt. `message` is there where the
    reason is error."""

    request: RequestId
    choice: int
    reason: FinishReason
    cached_tokens: int = 0
    message: str = ""


class Prefill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`done` of `total` prompt tokens of a request are computed; `logprobs` of those since the last
    report, if asked for (None for the first token of a prompt). `cached_tokens`: as in Finished,
    which does not come where the driver finds a stop string."""

    request: RequestId
    done: int
    total: int
    logprobs: list[Score | None] | None = None
    cached_tokens: int = 0


class StageStats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage, and what it did since the server began. `memory_bytes`: of its process;
    `network_s`: from the first to the last byte of the messages that it received; `tokens`: of
    prompts and answers that went through its layers."""

    rank: int
    host: str
    first_layer: int
    last_layer: int
    weight_bytes: int = 0
    cache_bytes: int = 0
    memory_bytes: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    network_s: float = 0.0
    tokens: int = 0
    sent_bytes: int = 0


class Stats(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The load of the engine now, and its totals."""

    running: int
    waiting: int
    cache_usage: float
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    stages: list[StageStats] = []


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ready"):
    """Requests are taken from now on. `cache_tokens`: of all sequences together; `version`: as of
    Load."""

    max_sequence_length: int
    cache_tokens: int
    max_running: int
    stages: list[StageStats] = []
    version: int = 0


class Recovering(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="recovering"):
    """Stages are lost or changed: running requests pause, and Ready comes again once the model is
    loaded on those that are there."""

    reason: str


class StepOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="step"):
    """What one step of the engine brought; `stats` about once a second."""

    tokens: list[Token] = []
    finished: list[Finished] = []
    prefill: list[Prefill] = []
    stats: Stats | None = None


FromEngine = Ready | Recovering | StepOutput


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="probe"):
    """Measure one layer of a model. `source`: a ModelSource of serving as JSON; its folder is not
    read."""

    source: dict[str, Any]
    dtype: ServingDtype


class Probed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="probed"):
    """Seconds that one layer, and the head, take for one token; bytes that are available."""

    rank: int
    layer_s: float
    head_s: float
    free_bytes: int


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="load"):
    """Become a stage of the pipeline: all ranks get the same, and each takes its own part.

    `stages`: the ranks that hold layers, in order, rank 0 first; `last_layers`: the last layer of
    each. A rank that is not among them waits for the end of the run. `folders`: where the model is
    on the host of each rank. Every stage keeps `slots` sequences of up to `capacity` tokens, and
    computes at most `chunk_tokens` tokens of prompts at once. `generation`: of the mesh; a rank
    drops what is for another one. `head`: the rank whose engine schedules; a replica is the only
    stage and its own head. `version` numbers the weights.
    """

    source: dict[str, Any]
    dtype: ServingDtype
    stages: list[int]
    last_layers: list[int]
    folders: list[str]
    slots: int
    capacity: int
    chunk_tokens: int = 256
    prefix_reuse: bool = True
    batch_invariant: bool = False
    generation: int = 0
    head: int = 0
    version: int = 0
    beside: bool = False


class Loading(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="loading"):
    """`done` of `total` tensors of this rank are in memory."""

    rank: int
    done: int
    total: int


class Loaded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="loaded"):
    """The stage of this rank stands; a rank without layers has no bytes."""

    rank: int
    weight_bytes: int
    cache_bytes: int


class HostMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Memory of a rank's host, available and in all, and of the rank's own process; topic `HOSTS`,
    to the driver, once a second where it has changed. `cache_grows`: a slot of the cache takes
    memory as tokens come, as on a CPU; elsewhere it has had all of it from the start."""

    rank: int
    host: str
    available_bytes: int
    total_bytes: int
    process_bytes: int
    cache_grows: bool = True


class StayAwake(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keep the machine awake, or let it sleep; topic `HOSTS`, to every rank."""

    is_on: bool


class Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bytes of the tokens `first` and after; topic `VOCABULARY`, to every rank before it loads.
    Grammars of answers need them."""

    first: TokenId
    token_bytes: list[bytes]


class NotLoaded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="not_loaded"):
    """A replica continues with its old weights; `lacks_memory`: these would not fit beside them."""

    rank: int
    version: int
    reason: str
    lacks_memory: bool = False


ToRank = Probe | Load
FromRank = Probed | Loading | Loaded | NotLoaded

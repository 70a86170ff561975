"""The requests of the HTTP API, checked: types and ranges as in OpenAI's API, strictly.

What is not known is ignored, as clients send fields of other servers. What is known and would
change the answer is never ignored: a wrong value is an error that names the field. The reference
page docs/serving_api.md is made from these classes.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)

from smolrun.files import not_too_deep

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 4096
MAX_TOKENS = 2**31 - 1
_MAX_SEED = 2**63 - 1024  # the largest of 64 bits that JavaScript's numbers hold exactly
MAX_PROMPTS = 64


def _encodable(text: str) -> str:
    """JSON can hold half of a surrogate pair, which is no character."""
    if not text.isascii():
        text.encode()  # UnicodeEncodeError is a ValueError
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]
Number = StrictFloat  # takes integers as well
StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
TokenCount = Annotated[StrictInt, Field(ge=1, le=MAX_TOKENS)]
TokenNumber = Annotated[StrictInt, Field(ge=0, lt=2**31)]
Temperature = Annotated[Number, Field(ge=0, le=2)]
TopP = Annotated[Number, Field(gt=0, le=1)]
TopK = Annotated[StrictInt, Field(ge=-1, le=MAX_TOKENS)]
Seed = Annotated[StrictInt, Field(ge=-_MAX_SEED, le=_MAX_SEED)]
WorkerRank = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenNumber], Field(min_length=1)]
T = TypeVar("T")
Prompts = Annotated[list[T], Field(min_length=1, max_length=MAX_PROMPTS)]
Switch = StrictBool | StrictInt | StrictFloat | Text | None
_NONE: dict[str, JsonValue] = {
    "maxItems": 0
}  # for the description; that it is refused by name is said elsewhere
Role = Literal["system", "developer", "user", "assistant", "tool"]
MAX_TOOLS = 256
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


def _schema(value: dict[str, Any]) -> dict[str, Any]:
    """Texts in it may hold what `_encodable` refuses; libraries walk it by recursion."""
    json.dumps(not_too_deep(value), ensure_ascii=False, allow_nan=False).encode()
    return value


JsonSchema = Annotated[dict[str, Any], AfterValidator(_schema)]


class ApiRequest(BaseModel):
    """Unknown fields are ignored; nothing is converted."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class TextPart(ApiRequest):
    """A part of a message."""

    type: Literal["text"] = Field(description="No other types are supported")
    text: Text = Field(description="The text")


class CalledFunction(ApiRequest):
    """A function with the arguments of a call."""

    name: FunctionName = Field(description="Its name")
    arguments: Text = Field(description="A JSON object as text")


class AnsweredCall(ApiRequest):
    """A call in an earlier answer."""

    id: Text = Field(description="As the answer had it")
    type: Literal["function"] = Field("function", description="No other types are supported")
    function: CalledFunction = Field(description="What was called")


class ChatMessage(ApiRequest):
    """One message of a conversation."""

    role: Role = Field(description="developer is the same as system; tool: what a call returned")
    content: Text | list[TextPart] | None = Field(
        None, description="The text, or a list of parts of type text; not needed beside tool_calls"
    )
    reasoning_content: Text | None = Field(
        None,
        description="What was thought before an answer; the template may leave it out",
    )
    tool_calls: Annotated[list[AnsweredCall], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="The calls of an answer (role assistant)"
    )
    tool_call_id: Text | None = Field(None, description="Of the call (role tool)")

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(ApiRequest):
    """A function that the model may call."""

    name: FunctionName = Field(description="Its name")
    description: Text | None = Field(None, description="What it does")
    parameters: JsonSchema | None = Field(None, description="The JSON Schema of its arguments")
    strict: StrictBool | None = Field(
        None, description="Refuse a schema with parts that cannot be obeyed, in calls that must be"
    )


class Tool(ApiRequest):
    """What the model may use."""

    type: Literal["function"] = Field(description="No other types are supported")
    function: Function = Field(description="The function")


class NamedFunction(ApiRequest):
    """One of the functions."""

    name: FunctionName = Field(description="Its name")


class NamedTool(ApiRequest):
    """The tool that must be used."""

    type: Literal["function"] = Field(description="No other types are supported")
    function: NamedFunction = Field(description="The function")


class NamedSchema(ApiRequest):
    """The schema of an answer."""

    name: Text | None = Field(None, description="Not used")
    json_schema: JsonSchema = Field(
        alias="schema", description="JSON Schema; parts that cannot be obeyed are refused"
    )


class ResponseFormat(ApiRequest):
    """The form of an answer; json_object and json_schema need llguidance on the server."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="json_object: any")
    json_schema: NamedSchema | None = Field(None, description="For the type json_schema")


class StreamOptions(ApiRequest):
    """What a stream reports beside the answer."""

    include_usage: StrictBool | None = Field(
        None, description="A last chunk with the numbers of tokens"
    )


class CompletionFields(ApiRequest):
    """What both kinds of completions take. Where a request does not say how tokens are drawn, the
    server's defaults hold."""

    model: Text | None = Field(
        None, description="The name of the served model, see GET /v1/models; may be left out"
    )
    stream: StrictBool | None = Field(None, description="Send the answer as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="What a stream reports besides")
    temperature: Temperature | None = Field(None, description="0 takes the likeliest token")
    top_p: TopP | None = Field(
        None, description="Only the likeliest tokens that together have this probability"
    )
    top_k: TopK | None = Field(None, description="Only the k likeliest tokens; 0 or -1: all")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="Only tokens with this share of the likeliest one's probability"
    )
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = Field(
        None, description="Divides the logits of tokens that were there; 1: none"
    )
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = Field(
        None, description="Subtracted once for a token of the answer so far"
    )
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = Field(
        None, description="Subtracted for each time a token is in the answer so far"
    )
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = Field(
        None, description="Token id -> what is added to its logit"
    )
    seed: Seed | None = Field(
        None, description="The same seed and request give the same answer; 0 is a seed as well"
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="The answer ends before any of these texts"
    )
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="How many answers"
    )
    stop_token_ids: Annotated[list[TokenNumber], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="The answer ends before any of these tokens"
    )
    ignore_eos: StrictBool | None = Field(
        None, description="Do not end the answer where the model would; for measurements"
    )
    worker_rank: WorkerRank | None = Field(
        None, description="The replica that is to answer; another one continues if it is lost"
    )

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(CompletionFields):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The conversation so far, the question last"
    )
    max_tokens: TokenCount | None = Field(
        None, description="Of each answer; without: what the context has room for, up to a limit"
    )
    max_completion_tokens: TokenCount | None = Field(
        None, description="The newer name of max_tokens"
    )
    logprobs: StrictBool | None = Field(None, description="Report log-probabilities")
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="Beside each token report so many of the likeliest ones"
    )
    chat_template_kwargs: dict[Text, Switch] | None = Field(
        None, description="Switches of the model's template, such as enable_thinking"
    )
    continue_final_message: StrictBool | None = Field(
        None, description="Continue the last message, which is an answer that was cut"
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call; it does if its template has tools"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="required and a named function make the answer a call"
    )
    parallel_tool_calls: StrictBool | None = Field(
        None, description="false: the answer ends with its first call"
    )
    functions: list[Any] | None = Field(
        None, description="Refused for now, unless empty", json_schema_extra=_NONE
    )
    function_call: Any = Field(
        None,
        description="Refused for now, but none and auto",
        json_schema_extra={"enum": [None, "none", "auto"]},
    )
    response_format: ResponseFormat | None = Field(
        None, description="The answer is JSON, of a schema if one is given"
    )
    modalities: list[Any] | None = Field(
        None,
        description="Refused for now, but text",
        json_schema_extra={"items": {"const": "text"}},
    )


class CompletionRequest(CompletionFields):
    """POST /v1/completions"""

    prompt: Text | Prompts[Text] | TokenIds | Prompts[TokenIds] = Field(
        description="A text, its token ids, or a list of one of these"
    )
    max_tokens: TokenCount | None = Field(None, description="Default 16")
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="Report log-probabilities of so many of the likeliest tokens"
    )
    echo: StrictBool | None = Field(None, description="Begin the answer with the prompt")
    suffix: Text | None = Field(
        None, description="Refused, unless empty", json_schema_extra={"maxLength": 0}
    )
    best_of: StrictInt | None = Field(None, description="Refused, unless equal to n")


class ItemPart(ApiRequest):
    """A part of an item of /v1/responses."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"] = Field(
        description="No other types are supported"
    )
    text: Text = Field(description="The text")


class InputItem(ApiRequest):
    """An item of a conversation of /v1/responses: of its input, or of an earlier output."""

    type: Literal[
        "message", "function_call", "function_call_output", "reasoning", "item_reference"
    ] = Field("message", description="Which of the fields below count")
    id: Text | None = Field(None, description="Of the item that an item_reference stands for")
    role: Literal["system", "developer", "user", "assistant"] | None = Field(
        None, description="Of a message"
    )
    content: Text | list[ItemPart] | None = Field(
        None, description="Of a message or of reasoning: the text, or its parts"
    )
    call_id: Text | None = Field(None, description="Of a function_call, or the call of an output")
    name: FunctionName | None = Field(None, description="Of the function that was called")
    arguments: Text | None = Field(None, description="Of the call: a JSON object as text")
    output: Text | list[ItemPart] | None = Field(None, description="What the call returned")


class OfferedTool(ApiRequest):
    """What the model may use in /v1/responses."""

    type: Text = Field(description="function; other types are left out, as x-smolrun-note says")
    name: FunctionName | None = Field(None, description="Of the function")
    description: Text | None = Field(None, description="What it does")
    parameters: JsonSchema | None = Field(None, description="The JSON Schema of its arguments")
    strict: StrictBool | None = Field(None, description="As in /v1/chat/completions")


class FunctionChoice(NamedFunction):
    """The tool that must be used, in /v1/responses."""

    type: Literal["function"] = Field(description="No other types are supported")


class TextFormat(ApiRequest):
    """The form of an answer of /v1/responses; all but text need llguidance on the server."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="json_object: any")
    name: Text | None = Field(None, description="Not used")
    json_schema: JsonSchema | None = Field(
        None, alias="schema", description="For the type json_schema"
    )


class TextOptions(ApiRequest):
    """Of the text of an answer."""

    format: TextFormat | None = Field(None, description="The answer is JSON, of a schema if given")


class ResponsesRequest(ApiRequest):
    """POST /v1/responses"""

    model: Text | None = Field(None, description="As in /v1/chat/completions")
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="What the user says, or the conversation so far"
    )
    instructions: Text | None = Field(None, description="The system message")
    stream: StrictBool | None = Field(None, description="Send the answer as server-sent events")
    max_output_tokens: TokenCount | None = Field(None, description="Of the answer")
    temperature: Temperature | None = Field(None, description="0 takes the likeliest token")
    top_p: TopP | None = Field(None, description="As in /v1/chat/completions")
    top_k: TopK | None = Field(None, description="As in /v1/chat/completions")
    seed: Seed | None = Field(None, description="As in /v1/chat/completions")
    worker_rank: WorkerRank | None = Field(None, description="As in /v1/chat/completions")
    chat_template_kwargs: dict[Text, Switch] | None = Field(
        None, description="As in /v1/chat/completions"
    )
    tools: Annotated[list[OfferedTool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call"
    )
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = Field(
        None, description="As in /v1/chat/completions"
    )
    parallel_tool_calls: StrictBool | None = Field(
        None, description="false: the answer ends with its first call"
    )
    text: TextOptions | None = Field(None, description="The form of the answer")
    previous_response_id: Text | None = Field(
        None, description="The conversation that this one continues; its instructions do not count"
    )
    store: StrictBool | None = Field(
        None, description="false: do not keep the answer, in memory, for later requests"
    )
    metadata: Annotated[dict[Text, Text], Field(max_length=16)] | None = Field(
        None, description="Comes back with the answer"
    )
    top_logprobs: StrictInt | None = Field(None, description="Refused, unless 0")
    background: StrictBool | None = Field(None, description="Refused, unless false")
    conversation: Any = Field(None, description="Refused; use previous_response_id")
    prompt: Any = Field(None, description="Refused: a template that OpenAI keeps")


class SimpleRequest(ApiRequest):
    """POST /chat and POST /query, the API of the system that smolrun descends from."""

    text: Text = Field(description="What the user says")
    max_tokens: TokenCount | None = Field(None, description="Of the answer")
    temperature: Temperature | None = Field(None, description="0 takes the likeliest token")
    top_p: TopP | None = Field(None, description="As in /v1/chat/completions")
    top_k: TopK | None = Field(None, description="As in /v1/chat/completions")
    seed: Seed | None = Field(None, description="The same seed and text give the same answer")
    worker_rank: WorkerRank | None = Field(None, description="As in /v1/chat/completions")
    decoding_strategy: Literal["greedy", "sampling", "top_k", "top_p"] | None = Field(
        None, description="greedy is temperature 0; the others follow from the keys above"
    )


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="What happened, and what to do")
    type: str = Field(description="The class of the error, as in OpenAI's API")
    param: str | None = Field(description="The field that is wrong")
    code: str | None = Field(description="For programs")


class ErrorAnswer(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail

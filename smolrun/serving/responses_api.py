"""POST /v1/responses: OpenAI's newer API, over the same generation as a chat completion.

    input items, instructions, tools --> messages of a chat --> pieces --> output items, events

A conversation may be continued by the id of its last response, or name items by their ids: they are
kept in this process's memory, up to a limit, unless `store` is false.
Source: OpenAI's API reference, Responses.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from smolrun.serving.api_errors import ApiError, json_response, refuse
from smolrun.serving.chat_completions import ChatCompletion
from smolrun.serving.generation import Generation, Service, merged
from smolrun.serving.protocol import (
    MAX_MESSAGES,
    ApiRequest,
    ChatRequest,
    FunctionChoice,
    InputItem,
    OfferedTool,
    ResponsesRequest,
)
from smolrun.serving.responses import LOADING, comments, event, origin_headers

MOST_KEPT_BYTES = 16 << 20  # of all responses as JSON; the oldest are dropped
_PARAMS = {"messages": "input", "response_format": "text.format"}  # of a chat -> of a response
_SAME = (
    *("model", "stream", "temperature", "top_p", "top_k", "seed", "worker_rank"),
    *("chat_template_kwargs", "parallel_tool_calls"),
)
_ECHOED = ("instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p")

Item = dict[str, Any]


@dataclass(frozen=True)
class _Kept:
    """`items`: of the whole conversation, the response's own output last; `num_bytes` as JSON."""

    body: dict[str, Any]
    items: Sequence[Item]
    num_bytes: int


class KeptResponses:
    """Responses that later requests may name, by the API key of their client; on the event loop."""

    def __init__(self, most_bytes: int = MOST_KEPT_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    def add(self, key: str, body: dict[str, Any], before: Sequence[Item]) -> None:
        """Keep a response after the items `before` it."""
        size = len(msgspec.json.encode([body, before]))
        self._kept[key, body["id"]] = _Kept(body, [*before, *body["output"]], size)
        while sum(one.num_bytes for one in self._kept.values()) > self._most_bytes:
            self._kept.popitem(last=False)

    def find(self, key: str, id: str, param: str | None = None) -> _Kept:
        """ApiError 404, also for the response of another API key."""
        if (found := self._kept.get((key, id))) is None:
            message = f"no response {id[:80]} is kept: it was not stored, is too old, or the "
            message += "server has started since; send the whole conversation as input"
            raise ApiError(404, message, param=param, code="response_not_found")
        return found

    def item(self, key: str, id: str, param: str) -> Item:
        """An item of any kept conversation; ApiError 404."""
        for (owner, _), one in reversed(self._kept.items()):
            for item in one.items if owner == key else ():
                if item.get("id") == id:
                    return item
        message = f"no item {id[:80]} is kept; set store=false, so that the client sends it whole"
        raise ApiError(404, message, param=param, code="item_not_found")

    def forget(self, key: str, id: str) -> None:
        """ApiError 404."""
        self.find(key, id)
        del self._kept[key, id]


def client_key(request: Request) -> str:
    """What tells the clients of a server apart."""
    return request.headers.get("authorization", "")


class ModelResponse(ChatCompletion):
    """One request."""

    def __init__(
        self, service: Service, asked: ResponsesRequest, request: Request, kept: KeptResponses
    ) -> None:
        """ApiError for what cannot be written as a chat."""
        refuse(
            top_logprobs=bool(asked.top_logprobs),
            background=bool(asked.background),
            conversation=asked.conversation is not None,
            prompt=asked.prompt is not None,
        )
        self._asked, self._kept, self._key = asked, kept, client_key(request)
        self._items = _conversation(asked, kept, self._key)
        super().__init__(service, _chat_request(asked, self._items), request)
        self._output = Output()
        self._response_id = f"resp_{secrets.token_hex(24)}"

    async def begin(self) -> list[Generation]:
        """As of a chat, with this API's names in errors. Tools that OpenAI runs itself are left
        out, as coding agents offer them with every request."""
        hosted = {tool.type: None for tool in self._asked.tools or [] if tool.type != "function"}
        if hosted:
            self.notes.append(f"left out of tools: {', '.join(hosted)}")
        try:
            return await super().begin()
        except ApiError as error:
            error.param = _PARAMS.get(error.param or "", error.param)
            raise

    async def _whole(self, generations: list[Generation]) -> Response:
        status = "completed"
        async for _, piece in merged(generations):
            for entry in self.entries(0, piece):
                [*self._output.push(entry["delta"])]
                status = _status(entry) or status
        [*self._output.close(status)]
        headers = origin_headers(generations) | self.headers
        return json_response(self._finished(status, generations), headers=headers)

    async def events(self, generations: list[Generation]) -> AsyncIterator[bytes]:
        """Of the whole stream, and comments; an error is an event too."""
        number = 0

        def frame(body: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            kind: bytes = b"event: " + body["type"].encode() + b"\n"
            return kind + event(body | {"sequence_number": number - 1})

        begun = self._body("in_progress")
        yield frame({"type": "response.created", "response": begun})
        yield frame({"type": "response.in_progress", "response": begun})
        if any(one.stream.waits_for_model for one in generations):
            yield LOADING
        status = "completed"
        try:
            async for _, piece in merged(generations):
                for comment in comments(piece):
                    yield comment
                for entry in self.entries(0, piece):
                    for body in self._output.push(entry["delta"]):
                        yield frame(body)
                    status = _status(entry) or status
            for body in self._output.close(status):
                yield frame(body)
            last = self._finished(status, generations)
        except ApiError as error:
            status, last = "failed", self._body("failed")
            last["error"] = {"code": "server_error", "message": error.message}
        yield frame({"type": f"response.{status}", "response": last})

    def _finished(self, status: str, generations: list[Generation]) -> dict[str, Any]:
        """The response, which is kept if it may be."""
        (usage,) = [one.usage for one in generations]
        body = self._body(status)
        body["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},  # they are not told apart
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if self._asked.store is not False:
            self._kept.add(self._key, body, self._items)
        return body

    def _body(self, status: str) -> dict[str, Any]:
        asked = self._asked
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        choice = asked.tool_choice or "auto"
        form = asked.text.format if asked.text else None
        return {
            "id": self._response_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "model": self.service.model,
            "output": [*self._output.items],
            **{name: getattr(asked, name) for name in _ECHOED},
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "reasoning": {"effort": None, "summary": None},
            "store": asked.store is not False,
            "text": {"format": _dumped(form) if form else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else _dumped(choice),
            "tools": [_dumped(tool) for tool in _functions(asked)],
            "truncation": "disabled",
            "usage": None,
        }


def _dumped(given: ApiRequest) -> dict[str, Any]:
    return given.model_dump(by_alias=True, exclude_none=True)


def _status(entry: dict[str, Any]) -> str | None:
    """Of the response, where an entry of a chat ends it."""
    reason = entry["finish_reason"]
    return reason and ("incomplete" if reason == "length" else "completed")


class Output:
    """The items of a response as they grow, and the events of it. Pure."""

    def __init__(self) -> None:
        self.items: list[Item] = []  # the last one may be open
        self._is_open = False

    def push(self, delta: dict[str, Any]) -> Iterator[Item]:
        """What a delta of a chat completion brings."""
        if thought := delta.get("reasoning_content"):
            yield from self._text("reasoning", thought)
        if said := delta.get("content"):
            yield from self._text("message", said)
        for call in delta.get("tool_calls", ()):
            yield from self.close("completed")
            yield from self._call(call)

    def close(self, status: str) -> Iterator[Item]:
        """The end of the item that is open."""
        if not self._is_open:
            return
        self._is_open, item = False, self.items[-1]
        item["status"] = status
        (part,) = item["content"]
        named, kind = self._where(), part["type"]
        text = {"text": part["text"]} | self._logprobs(kind)
        yield {"type": f"response.{kind}.done", **named, "content_index": 0, **text}
        yield {"type": "response.content_part.done", **named, "content_index": 0, "part": part}
        yield self._item_event("done")

    def _text(self, kind: str, text: str) -> Iterator[Item]:
        if self._is_open and self.items[-1]["type"] != kind:
            yield from self.close("completed")
        if not self._is_open:
            yield from self._open(kind)
        part = self.items[-1]["content"][0]
        part["text"] += text
        event = f"response.{part['type']}.delta"
        delta = {"delta": text} | self._logprobs(part["type"])
        yield {"type": event, **self._where(), "content_index": 0, **delta}

    def _open(self, kind: str) -> Iterator[Item]:
        self._is_open = True
        item: Item = {"type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"id": f"msg_{secrets.token_hex(24)}", "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item |= {"id": f"rs_{secrets.token_hex(24)}", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        self.items.append(item | {"content": []})
        yield self._item_event("added")
        added = {"type": "response.content_part.added", **self._where(), "content_index": 0}
        yield added | {"part": dict(part)}
        self.items[-1]["content"].append(part)

    def _call(self, call: dict[str, Any]) -> Iterator[Item]:
        id, function = f"fc_{secrets.token_hex(24)}", call["function"]
        item = {"type": "function_call", "id": id, "call_id": call["id"], "status": "in_progress"}
        self.items.append(item | {"name": function["name"], "arguments": ""})
        yield self._item_event("added")
        arguments, event = function["arguments"], "response.function_call_arguments"
        yield {"type": f"{event}.delta", **self._where(), "delta": arguments}
        named = {"name": function["name"], "arguments": arguments}
        yield {"type": f"{event}.done", **self._where(), **named}
        self.items[-1] |= {"arguments": arguments, "status": "completed"}
        yield self._item_event("done")

    def _where(self) -> Item:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _item_event(self, what: str) -> Item:
        item = msgspec.json.decode(msgspec.json.encode(self.items[-1]))  # as it is now
        at = len(self.items) - 1
        return {"type": f"response.output_item.{what}", "output_index": at, "item": item}

    def _logprobs(self, kind: str) -> Item:
        return {"logprobs": []} if kind == "output_text" else {}


# --- a request as a chat ---------------------------------------------------------------------


def _conversation(asked: ResponsesRequest, kept: KeptResponses, key: str) -> list[Item]:
    """All items, those of the response that it continues first."""
    before: Sequence[Item] = ()
    if asked.previous_response_id is not None:
        before = kept.find(key, asked.previous_response_id, "previous_response_id").items
    if isinstance(asked.input, str):
        return [*before, {"type": "message", "role": "user", "content": asked.input}]
    items = enumerate(asked.input)
    return [*before, *(_whole_item(one, f"input[{at}]", kept, key) for at, one in items)]


_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "item_reference": ("id",),
}


def _whole_item(item: InputItem, where: str, kept: KeptResponses, key: str) -> Item:
    """With what it needs; ApiError."""
    for name in _NEEDED.get(item.type, ()):
        if getattr(item, name) is None:
            message, param = f"{where}.{name} is required", f"{where}.{name}"
            raise ApiError(400, message, param=param, code="missing_required_parameter")
    if item.type == "item_reference":
        return kept.item(key, str(item.id), f"{where}.id")
    return item.model_dump(exclude_none=True)


def _messages(instructions: str | None, items: Sequence[Item]) -> list[Item]:
    """As a chat has them; what was thought belongs to the answer after it."""
    messages: list[Item] = [{"role": "system", "content": instructions}] if instructions else []
    thought = ""
    for item in items:
        if item["type"] == "message":
            _add_message(messages, item["role"], _plain(item["content"]))
        elif item["type"] == "function_call":
            _add_call(messages, item)
        elif item["type"] == "function_call_output":
            output, call = _plain(item["output"]), item["call_id"]
            messages.append({"role": "tool", "content": output, "tool_call_id": call})
        elif item["type"] == "reasoning":
            thought = _plain(item.get("content", ""))
            continue
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"], thought = thought, ""
    return messages


def _add_message(messages: list[Item], role: str, text: str) -> None:
    """Templates may know a single system message, so the first two become one."""
    role = "system" if role == "developer" else role
    if role == "system" and [one["role"] for one in messages] == ["system"]:
        text = f"{messages.pop()['content']}\n\n{text}"
    messages.append({"role": role, "content": text})


def _add_call(messages: list[Item], item: Item) -> None:
    """To the message of the assistant that it belongs to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": item["name"], "arguments": item["arguments"]}
    calls = messages[-1].setdefault("tool_calls", [])
    calls.append({"id": item["call_id"], "type": "function", "function": function})


def _functions(asked: ResponsesRequest) -> list[OfferedTool]:
    """The tools that the model is given; ApiError for one without a name."""
    for at, tool in enumerate(asked.tools or []):
        if tool.type == "function" and tool.name is None:
            param = f"tools[{at}].name"
            code = "missing_required_parameter"
            raise ApiError(400, f"{param} is required", param=param, code=code)
    return [tool for tool in asked.tools or [] if tool.type == "function"]


def _plain(content: str | list[Item]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _chat_request(asked: ResponsesRequest, items: Sequence[Item]) -> ChatRequest:
    """The same request to /v1/chat/completions; ApiError for too many messages, or none."""
    body: dict[str, Any] = {name: getattr(asked, name) for name in _SAME}
    body["messages"] = _messages(asked.instructions, items)
    body["max_completion_tokens"] = asked.max_output_tokens
    body["tools"] = [{"type": tool.type, "function": _dumped(tool)} for tool in _functions(asked)]
    choice = asked.tool_choice
    if isinstance(choice, FunctionChoice):
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        body["tool_choice"] = choice
    if asked.text and (form := asked.text.format):
        schema = None if form.json_schema is None else {"schema": form.json_schema}
        body["response_format"] = {"type": form.type, "json_schema": schema}
    try:
        return ChatRequest.model_validate(body)
    except ValueError:  # all but the number of messages has been checked
        message = f"input needs 1 to {MAX_MESSAGES} messages"
        raise ApiError(400, message, param="input", code="invalid_value") from None

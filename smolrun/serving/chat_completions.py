"""POST /v1/chat/completions: a conversation in, an answer out, in OpenAI's shapes.

What a model thinks before it answers, <think>...</think>, is `reasoning_content`, as in vLLM.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from smolrun.serving.api_errors import ApiError, json_response
from smolrun.serving.generation import Generation, Piece, Service
from smolrun.serving.protocol import ChatRequest
from smolrun.serving.responses import (
    DONE,
    EventStream,
    event,
    prefill_comment,
    unless_gone,
    usage_json,
)
from smolrun.serving.text import Delta, ThinkingSplitter

CONTINUES_TEXT = "this base model has no chat template: it continues the text of the messages"
NO_LOGPROB = -9999.0  # as in OpenAI's API, for a token that is too unlikely to be reported


class ChatCompletion:
    """One request."""

    def __init__(self, service: Service, body: ChatRequest, request: Request) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._num_choices = body.n or 1
        self._splitters: list[ThinkingSplitter] = []
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{request.state.request_id}",
            "created": service.now(),
            "model": service.model,
        }

    async def response(self) -> Response:
        """The answer or its events; raises ApiError and Unavailable before anything is sent."""
        service, body = self._service, self._body
        service.check(body.model, self._num_choices)
        _check_supported(body)
        messages = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text}
            for m in body.messages
        ]
        switches = _checked_switches(body.chat_template_kwargs or {})
        ids, is_thinking = await service.encoded(
            sum(len(message["content"]) for message in messages),
            lambda: service.prompts.chat(messages, switches),
            "messages",
        )
        if service.prompts.thinks:
            self._splitters = [
                ThinkingSplitter(is_thinking=is_thinking) for _ in range(self._num_choices)
            ]
        generation = service.begin(
            ids,
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            request_id=self._request.state.request_id,
            param="messages",
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        headers = {"x-smolrun-note": CONTINUES_TEXT} if service.continues_text else {}
        if body.stream:
            return EventStream([generation], self._events(generation), headers)
        return await unless_gone(self._request, [generation], self._whole(generation, headers))

    def _message(self, piece: Piece) -> dict[str, str]:
        """content and reasoning_content that a piece adds."""
        if not self._splitters:
            return {"content": piece.delta.text} if piece.delta.text else {}
        splitter = self._splitters[piece.choice]
        thought, said = splitter.push(piece.delta.text)
        if piece.reason:
            last_thought, last_said = splitter.finish()
            thought, said = thought + last_thought, said + last_said
        parts = {"reasoning_content": thought, "content": said}
        return {key: text for key, text in parts.items() if text}

    async def _whole(self, generation: Generation, headers: dict[str, str]) -> Response:
        choices: list[dict[str, Any]] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": {"content": [], "refusal": None} if self._body.logprobs else None,
                "finish_reason": None,
            }
            for index in range(self._num_choices)
        ]
        async for piece in generation.pieces():
            choice = choices[piece.choice]
            for key, text in self._message(piece).items():
                choice["message"][key] = choice["message"].get(key, "") + text
            if self._body.logprobs:
                choice["logprobs"]["content"] += self._logprobs(piece.delta)
            choice["finish_reason"] = piece.reason or choice["finish_reason"]
        answer = self._head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_json(generation.usage),
        }
        return json_response(answer, headers=headers)

    async def _events(self, generation: Generation) -> AsyncIterator[bytes]:
        wants_usage = bool(self._body.stream_options and self._body.stream_options.include_usage)
        head = self._head | {"object": "chat.completion.chunk"}
        last = {"usage": None} if wants_usage else {}

        def chunk(choice: int, delta: dict[str, Any], logprobs: Any, reason: Any) -> bytes:
            entry = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return event(head | {"choices": [entry]} | last)

        try:
            for choice in range(self._num_choices):
                yield chunk(choice, {"role": "assistant", "content": ""}, None, None)
            async for piece in generation.pieces():
                if piece.prefill is not None:
                    yield prefill_comment(piece)
                    continue
                delta, logprobs = self._message(piece), None
                if self._body.logprobs and piece.delta.tokens:
                    logprobs = {"content": self._logprobs(piece.delta), "refusal": None}
                if delta or logprobs:
                    yield chunk(piece.choice, delta, logprobs, None)
                if piece.reason:
                    yield chunk(piece.choice, {}, None, piece.reason)
            if wants_usage:
                yield event(head | {"choices": [], "usage": usage_json(generation.usage)})
        except ApiError as error:
            yield event(error.body)
        yield DONE

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        def entry(data: bytes, logprob: float | None) -> dict[str, Any]:
            return {
                "token": data.decode("utf-8", "replace"),
                "logprob": NO_LOGPROB if logprob is None else max(logprob, NO_LOGPROB),
                "bytes": list(data),
            }

        every = self._service.prompts.token_bytes
        return [
            entry(token.bytes, token.logprob)
            | {"top_logprobs": [entry(every[id], value) for id, value in token.top or []]}
            for token in delta.tokens
        ]


def _check_supported(body: ChatRequest) -> None:
    """What would change the answer and is not built yet is refused by name."""
    refused = {
        "tools": bool(body.tools),
        "functions": bool(body.functions),
        "tool_choice": body.tool_choice not in (None, "none", "auto"),
        "function_call": body.function_call not in (None, "none", "auto"),
        "response_format": (body.response_format or {}).get("type", "text") != "text",
        "modalities": any(kind != "text" for kind in body.modalities or []),
    }
    for name, is_refused in refused.items():
        if is_refused:
            message = f"{name} is not supported by this server yet; leave it out"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    if body.top_logprobs is not None and not body.logprobs:
        message = "top_logprobs needs logprobs=true"
        raise ApiError(400, message, param="top_logprobs", code="invalid_value")


_TEMPLATE_NAMES = {"messages", "tools", "documents", "add_generation_prompt"}


def _checked_switches(switches: dict[str, Any]) -> dict[str, Any]:
    """chat_template_kwargs that replace nothing of ours."""
    for name, value in switches.items():
        is_ours = name in _TEMPLATE_NAMES or name.endswith("_token") or not name.isidentifier()
        if is_ours or (isinstance(value, str) and not value.isprintable()):
            raise ApiError(
                400,
                f"chat_template_kwargs: {name} cannot be set, or not to this value",
                param="chat_template_kwargs",
                code="invalid_value",
            )
    return switches

"""POST /v1/chat/completions: a conversation in, an answer out, in OpenAI's shapes.

What a model thinks before it answers, <think>...</think>, is `reasoning_content`, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from smolrun.serving.api_errors import ApiError, refuse
from smolrun.serving.generation import Generation, Piece
from smolrun.serving.json_grammar import INSTALL, is_installed, json_grammar, lark_rule
from smolrun.serving.protocol import ChatRequest
from smolrun.serving.responses import Completion
from smolrun.serving.text import ThinkingSplitter, TokenText
from smolrun.serving.tool_calls import ToolCallSplitter, ToolUse, template_message, tool_use

CONTINUES_TEXT = "this base model has no chat template: it continues the text of the messages"
NO_LOGPROB = -9999.0  # as in OpenAI's API, for a token that is too unlikely to be reported


class ChatCompletion(Completion[ChatRequest]):
    """One request."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    _splitters: list[ThinkingSplitter] | None = None  # one a choice, for a model that thinks
    _tools: list[ToolCallSplitter] | None = None  # one a choice, where there are tools

    async def begin(self) -> list[Generation]:
        """One, of the whole conversation."""
        service, body = self.service, self.body
        service.check(body.model, self.n, body.worker_rank)
        _check_supported(body)
        use = tool_use(body, service.prompts)
        messages = [
            template_message(message, f"messages[{at}]") for at, message in enumerate(body.messages)
        ]
        switches = _checked_switches(body.chat_template_kwargs or {})
        begun = _begun_answer(messages) if body.continue_final_message else None
        grammar = await self._grammar(use)
        if grammar or use.begun:  # not a thought, even where the template has begun one
            begun = (begun or "") + use.begun
        ids, is_thinking = await service.encoded(
            _num_characters(body),
            lambda: service.prompts.chat(messages, switches, begun, use.tools),
            "messages",
        )
        if service.prompts.thinks:
            self._splitters = [ThinkingSplitter(is_thinking=is_thinking) for _ in range(self.n)]
        if use.tools:
            self._tools = [ToolCallSplitter(use.begun) for _ in range(self.n)]
        self.notes += filter(None, [CONTINUES_TEXT * service.continues_text, use.note])
        if self.notes:
            self.headers["x-smolrun-note"] = "; ".join(self.notes)
        return service.begin(
            [ids],
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            request_id=self.request_id,
            param="messages",
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            stops=use.stops,
            grammar=grammar,
        )

    async def _grammar(self, use: ToolUse) -> str:
        """What the answer must obey; empty for any text. ApiError where it cannot."""
        body, wanted = self.body, self.body.response_format
        if wanted is None or wanted.type == "text":
            return await self._call_grammar(use)
        beside = {
            "continue_final_message": body.continue_final_message,
            "ignore_eos": body.ignore_eos,
        }
        wrong = [f"is not supported beside {name}" for name, is_there in beside.items() if is_there]
        if not self.service.stop_ids:
            wrong.append("is not supported by this model, as no token ends its answers")
        if not is_installed():
            wrong = [f"{wanted.type} needs llguidance on the server: {INSTALL}"]
        schema = wanted.json_schema.json_schema if wanted.json_schema is not None else None
        if wanted.type == "json_schema" and schema is None:
            wrong.append("json_schema is required")
        if wrong:
            message, param = f"response_format: {wrong[0]}", "response_format"
            raise ApiError(400, message, param=param, code="unsupported_parameter")
        schema = schema if wanted.type == "json_schema" else None
        size = len(msgspec.json.encode([schema, use.tools]))
        return await self.service.encoded(
            size, lambda: _answer_grammar(schema, use), "response_format"
        )

    async def _call_grammar(self, use: ToolUse) -> str:
        """Of an answer that must be a call; any text follows where llguidance is missing."""
        ends = self.service.stop_ids and not self.body.ignore_eos
        if not (use.begun and ends and is_installed()):
            return ""
        size = len(msgspec.json.encode(use.tools))
        return await self.service.encoded(size, use.grammar, "tools")

    def empty_choice(self, index: int) -> dict[str, Any]:
        """With a message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": {"content": [], "refusal": None} if self.body.logprobs else None,
            "finish_reason": None,
        }

    def first_entries(self) -> Iterator[dict[str, Any]]:
        """The role of every choice."""
        for index in range(self.n):
            yield _entry(index, {"role": "assistant", "content": ""})

    def entries(self, prompt: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """The text, and the end in an entry of its own, whose delta is empty."""
        delta, logprobs = self._message(piece), None
        if self.body.logprobs and piece.delta.tokens:
            logprobs = {"content": _logprobs(piece.delta.tokens), "refusal": None}
        if delta or logprobs:
            yield _entry(piece.choice, delta, logprobs)
        if piece.reason:
            is_call = self._tools and self._tools[piece.choice].num_calls
            reason = "tool_calls" if is_call and piece.reason == "stop" else piece.reason
            yield _entry(piece.choice, {}, reason=reason)

    def _message(self, piece: Piece) -> dict[str, Any]:
        """content, reasoning_content and tool_calls that a piece adds."""
        thought, said, calls = "", piece.delta.text, list[dict[str, Any]]()
        if self._splitters:
            splitter = self._splitters[piece.choice]
            thought, said = splitter.push(said)
            if piece.reason:
                last_thought, last_said = splitter.finish()
                thought, said = thought + last_thought, said + last_said
        if self._tools:
            said, calls = self._called(self._tools[piece.choice], said, is_last=bool(piece.reason))
        parts = {"reasoning_content": thought, "content": said, "tool_calls": calls}
        return {key: part for key, part in parts.items() if part}

    def _called(
        self, splitter: ToolCallSplitter, said: str, *, is_last: bool
    ) -> tuple[str, list[dict[str, Any]]]:
        """The text, and the calls that are complete now; a stream numbers them."""
        first = splitter.num_calls
        said, calls = splitter.push(said)
        if is_last:
            last_said, last_calls = splitter.finish()
            said, calls = said + last_said, calls + last_calls
        entries = [call.entry() for call in calls]
        if self.body.stream:
            entries = [{"index": first + at, **entry} for at, entry in enumerate(entries)]
        return said, entries


def _answer_grammar(schema: dict[str, Any] | None, use: ToolUse) -> str:
    """JSON of the schema, or calls where there are tools; GrammarError."""
    grammar = json_grammar(schema)
    return use.grammar(lark_rule(schema)) if use.tools else grammar


def _entry(
    index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(tokens: list[TokenText]) -> list[dict[str, Any]]:
    def entry(token: TokenText) -> dict[str, Any]:
        logprob = NO_LOGPROB if token.logprob is None else max(token.logprob, NO_LOGPROB)
        return {"token": token.text, "logprob": logprob, "bytes": list(token.bytes)}

    return [
        entry(token) | {"top_logprobs": [entry(one) for one in token.top or []]} for token in tokens
    ]


def _num_characters(body: ChatRequest) -> int:
    """Of all that goes into the prompt."""
    calls = [message.tool_calls for message in body.messages if message.tool_calls]
    size = len(msgspec.json.encode([tool.model_dump() for tool in body.tools or []]))
    size += sum(len(call.function.arguments) for some in calls for call in some)
    thoughts = sum(len(message.reasoning_content or "") for message in body.messages)
    return size + thoughts + sum(len(message.text) for message in body.messages)


def _begun_answer(messages: list[dict[str, Any]]) -> str:
    """The last message, which is taken from the list."""
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        message = "continue_final_message needs a last message of role assistant that has text"
        raise ApiError(400, message, param="continue_final_message", code="invalid_value")
    return str(messages.pop()["content"])


def _check_supported(body: ChatRequest) -> None:
    refuse(
        functions=bool(body.functions),
        function_call=body.function_call not in (None, "none", "auto"),
        modalities=any(kind != "text" for kind in body.modalities or []),
    )
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

"""Functions that a model may call: what of a request its chat template gets, and the calls in its
answer, as Hermes writes them (Qwen2.5, Qwen3 and others were trained on it).

    prompt   <tools>\\n{"type": "function", "function": {...}}\\n</tools>         by the template
    answer   <tool_call>\\n{"name": "weather", "arguments": {...}}\\n</tool_call>

A call is sent once it is complete and valid; anything else stays text, as the model wrote it.
Source: NousResearch, Hermes-Function-Calling; Qwen's documentation of function calling.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from smolrun.serving.api_errors import ApiError
from smolrun.serving.json_grammar import lark_grammar, lark_rule
from smolrun.serving.protocol import ChatMessage, ChatRequest, Function, NamedTool, Tool
from smolrun.serving.text import CALL_END, CALL_START, Prompts, StopStrings

_BEGUN = f'{CALL_START}\n{{"name": "'
_AFTER_NAME = '", "arguments": '
_ENDING = f"}}\n{CALL_END}"


class _WrittenCall(msgspec.Struct):
    """What stands between <tool_call> and </tool_call>."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


@dataclass(frozen=True)
class ToolCall:
    """A call in an answer. `arguments`: the text of a JSON object."""

    name: str
    arguments: str

    @classmethod
    def read(cls, text: str) -> ToolCall | None:
        """From the text between the tags; None for anything but a name and an object."""
        try:
            written = msgspec.json.decode(text, type=_WrittenCall)
            arguments = bytes(written.arguments)
            if arguments.startswith(b'"'):  # an object as text, as in OpenAI's API
                arguments = msgspec.json.decode(arguments, type=str).encode()
            # Not msgspec, which refuses numbers of JSON that are too large for it.
            found = json.loads(arguments, parse_int=str, parse_float=str, parse_constant=_refuse)
            if not isinstance(found, dict):
                return None
        except (ValueError, RecursionError):
            return None
        return cls(written.name, arguments.decode())

    def entry(self) -> dict[str, Any]:
        """As OpenAI's API writes it, with a new id."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class ToolCallSplitter:
    """Divides an answer into text and calls."""

    def __init__(self, begun: str = "") -> None:
        """`begun`: the beginning of the answer that the prompt ends with."""
        self.num_calls = 0
        self._tag = StopStrings([CALL_START])
        self._call: str | None = None  # the text of one that is not complete
        self._space = ""  # belongs to the text only if text follows, or no call
        self.push(begun)

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """(said, called) of a piece of text."""
        said, calls = "", list[ToolCall]()
        while True:
            found = self._tag.push(text)
            if self._call is None:
                said += self._text(found)
            else:
                self._call += found
            if not self._tag.is_found:
                return said, calls
            text = self._tag.rest
            if self._call is None:
                self._begin_call()
            else:
                said += self._end_call(calls, CALL_END)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back. A last call without its end tag counts if it is complete."""
        rest, calls = self._tag.flush(), list[ToolCall]()
        if self._call is None:
            said = self._text(rest)
            return said + self._space * (not self.num_calls), calls
        self._call += rest
        return self._end_call(calls, ""), calls

    def _text(self, text: str) -> str:
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        return said

    def _begin_call(self) -> None:
        self._call, self._tag = "", StopStrings([CALL_END])

    def _end_call(self, calls: list[ToolCall], end: str) -> str:
        """The text, where it is no call."""
        written, self._call = self._call or "", None
        self._tag = StopStrings([CALL_START])
        space, self._space = self._space, ""
        if (call := ToolCall.read(written)) is None:
            return f"{space}{CALL_START}{written}{end}"
        calls.append(call)
        self.num_calls += 1
        return ""


@dataclass(frozen=True)
class ToolUse:
    """What a request makes of tools. `begun`: how the answer must begin so that it is a call, of
    one of `callable`; `is_single`: it ends with its first call; `note`: why there are no tools, for
    the client."""

    tools: Sequence[dict[str, Any]] = ()
    callable: Sequence[Tool] = ()
    begun: str = ""
    is_single: bool = False
    note: str = ""

    @property
    def stops(self) -> list[str]:
        """What ends an answer, beside the stop strings of the request."""
        return [CALL_END] if self.is_single else []

    def grammar(self, answer: str = "") -> str:
        """Of what follows `begun`, so that the arguments obey their schemas; GrammarError. `answer`
        is a rule for what may be said instead, where the answer need not be a call."""
        is_strict = any(tool.function.strict for tool in self.callable)
        calls = [_call_rule(tool.function, self.begun) for tool in self.callable]
        more = "" if self.is_single else f" ({_literal(chr(10) + _BEGUN)} call)*"
        start = "calls" if self.begun else f"{answer} | {_literal(_BEGUN)} calls"
        rules = [f"start: {start}", f"calls: call{more}", f"call: {' | '.join(calls)}"]
        return lark_grammar("\n".join(rules), "tools", is_strict=is_strict)


def _call_rule(function: Function, begun: str) -> str:
    """The rest of a call after <tool_call> and, where the tool is named, after its name."""
    start = "" if begun.endswith(_AFTER_NAME) else _literal(function.name + _AFTER_NAME)
    schema = {**(function.parameters or {}), "type": "object"}
    return f"{start} {lark_rule(schema, is_strict=bool(function.strict))} {_literal(_ENDING)}"


def _literal(text: str) -> str:
    return json.dumps(text)


def tool_use(body: ChatRequest, prompts: Prompts) -> ToolUse:
    """Without tools where none are to be used, or the model may but cannot; ApiError where it must
    and cannot."""
    choice, offered = body.tool_choice or "auto", body.tools or []
    has_calls = any(message.role == "tool" or message.tool_calls for message in body.messages)
    if not has_calls and (not offered or choice == "none"):
        if offered or choice in ("none", "auto"):
            return ToolUse()
        raise _wrong("tool_choice", "tool_choice needs tools")
    if prompts.lacks_tools:
        # Chat interfaces offer their own tools with every message, also to models without any.
        if choice == "auto" and not has_calls:
            return ToolUse(note=f"{prompts.lacks_tools}; it answers without")
        raise _wrong("messages" if has_calls else "tool_choice", prompts.lacks_tools)
    if choice == "none" or not offered:  # the calls so far are written out
        return ToolUse()
    tools = [
        tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in offered
    ]
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if not (named := [tool for tool in offered if tool.function.name == name]):
            raise _wrong("tool_choice", f"tool_choice: there is no tool {name}")
        return ToolUse(tools, named[:1], _BEGUN + name + _AFTER_NAME, is_single=True)
    begun = _BEGUN if choice == "required" else ""
    return ToolUse(tools, offered, begun, is_single=body.parallel_tool_calls is False)


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="unsupported_parameter")


def template_message(message: ChatMessage, where: str) -> dict[str, Any]:
    """A message as chat templates expect it: the arguments of calls are objects. ApiError for one
    without content that is no call."""
    role = "system" if message.role == "developer" else message.role
    if message.content is None and not (role == "assistant" and message.tool_calls):
        text = f"{where}.content is required"
        raise ApiError(400, text, param=f"{where}.content", code="missing_required_parameter")
    written: dict[str, Any] = {"role": role, "content": message.text}
    if role == "assistant" and message.reasoning_content:
        written["reasoning_content"] = message.reasoning_content
    if role == "assistant" and message.tool_calls:
        written["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _object(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if role == "tool":
        written["tool_call_id"] = message.tool_call_id
    return written


def _object(arguments: str) -> Any:
    """The object that a client sends as text; the text where it is none."""
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (ValueError, RecursionError):
        return arguments

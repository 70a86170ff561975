"""Answers that are JSON of a schema: which tokens may come next, by llguidance.

    driver       schema -> grammar, as text                 compiled once to check it
    last stage   Vocabulary -> Grammars; a Matcher a sequence: its tokens so far -> allowed tokens

llguidance is an optional package: `is_installed`. Source: github.com/guidance-ai/llguidance.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from smolrun.errors import DataError
from smolrun.serving.messages import VOCABULARY_TOKENS, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

INSTALL = 'pip install "smolrun[json]"'
_MOST_BYTES = 64 << 10  # of a grammar: it goes to the last stage with every choice
_KEPT = 32  # compiled grammars
# Small models, once in white space, do not leave it; this is enough for JSON that is indented.
_JSON = {"whitespace_pattern": r"[ \n\t]{0,20}"}
_ANY_OBJECT = {"type": "object"}


class GrammarError(DataError):
    """A schema that cannot be obeyed."""


def is_installed() -> bool:
    """Whether llguidance is."""
    return importlib.util.find_spec("llguidance") is not None


def json_grammar(schema: dict[str, Any] | None) -> str:
    """The grammar of a JSON Schema, None for any object; GrammarError where it has a part that
    llguidance does not know, none that can be obeyed, or is too large."""
    from llguidance import LLMatcher

    text = msgspec.json.encode(_ANY_OBJECT if schema is None else schema).decode()
    grammar = LLMatcher.grammar_from_json_schema(text, overrides=_JSON)  # type: ignore[arg-type]
    return _checked(grammar, "response_format")


def lark_rule(schema: dict[str, Any] | None, *, is_strict: bool = True) -> str:
    """JSON of a schema, None for any object, within a grammar for `lark_grammar`. Unless
    `is_strict`, parts of the schema that llguidance does not know are left out."""
    options = _JSON | {"lenient": not is_strict}
    whole = {**(_ANY_OBJECT if schema is None else schema), "x-guidance": options}
    return f"%json {msgspec.json.encode(whole).decode()}"


def lark_grammar(rules: str, where: str, *, is_strict: bool = True) -> str:
    """A grammar of llguidance's form of Lark; GrammarError, which begins with `where`, as
    `json_grammar`. `is_strict`: also where it has parts that are left out."""
    from llguidance import LLMatcher

    return _checked(LLMatcher.grammar_from_lark(rules), where, is_strict=is_strict)


def _checked(grammar: str, where: str, *, is_strict: bool = True) -> str:
    from llguidance import LLMatcher

    if len(grammar.encode()) > _MOST_BYTES:
        raise GrammarError(f"{where}: the schema is larger than {_MOST_BYTES:,} bytes")
    is_wrong, reasons = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_wrong or (is_strict and reasons):
        raise GrammarError(f"{where}: {' '.join(reasons[0].split())}")
    return grammar


def vocabulary_messages(token_bytes: Sequence[bytes]) -> list[Vocabulary]:
    """The bytes of every token for the ranks; none where there is no llguidance here."""
    if not is_installed():
        return []
    starts = range(0, len(token_bytes), VOCABULARY_TOKENS)
    return [Vocabulary(at, [*token_bytes[at : at + VOCABULARY_TOKENS]]) for at in starts]


class _Tokenizer:
    """As llguidance wants one. Text that a grammar demands is cut into the longest tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, token_bytes: Sequence[bytes], end_id: int) -> None:
        self.tokens = token_bytes
        self.eos_token_id = end_id
        self._ids = {text: id for id, text in reversed([*enumerate(token_bytes)]) if text}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        ids, at = list[int](), 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next((one for one in sizes if data[at : at + one] in self._ids), 0)
            if not size:
                return ids
            ids.append(self._ids[data[at : at + size]])
            at += size
        return ids


class Grammars:
    """Compiled grammars of one vocabulary; for one thread."""

    def __init__(
        self, token_bytes: Sequence[bytes], vocab_size: int, end_ids: Sequence[int]
    ) -> None:
        """`vocab_size`: logits of a row, which may be more than there are tokens."""
        from llguidance import LLTokenizer

        self.vocab_size = vocab_size
        missing = [b""] * (vocab_size - len(token_bytes))
        tokenizer: Any = _Tokenizer([*token_bytes[:vocab_size], *missing], end_ids[0])
        self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=[*end_ids])
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def matcher(self, grammar: str) -> Matcher:
        """At its beginning."""
        from llguidance import LLMatcher

        known = self._compiled.get(grammar)
        if known is None:
            known = self._compiled[grammar] = LLMatcher(self._tokenizer, grammar, log_level=0)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return Matcher(known.deep_copy(), self.vocab_size)


class Matcher:
    """A text that obeys a grammar, token by token."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def add(self, token_ids: Sequence[int]) -> None:
        """Its next tokens."""
        if token_ids:
            self._matcher.consume_tokens([*token_ids])

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may follow, [vocab_size]; GrammarError after one that may not."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"the answer left its schema: {self._matcher.get_error()[:200]}")
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

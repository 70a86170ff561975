"""Conversations as training data: a model learns what the assistant answers, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors.numpy import save_file

from smolrun.data.cache import DATA_FILE, cached
from smolrun.data.encoders import Encoder, encoder_for
from smolrun.data.prepared import Kind, Prepared, Progress
from smolrun.data.token_file import check_numbers
from smolrun.errors import DataError

if TYPE_CHECKING:
    from smolrun.data.chat_template import Conversation

_PARTS = ("train", "eval")


class Chat:
    """Conversations of a file or a dataset; conf/data/chat.yaml explains the keys."""

    produces: ClassVar[Kind] = "tokens"

    def __init__(
        self,
        cache_dir: Path,
        *,
        path: str,
        subset: str | None,
        split: str,
        eval_fraction: float,
        template: str,
        tokenizer: str,
        vocab_size: int,
        sequence_length: int,
        packing: bool,
        max_mb: float | None,
    ) -> None:
        self.cache_dir = cache_dir
        self.path, self.subset, self.split = path, subset, split
        self.eval_fraction = eval_fraction
        self.template = template
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.sequence_length = sequence_length
        self.packing = packing
        self.max_mb = max_mb

    def prepare(self, progress: Progress) -> Prepared:
        """Reads, writes out, marks and keeps the conversations; raises DataError for bad ones."""
        from smolrun.data.chat_source import read_conversations
        from smolrun.data.chat_template import template_text

        check_numbers(self.sequence_length, self.eval_fraction)
        encoder = encoder_for(self.tokenizer, self.vocab_size, progress)
        found = read_conversations(
            self.path,
            self.subset,
            self.split,
            self.max_mb,
            cache_dir=self.cache_dir,
            progress=progress,
        )
        # Conversations by their hashes: the last ones are a fair mix of all, and one that is there
        # twice is not in both parts (but for one pair at the border).
        hashes = {hashlib.sha256(_json(one)).hexdigest() + one.where: one for one in found}
        ordered = [hashes[key] for key in sorted(hashes)]
        key = {
            "conversations": hashlib.sha256(b"\n".join(map(_json, ordered))).hexdigest(),
            "template": template_text(self.template),
            "eval_fraction": self.eval_fraction,
            "sequence_length": self.sequence_length,
            "packing": self.packing,
            **encoder.key,
        }
        entry = cached(
            self.cache_dir,
            "chat",
            key,
            lambda folder: self._write(folder, ordered, encoder, progress),
        )
        facts = entry.facts
        return Prepared(
            kind="tokens",
            path=str(entry.data_path),
            sha256=entry.sha256,
            num_outputs=facts["vocab_size"],
            num_inputs=None,
            sequence_length=self.sequence_length,
            tokenizer=str(entry.folder),
            train_size=facts["train"],
            eval_size=facts["eval"],
            description=_describe(len(found), encoder.name, facts),
            masked=True,
        )

    def _write(
        self, folder: Path, ordered: Sequence[Conversation], encoder: Encoder, progress: Progress
    ) -> dict[str, Any]:
        """Fills a new cache entry; returns what there is to tell of it."""
        from smolrun.data.chat_template import ChatTemplate, choose_template
        from smolrun.data.row_file import rows_of

        if len(ordered) < 2:
            raise DataError(f"data.path={self.path}: one conversation is too few, some are kept")
        border = min(len(ordered) - 1, max(1, round(len(ordered) * (1 - self.eval_fraction))))
        parts = dict(zip(_PARTS, (ordered[:border], ordered[border:]), strict=True))
        contents = [message["content"] + "\n" for one in parts["train"] for message in one.messages]
        tokenizer = encoder.make(folder, contents)
        choose_template(folder, self.template, tokenizer)
        template = ChatTemplate(folder, tokenizer)
        width = self.sequence_length + 1
        facts: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "cut": 0, "left_out": 0}
        tensors: dict[str, Any] = {}
        done = answer_tokens = 0
        for part, conversations in parts.items():
            kept = []
            for document in template.marked(conversations):
                progress("writing conversations", done, len(ordered))
                done += 1
                short = document.cut(width)
                if short.learn.any():
                    kept.append(short)
                    facts["cut"] += len(short) < len(document)
                    answer_tokens += int(short.learn.sum())
                else:
                    facts["left_out"] += 1
            if not kept:
                raise self._nothing_to_learn(part)
            rows = rows_of(
                kept,
                width,
                end_id=tokenizer.end_id,
                vocab_size=tokenizer.vocab_size,
                packing=self.packing,
            )
            tensors |= {part: rows.tokens, f"{part}_learn": rows.learn}
            facts[part] = len(rows)
        progress("writing conversations", len(ordered), len(ordered))
        save_file(tensors, folder / DATA_FILE)
        return {**facts, "answer_tokens": answer_tokens}

    def _nothing_to_learn(self, part: str) -> DataError:
        return DataError(
            f"data.path={self.path}: no conversation of the {part} part has an answer of an "
            f"`assistant` within its first {self.sequence_length} tokens; raise "
            "data.sequence_length, or look at the roles"
        )


def _describe(count: int, tokenizer: str, facts: dict[str, Any]) -> str:
    text = (
        f"chat: {count:,} conversations, {facts['train']:,} train and {facts['eval']:,} eval "
        f"samples, {facts['answer_tokens']:,} tokens of answers, {tokenizer} tokenizer of "
        f"{facts['vocab_size']}"
    )
    if facts["cut"]:
        text += f"; {facts['cut']:,} were longer than a sample and cut"
    if facts["left_out"]:
        text += f"; {facts['left_out']:,} left out, because no answer is within the first sample"
    return text


def _json(conversation: Conversation) -> bytes:
    return json.dumps(conversation.messages, sort_keys=True).encode()

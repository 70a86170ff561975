"""Conversations: only answers are learnt, whatever the template; bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from smolrun.data.chat import Chat
from smolrun.data.prepared import Prepared
from smolrun.data.splits import IGNORE_INDEX, open_split
from smolrun.data.tokenizer import TextTokenizer, load_tokenizer
from smolrun.errors import DataError
from tests.data.foreign import CHATML, foreign_folder

KEYS: dict[str, Any] = {
    "subset": None,
    "split": "train",
    "eval_fraction": 0.2,
    "template": "auto",
    "tokenizer": "bytes",
    "vocab_size": 300,
    "sequence_length": 96,
    "packing": True,
    "max_mb": None,
}


def turns(*contents: str) -> list[dict[str, str]]:
    """A user and an assistant, in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]


CONVERSATIONS = [
    turns(f"What is {n}?", f"It is {n}.", "Thanks", f"Any time, {n}") for n in range(9)
]


def write(folder: Path, records: list[Any], name: str = "chat.jsonl") -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def prepare(folder: Path, path: Any, **keys: Any) -> Prepared:
    return Chat(folder / "cache", path=str(path), **{**KEYS, **keys}).prepare(
        lambda what, done, total: None
    )


def rows(prepared: Prepared, name: str = "train") -> tuple[list[str], list[str], TextTokenizer]:
    """Each row as text, and what is learnt of it."""
    tokenizer = load_tokenizer(str(prepared.tokenizer))
    split = open_split(prepared, "train" if name == "train" else "eval", verify=True)
    batch = split.batch(range(len(split)))
    assert (batch.targets[:, :-1] == batch.inputs[:, 1:])[batch.targets[:, :-1] >= 0].all()
    texts = [tokenizer.decode(row.tolist()) for row in batch.inputs]
    learnt = [tokenizer.decode(row[row != IGNORE_INDEX].tolist()) for row in batch.targets]
    return texts, learnt, tokenizer


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path, [{"messages": messages} for messages in CONVERSATIONS])


@pytest.mark.parametrize("kind", ["bytes", "bpe", "chatml", "foreign without a template"])
@pytest.mark.parametrize("packing", [True, False])
def test_only_answers_and_their_end_are_learnt(
    tmp_path: Path, chats: Path, kind: str, packing: bool
) -> None:
    tokenizer = kind
    if kind not in ("bytes", "bpe"):
        template = CHATML if kind == "chatml" else None
        tokenizer = str(foreign_folder(tmp_path / "model", template))
    prepared = prepare(tmp_path, chats, tokenizer=tokenizer, packing=packing, sequence_length=160)
    end = load_tokenizer(str(prepared.tokenizer)).end_token
    learnt = [*rows(prepared)[1], *rows(prepared, "eval")[1]]
    answers = [f"It is {n}.{end}Any time, {n}{end}" for n in range(9)]
    assert "".join(sorted("".join(learnt))) == "".join(sorted("".join(answers)))
    if not packing:
        assert sorted(learnt) == answers
        assert prepared.train_size + prepared.eval_size == 9
    else:
        assert prepared.train_size + prepared.eval_size < 9
        assert all(answer in "".join(learnt) for answer in answers)


def test_the_tokens_are_those_that_the_library_gives(tmp_path: Path, chats: Path) -> None:
    folder = foreign_folder(tmp_path / "model")
    prepared = prepare(tmp_path, chats, tokenizer=str(folder), packing=False, sequence_length=160)
    library = AutoTokenizer.from_pretrained(folder)
    expected = [library.apply_chat_template(one)["input_ids"] for one in CONVERSATIONS]
    found = []
    for name in ("train", "eval"):
        split = open_split(prepared, "train" if name == "train" else "eval", verify=True)
        found += split.batch(range(len(split))).inputs.tolist()
    assert sorted(row[: len(row) - _filled(row, library.eos_token_id)] for row in found) == sorted(
        expected
    )


def _filled(row: list[int], end_id: int) -> int:
    """How many end tokens fill a row up."""
    return len(row) - max(at for at, token in enumerate(row, 1) if token != end_id)


def test_packed_conversations_end_before_the_next_begins(tmp_path: Path, chats: Path) -> None:
    prepared = prepare(tmp_path, chats, sequence_length=300)
    texts, learnt, _ = rows(prepared)
    for text, answers in zip(texts, learnt, strict=True):
        assert text.count("user:\n") == 2 * text.count("user:\nWhat")
        assert "\0\nuser:\nWhat" in text  # the end, and then the next one
        assert "user" not in answers


def test_messages_of_any_kind_are_kept_apart(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be kind."}, *turns("Hi", "\n\nHello", "Bye")]
    first = [{"role": "assistant", "content": "How can I help?"}, *turns("Sing", "La")]
    records = [{"messages": system}, {"messages": first}, {"prompt": "1+1?", "completion": "2"}]
    records.append({"prompt": turns("a", "b", "c"), "completion": [turns("", "d")[1]]})
    prepared = prepare(tmp_path, write(tmp_path, records), packing=False)
    learnt = sorted([*rows(prepared)[1], *rows(prepared, "eval")[1]])
    # An answer to nothing has no question to learn it from.
    assert learnt == sorted(["\n\nHello\0", "La\0", "2\0", "b\0d\0"])


def test_an_answer_that_begins_like_the_prompt_ends_is_found(tmp_path: Path) -> None:
    """Line ends join into one token over the border; the answer still begins there."""
    folder = foreign_folder(tmp_path / "model")
    one, other = turns("you", "\n you"), turns("Hello", "there")
    path = write(tmp_path, [{"messages": one}, {"messages": other}])
    prepared = prepare(tmp_path, path, tokenizer=str(folder), packing=False)
    learnt = {*rows(prepared)[1], *rows(prepared, "eval")[1]}
    assert learnt <= {"\n you<|im_end|>", "\n\n you<|im_end|>", "there<|im_end|>"}
    assert len(learnt) == 2


def test_a_template_without_an_end_gets_one(tmp_path: Path, chats: Path) -> None:
    template = tmp_path / "bare.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prepared = prepare(tmp_path, chats, template=str(template), packing=False)
    assert min(rows(prepared)[1]).startswith(" It is ")
    assert all(text.endswith("\0") and text.count("\0") == 1 for text in rows(prepared)[1])
    kept = Path(str(prepared.tokenizer)) / "chat_template.jinja"
    assert kept.read_text().endswith(template.read_text())


def test_the_kept_tokenizer_writes_conversations_alike(tmp_path: Path, chats: Path) -> None:
    for tokenizer in ("bytes", "bpe"):
        prepared = prepare(tmp_path, chats, tokenizer=tokenizer)
        library = AutoTokenizer.from_pretrained(prepared.tokenizer)
        asked = library.apply_chat_template(turns("Hi"), tokenize=False, add_generation_prompt=True)
        assert asked == "user:\nHi\nassistant:\n"
        ours = load_tokenizer(str(prepared.tokenizer))
        assert len(library) == ours.vocab_size
        written = library.apply_chat_template(turns("Hi", "Ho"))["input_ids"]
        assert written[-2] == ours.end_id


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(tmp_path: Path) -> None:
    long = [{"messages": turns("Tell me", f"{number} " + "word " * 40)} for number in range(6)]
    endless = [{"messages": turns("word " * 40, "yes")}]
    silent = [{"messages": turns("Hello?")}]
    prepared = prepare(tmp_path, write(tmp_path, [*long, *endless, *silent]), packing=False)
    assert "6 were longer than a sample and cut; 2 left out" in prepared.description
    assert prepared.train_size + prepared.eval_size == 6
    texts, learnt, tokenizer = rows(prepared)
    assert all(len(tokenizer.encode(text)) == 96 for text in texts)
    assert all(text.startswith(tuple("012345")) and "\0" not in text for text in learnt)


def test_train_and_eval_share_nothing_and_order_does_not_matter(tmp_path: Path) -> None:
    records = [{"messages": messages} for messages in CONVERSATIONS]
    one = prepare(tmp_path, write(tmp_path, records), packing=False)
    other = prepare(tmp_path, write(tmp_path, records[::-1], "other.jsonl"), packing=False)
    assert one.path == other.path
    assert not set(rows(one)[1]) & set(rows(one, "eval")[1])


def test_datasets_of_conversations_are_read(tmp_path: Path, chats: Path) -> None:
    expected = prepare(tmp_path, chats)
    data = datasets.Dataset.from_dict({"messages": CONVERSATIONS, "source": ["x"] * 9})
    data.save_to_disk(str(tmp_path / "saved"))
    assert prepare(tmp_path, tmp_path / "saved") == expected
    (tmp_path / "folder").mkdir()
    chats.rename(tmp_path / "folder" / "train.jsonl")
    assert prepare(tmp_path, tmp_path / "folder") == expected
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(DataError, match="has the columns text; expected"):
        prepare(tmp_path, tmp_path / "text")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 3: is not valid JSON: .* \\(column 2\\)$"),
        ('{"messages": [{"role": "user", "content": "\udcff"}]', "line 3: is not valid JSON"),
        ("[" * 100_000, "line 3: is not valid JSON"),
        ("[1, 2]", "line 3: is not an object; expected"),
        ('{"text": "hello"}', "line 3: has text; expected"),
        ("{}", "line 3: has no keys; expected"),
        ('{"messages": []}', "line 3: its messages are not a list, or an empty one"),
        ('{"messages": "hello"}', "line 3: its messages are not a list"),
        ('{"messages": ["hello"]}', "line 3, message 1: is no"),
        ('{"messages": [{"role": "user"}]}', "line 3, message 1: its content is not text"),
        ('{"messages": [{"role": "", "content": ""}]}', "line 3, message 1: its role is empty"),
        ('{"prompt": "a", "completion": 2}', "line 3, message 2: its content is not text"),
        ('{"prompt": "a"}', "line 3: has prompt; expected"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"messages": CONVERSATIONS[0]})
    path = tmp_path / "chat.jsonl"
    path.write_bytes("\n".join([good, "", line, good]).encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=rf"chat\.jsonl {message}"):
        prepare(tmp_path, path)


def test_a_template_that_rewrites_history_is_refused(tmp_path: Path, chats: Path) -> None:
    """It writes a message otherwise once more follows, as some that hide their thoughts do."""
    template = tmp_path / "forgetful.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else '...' }}\n{% endfor %}"
    )
    with pytest.raises(DataError, match=r"line \d, message 2 \(assistant\): the chat template"):
        prepare(tmp_path, chats, template=str(template))
    assert prepare(tmp_path, chats, template="plain").train_size


def test_what_a_template_says_is_passed_on(tmp_path: Path, chats: Path) -> None:
    for text, message in (
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{% for %}", "cannot use the chat template of"),
        ("{{ ''.__class__.__mro__ }}", "the chat template cannot write it"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "does more work",
        ),
    ):
        (tmp_path / "t.jinja").write_text(text)
        with pytest.raises(DataError, match=message):
            prepare(tmp_path, chats, template=str(tmp_path / "t.jinja"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"template": "missing.jinja"}, "data.template=missing.jinja: is not auto, not plain"),
        ({"sequence_length": 4}, "has an answer of an `assistant` within its first 4 tokens"),
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"max_mb": 0.00001}, "one conversation is too few"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, chats: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, chats, **keys)


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    line = '{"prompt": "a\\ud800b", "completion": "c\\ud83d\\ude00"}'
    prepared = prepare(tmp_path, write(tmp_path, [line, line]), packing=False)
    texts, learnt, _ = rows(prepared)
    assert texts[0].startswith("user:\na?b\n")
    assert learnt == ["c\U0001f600\0"]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="there is no conversation; expected"):
        prepare(tmp_path, tmp_path / "chat.jsonl")

"""A small tokenizer in the form of Hugging Face's folders, with special tokens of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXTS = [
    "user\nassistant\nsystem\nWhat is one and two? It is three.\n",
    "Hello there, \n\n you",
] * 9


def foreign_folder(folder: Path, template: str | None = CHATML, **settings: Any) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and the chat template in it."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(name, special=True) for name in names],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer=trainer)
    tokenizer.enable_truncation(8)  # as some folders ask; our texts must not be cut
    tokenizer.enable_padding(length=16, pad_id=0, pad_token="<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder

"""The tokenizer of a small chat model: a token for each byte, two control tokens, a template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from smolrun.data.chat_template import TEMPLATE_FILE
from smolrun.data.tokenizer import FILE_NAME, bytes_tokenizer

END = "<|end|>"  # token 256
START = "<|start|>"  # token 257
TEMPLATE = (
    "{%- for m in messages %}<|start|>{{ m['role'] + '\n' + m['content'] }}<|end|>{{ '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# </think> stands in it, as in those of models that think before they answer.
THINKING_TEMPLATE = TEMPLATE + (
    "{%- if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}"
    "{%- elif enable_thinking is defined %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


def chat_model(folder: Path, template: str = TEMPLATE) -> None:
    """Write it into a folder."""
    bytes_tokenizer().save(folder)
    tokenizer = Tokenizer.from_file(str(folder / FILE_NAME))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (END, START)])
    tokenizer.save(str(folder / FILE_NAME))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / TEMPLATE_FILE).write_text(template)

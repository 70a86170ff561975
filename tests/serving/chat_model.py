"""The tokenizer of a small chat model: a token for each byte, two control tokens, a template."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
# As Qwen's: tools before the conversation, results of calls as messages of the user.
TOOLS_TEMPLATE = (
    "{%- if tools %}<|start|>system\n"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ '# Tools\n\n<tools>' }}{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{%- endfor %}"
    '{{ \'\n</tools>\n\nA call is <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>\' }}'
    "{{ '<|end|>\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{{ '<|start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|end|>\n' }}"
    "{%- elif not (tools and loop.first and m.role == 'system') %}"
    "{{ '<|start|>' + m.role + '\n' + m.content }}"
    "{%- for call in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}"
    "{%- endfor %}{{ '<|end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def chat_model(folder: Path, template: str = TEMPLATE, tags: Sequence[str] = ()) -> None:
    """Write it into a folder. `tags`: further tokens, which are text, as Qwen's <tool_call>."""
    bytes_tokenizer().save(folder)
    tokenizer = Tokenizer.from_file(str(folder / FILE_NAME))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (END, START)])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in tags])
    tokenizer.save(str(folder / FILE_NAME))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / TEMPLATE_FILE).write_text(template)

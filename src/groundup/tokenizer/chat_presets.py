"""Chat templates that everybody knows, in Jinja, each with ``{% generation %}`` around what the assistant says.

    chatml   OpenAI's ChatML, as in Qwen and many others: <|im_start|>role, a line break, the text, <|im_end|>.
    hermes   ChatML with tools, laid out as in Hermes 2 Pro (Nous Research) and Qwen 2.5: the functions' JSON schemas in
             <tools> of the system message, calls as JSON in <tool_call>, what they gave in <tool_response>.
    llama2   Llama 2 Chat (Touvron et al. 2023, and ``chat_completion`` of Meta's published code): [INST] … [/INST] in
             <s> … </s> per pair of turns, the system message inside the first between <<SYS>> marks.
    llama3   Llama 3 Instruct (Meta's model card): a header with the role before each message, <|eot_id|> after it.
    alpaca   Stanford Alpaca (Taori et al. 2023, ``train.py``): "### Instruction:" and "### Response:" after a preamble,
             which a system message replaces. A field ``input`` of a user's message becomes "### Input:". Alpaca itself
             has one turn; further ones follow after an empty line.
    vicuna   Vicuna v1.1 (Chiang et al. 2023, FastChat's ``vicuna_v1.1``): a preamble, "USER:", "ASSISTANT:".

Where the published code leaves <s> to the tokenizer (alpaca, vicuna), the template writes it: encoding adds nothing to
what the template says. For a tokenizer with other names, give others: ``ChatTemplate(template.source, variables=…)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """The source of a template, and what it takes for granted."""

    source: str
    special_tokens: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


_TEXT_ONLY = r"""
{%- if tools or messages | selectattr('tool_calls') | list -%}
    {{- raise_exception('this form of chat has no place for tools') -}}
{%- endif -%}
"""

_TURNS = r"""
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- for message in messages[start:] -%}
    {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
        {{- raise_exception('after an optional system message, user and assistant take turns, the user first') -}}
    {%- endif -%}
{%- endfor -%}
"""

_CHATML = (
    _TEXT_ONLY
    + r"""
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content ~ '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content ~ '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
)

_HERMES = r"""
{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- if start or tools -%}
    {{- '<|im_start|>system\n' ~ (messages[0].content if start else '') -}}
    {%- if tools -%}
        {{- ('\n\n' if start else '') ~ 'You can call these functions, described by JSON schemas:\n<tools>\n' -}}
        {%- for tool in tools -%}{{- tool | tojson ~ '\n' -}}{%- endfor -%}
        {{- '</tools>\nTo call one, write its name and arguments as JSON:\n<tool_call>\n' -}}
        {{- '{"name": "…", "arguments": {…}}\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages[start:] -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- generation -%}
            {{- message.content or '' -}}
            {%- for call in message.tool_calls or [] -%}
                {%- set called = call.function or call -%}
                {%- set sent = called.arguments if called.arguments is string else called.arguments | tojson -%}
                {{- '\n' if message.content or not loop.first else '' -}}
                {{- '<tool_call>\n{"name": ' ~ called.name | tojson ~ ', "arguments": ' ~ sent ~ '}\n</tool_call>' -}}
            {%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\n' if loop.first or loop.previtem.role != 'tool' else '\n' -}}
        {{- '<tool_response>\n' ~ message.content ~ '\n</tool_response>' -}}
        {{- '' if not loop.last and loop.nextitem.role == 'tool' else '<|im_end|>' -}}
    {%- else -%}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>' -}}
    {%- endif -%}
    {{- '' if message.role == 'tool' and not loop.last and loop.nextitem.role == 'tool' else '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

_LLAMA2 = (
    _TEXT_ONLY
    + _TURNS
    + r"""
{%- for message in messages[start:] -%}
    {%- if message.role == 'user' -%}
        {%- set system = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' if start and loop.first else '' -%}
        {{- bos_token ~ '[INST] ' ~ (system ~ message.content) | trim ~ ' [/INST]' -}}
    {%- else -%}
        {%- generation -%}{{- ' ' ~ message.content | trim ~ ' ' ~ eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)

_LLAMA3 = (
    _TEXT_ONLY
    + r"""
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content | trim ~ '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content | trim ~ '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
)

_ALPACA = (
    _TEXT_ONLY
    + _TURNS
    + r"""
{{- bos_token -}}
{%- if start -%}
    {{- messages[0].content ~ '\n\n' -}}
{%- elif messages[0].input -%}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}
    {{- 'Write a response that appropriately completes the request.\n\n' -}}
{%- else -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.\n\n' -}}
{%- endif -%}
{%- for message in messages[start:] -%}
    {%- if message.role == 'user' -%}
        {{- ('' if loop.first else '\n\n') ~ '### Instruction:\n' ~ message.content ~ '\n\n' -}}
        {%- if message.input -%}{{- '### Input:\n' ~ message.input ~ '\n\n' -}}{%- endif -%}
        {{- '### Response:' -}}
    {%- else -%}
        {%- generation -%}{{- message.content ~ eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
)

_VICUNA = (
    _TEXT_ONLY
    + _TURNS
    + r"""
{{- bos_token -}}
{%- if start -%}
    {{- messages[0].content ~ ' ' -}}
{%- else -%}
    {{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages[start:] -%}
    {%- if message.role == 'user' -%}
        {{- 'USER: ' ~ message.content ~ ' ' -}}
    {%- else -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}{{- ' ' ~ message.content ~ eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""
)

_S = ("<s>", "</s>")
_BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>"}
_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

PRESETS: Mapping[str, Preset] = {
    "chatml": Preset(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "hermes": Preset(_HERMES, ("<|im_start|>", "<|im_end|>")),
    "llama2": Preset(_LLAMA2, _S, _BOS_EOS),
    "llama3": Preset(_LLAMA3, _LLAMA3_TOKENS),
    "alpaca": Preset(_ALPACA, _S, _BOS_EOS),
    "vicuna": Preset(_VICUNA, _S, _BOS_EOS),
}

"""Chat templates: what they write, what the assistant is to learn, and that messages never become special tokens."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError, UsageError
from groundup.tokenizer import Tokenizer, chat_sandbox
from groundup.tokenizer.chat import CHAT_TEMPLATES, ChatTemplate
from groundup.tokenizer.chat_sandbox import MARK, Marked, mark, raw, unmarked


class Bytes:
    """The simplest tokenizer there is: a token is a byte or special."""

    def __init__(self, names: Sequence[str]) -> None:
        self.special_tokens: dict[str, int] = {name: 256 + number for number, name in enumerate(names)}

    def encode(self, text: str, *, continued: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        names = list(self.special_tokens)
        return b"".join(names[i - 256].encode() if i > 255 else bytes([i]) for i in ids).decode()

    def names(self, ids: Sequence[int]) -> list[str]:
        return [list(self.special_tokens)[number - 256] for number in ids if number > 255]


def user(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **fields}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [SYSTEM, user(" Hello! "), assistant(" Hi.\n"), user("And you?"), assistant("Fine, naïve 中文")]

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


# ---- presets: written out by hand from the published code of each


def chatml(talk: Sequence[Mapping[str, str]], prompt: bool) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk)
    return text + ("<|im_start|>assistant\n" if prompt else "")


def llama2(talk: Sequence[Mapping[str, str]], prompt: bool) -> str:
    if talk[0]["role"] == "system":
        first = f"<<SYS>>\n{talk[0]['content']}\n<</SYS>>\n\n{talk[1]['content']}"
        talk = [user(first), *talk[2:]]
    pairs = [
        f"<s>[INST] {asked['content'].strip()} [/INST] {answered['content'].strip()} </s>"
        for asked, answered in zip(talk[::2], talk[1::2], strict=False)
    ]
    return "".join(pairs) + (f"<s>[INST] {talk[-1]['content'].strip()} [/INST]" if len(talk) % 2 else "")


def llama3(talk: Sequence[Mapping[str, str]], prompt: bool) -> str:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    text = "".join(header(m["role"]) + m["content"].strip() + "<|eot_id|>" for m in talk)
    return "<|begin_of_text|>" + text + (header("assistant") if prompt else "")


def alpaca(talk: Sequence[Mapping[str, str]], prompt: bool) -> str:
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    if talk[0]["role"] == "system":
        preamble, talk = talk[0]["content"] + "\n\n", talk[1:]
    parts = []
    for m in talk:
        asked = f"### Instruction:\n{m['content']}\n\n### Response:"
        parts.append(asked if m["role"] == "user" else m["content"] + "</s>\n\n")
    return "<s>" + preamble + "".join(parts).removesuffix("\n\n")


def vicuna(talk: Sequence[Mapping[str, str]], prompt: bool) -> str:
    preamble = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    if talk[0]["role"] == "system":
        preamble, talk = talk[0]["content"], talk[1:]
    text = preamble + " "
    for m in talk:
        text += f"USER: {m['content']} " if m["role"] == "user" else f"ASSISTANT: {m['content']}</s>"
    return "<s>" + text + ("ASSISTANT:" if prompt else "")


PUBLISHED = {"chatml": chatml, "hermes": chatml, "llama2": llama2, "llama3": llama3, "alpaca": alpaca, "vicuna": vicuna}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("talk", [TALK, TALK[:4], TALK[:2], TALK[1:], TALK[1:2], TALK[1:4]])
def test_presets_write_the_published_forms(name: str, talk: list[dict[str, Any]]) -> None:
    template = ChatTemplate.preset(name)
    prompt = talk[-1]["role"] == "user"
    expected = PUBLISHED[name](talk, prompt)
    assert template.render(talk, add_generation_prompt=prompt) == expected
    tok = Bytes(template.special_tokens)
    ids = template.encode(tok, talk, add_generation_prompt=prompt)
    assert tok.decode(ids) == expected
    names = "|".join(map(re.escape, template.special_tokens))
    assert tok.names(ids) == re.findall(names, expected)  # this talk's messages have none


def test_hermes_writes_tools_calls_and_what_they_gave() -> None:
    weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    calls = [{"function": {"name": "weather", "arguments": {"city": place}}} for place in ("Bern", "Zürich")]
    talk = [
        user("Rain?"), {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "no"}, {"role": "tool", "content": "yes"}, assistant("In Zürich."),
    ]  # fmt: skip
    template = ChatTemplate.preset("hermes")
    text = template.render(talk, [weather])
    system, _, rest = text.partition("<|im_end|>\n")
    assert json.loads(re.findall(r"<tools>\n(.*)\n</tools>", system)[0]) == weather
    assert [json.loads(one) for one in re.findall(r"<tool_call>\n(.*)\n</tool_call>", rest)] == [
        {"name": "weather", "arguments": {"city": place}} for place in ("Bern", "Zürich")
    ]
    assert rest.endswith(
        "<|im_start|>user\n<tool_response>\nno\n</tool_response>\n<tool_response>\nyes\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIn Zürich.<|im_end|>\n"
    )
    called, said = learned(template, Bytes(CHATML_TOKENS), talk, tools=[weather])
    assert called.startswith("<tool_call>")
    assert called.endswith("</tool_call><|im_end|>")
    assert "yes" not in called
    assert said == "In Zürich.<|im_end|>"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_where_an_assistants_turn_ends(name: str) -> None:
    template = ChatTemplate.preset(name)
    tok = Bytes(template.special_tokens)
    end = template.end_of_turn(tok)
    assert end is not None
    assert tok.decode([end]) == LEARNED[name][0][-len(tok.decode([end])) :]
    assert ChatTemplate("{{ messages[0].content }}").end_of_turn(tok) is None


def test_presets_are_what_there_is() -> None:
    assert list(CHAT_TEMPLATES) == list(PUBLISHED)
    with pytest.raises(UsageError, match=r"unknown chat template 'chatlm'\. Known: chatml, .* Did you mean chatml\?"):
        ChatTemplate.preset("chatlm")


def test_alpaca_with_an_input() -> None:
    talk = [user("Add.", input="1 and 2"), assistant("3")]
    assert ChatTemplate.preset("alpaca").render(talk) == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:3</s>"
    )


@pytest.mark.parametrize("name", ["llama2", "alpaca", "vicuna"])
def test_presets_with_turns_insist_on_them(name: str) -> None:
    with pytest.raises(GroundupError, match=r"refuses these messages: .*user and assistant take turns"):
        ChatTemplate.preset(name).render([user("a"), user("b")])


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_presets_do_not_drop_tools(name: str) -> None:
    template = ChatTemplate.preset(name)
    if name == "hermes":  # it has a place for them
        assert '{"name": "f"}' in template.render(TALK, tools=[{"name": "f"}])
        return
    with pytest.raises(GroundupError, match="no place for tools"):
        template.render(TALK, tools=[{"name": "f"}])
    with pytest.raises(GroundupError, match="no place for tools"):
        template.render([user("a"), assistant("", tool_calls=[{"name": "f", "arguments": {}}])])


# ---- the mask


def learned(template: ChatTemplate, tok: Any, talk: list[dict[str, Any]], **options: Any) -> list[str]:
    """The stretches of text that the mask covers."""
    ids, mask = template.encode_with_mask(tok, talk, **options)
    assert len(ids) == len(mask)
    edges = [0, *(i for i in range(1, len(ids)) if mask[i] != mask[i - 1]), len(ids)]
    return [tok.decode(ids[a:b]) for a, b in pairwise(edges) if mask[a]]


LEARNED = {
    "chatml": [" Hi.\n<|im_end|>", "Fine, naïve 中文<|im_end|>"],
    "hermes": [" Hi.\n<|im_end|>", "Fine, naïve 中文<|im_end|>"],
    "llama2": [" Hi. </s>", " Fine, naïve 中文 </s>"],
    "llama3": ["Hi.<|eot_id|>", "Fine, naïve 中文<|eot_id|>"],
    "alpaca": [" Hi.\n</s>", "Fine, naïve 中文</s>"],
    "vicuna": ["  Hi.\n</s>", " Fine, naïve 中文</s>"],
}


def without_generation(template: ChatTemplate) -> ChatTemplate:
    source = re.sub(r"\{%-\s*(end)?generation\s*-%\}", "", template.source)
    assert source != template.source
    return ChatTemplate(source, template.variables)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_mask_covers_the_assistants_text_and_its_end(name: str) -> None:
    template = ChatTemplate.preset(name)
    tok = Bytes(template.special_tokens)
    for form in (template, without_generation(template)):
        assert learned(form, tok, TALK) == LEARNED[name]
        assert learned(form, tok, TALK, turns="last") == LEARNED[name][1:]
        assert learned(form, tok, TALK[:4], turns="last") == LEARNED[name][:1]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("answer", ["Hi", "", " ", "\n\nWell", "'s", "<|im_end|>", "</s>", "123"])
def test_a_prompts_ids_begin_the_conversations_ids(name: str, answer: str) -> None:
    """Training sees just what generation saw, whatever the answer begins with."""
    template = ChatTemplate.preset(name)
    text = "user assistant ASSISTANT: Response: \n\n123 the cat's on the mat <s> im_end " * 5
    tok = Tokenizer.train([text], 340, special_tokens=template.special_tokens, show_progress=False)
    talk = [user("How?"), assistant(answer), user(answer), assistant(answer), user("And?"), assistant("Bye")]
    ids, mask = template.encode_with_mask(tok, talk)
    assert tok.decode(ids) == template.render(talk)
    assert ids == template.encode(tok, talk)
    starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
    prompts = [template.encode(tok, talk[:n], add_generation_prompt=True) for n in (1, 3, 5)]
    assert [ids[: len(prompt)] for prompt in prompts] == prompts
    assert [len(prompt) for prompt in prompts] == starts


def test_mask_of_a_tool_call_without_generation_tags() -> None:
    source = """{%- for m in messages -%}{{ '<|' ~ m.role ~ '|>' }}
        {%- if m.tool_calls %}{% for call in m.tool_calls %}<call>{{ call.arguments | tojson }}</call>{% endfor %}
        {%- else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}
        {%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
    tok = Bytes(["<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"])
    talk = [
        user("2+2?"),
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]},
        {"role": "tool", "content": "4"},
        assistant("Four."),
    ]
    template = ChatTemplate(source)
    assert learned(template, tok, talk) == ['<call>{"a": 2, "b": 2}</call><|end|>', "Four.<|end|>"]
    assert learned(template, tok, talk, turns="last") == ["Four.<|end|>"]


def test_mask_without_an_end_token_leaves_the_templates_white_space() -> None:
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert learned(ChatTemplate(source), Bytes([]), [user("a"), assistant("b \n")]) == ["b \n"]


def test_mask_of_a_template_that_writes_something_at_the_end_of_all() -> None:
    # In the style of Phi-3, whose conversations end in a token of their own.
    source = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
    source += "{{ '<|assistant|>' if add_generation_prompt else '</s>' }}"
    tok = Bytes(["<|user|>", "<|assistant|>", "<|end|>", "</s>"])
    assert learned(ChatTemplate(source), tok, TALK[1:]) == [" Hi.\n<|end|>", "Fine, naïve 中文<|end|>"]
    plain = source.replace("<|end|>", "###")
    assert learned(ChatTemplate(plain), Bytes(["<|user|>", "</s>"]), TALK[1:4]) == [" Hi.\n###"]


def test_a_template_that_rewrites_the_past_has_no_mask() -> None:
    # In the style of models that drop the reasoning of earlier turns.
    source = (
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ (m.content if loop.last else m.content.split('.')[-1]) }}"
    )
    source += "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    template, tok = ChatTemplate(source), Bytes(["<|user|>", "<|assistant|>"])
    talk = [user("a"), assistant("Hm. b"), user("c"), assistant("d")]
    assert tok.decode(template.encode(tok, talk)) == template.render(talk)
    with pytest.raises(
        GroundupError, match=r"tokens in messages\[1\] cannot be told apart.*\{% generation %\}"
    ) as caught:
        template.encode_with_mask(tok, talk)
    assert "\n" not in str(caught.value)


def test_nothing_to_learn_from() -> None:
    template = ChatTemplate.preset("chatml")
    with pytest.raises(GroundupError, match="nothing to learn from"):
        template.encode_with_mask(Bytes(CHATML_TOKENS), [user("a")])
    with pytest.raises(UsageError, match=r"turns = 'lats' is unknown.*Did you mean last\?"):
        template.encode_with_mask(Bytes(CHATML_TOKENS), TALK, turns="lats")  # type: ignore[arg-type]


def test_generation_inside_captured_text() -> None:
    """A template may build its text in variables and macros before it prints it."""
    source = """{%- macro said(m) %}{% generation %}{{ m.content ~ '<|e|>' }}{% endgeneration %}{% endmacro -%}
        {%- set text %}{% for m in messages %}[{% if m.role == 'assistant' %}{{ said(m) }}{% else %}{{ m.content }}
        {%- endif %}]{% endfor %}{% endset -%}
        {{- text | trim -}}"""
    tok = Bytes(["<|e|>"])
    assert learned(ChatTemplate(source), tok, TALK) == [" Hi.\n<|e|>", "Fine, naïve 中文<|e|>"]


def test_continuing_the_last_message() -> None:
    for name in CHAT_TEMPLATES:
        template = ChatTemplate.preset(name)
        tok = Bytes(template.special_tokens)
        talk = [user("Say A B C"), assistant("A B")]
        text = template.render(talk, continue_final_message=True)
        assert text.endswith("A B")
        assert template.render(talk).startswith(text)
        ids = template.encode(tok, talk, continue_final_message=True)
        assert tok.decode(ids) == text
        assert ids == template.encode(tok, talk)[: len(ids)]
        with pytest.raises(UsageError, match="continue_final_message needs"):
            template.encode(tok, talk, continue_final_message=True, add_generation_prompt=True)
        with pytest.raises(UsageError, match="continue_final_message needs"):
            template.render([user("a"), assistant("")], continue_final_message=True)
    with pytest.raises(GroundupError, match="does not end with the content of the last message"):
        ChatTemplate("{{ messages[0].content }}").render(TALK, continue_final_message=True)


# ---- messages never become special tokens

NAMES = st.lists(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "</s>", "[INST]", "<|user|>", "a<", "<", "user", "0", "Ab", '"}', "\\n"]
    )
    | st.text("<|>ab/", min_size=1, max_size=5),
    min_size=1,
    max_size=5,
    unique=True,
)


@st.composite
def fragments(draw: st.DrawFn, names: Sequence[str]) -> str:
    """Text made of special tokens, their beginnings and ends, and what lies between."""
    parts = []
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(names))
        start = draw(st.integers(0, len(name)))
        end = draw(st.integers(start, len(name)))
        parts.append(draw(st.sampled_from([name, name[start:], name[:end], name[start:end], " ", "x", "\n", "é"])))
    return "".join(parts)


def expected_pieces(characters: Sequence[tuple[str, bool]], names: Sequence[str]) -> list[str | tuple[str]]:
    """Look at each place for the longest name that the template wrote, every character of it; else one character."""
    text = "".join(character for character, _ in characters)
    pieces: list[str | tuple[str]] = []
    place = 0
    while place < len(text):
        found = [
            name
            for name in names
            if text.startswith(name, place) and all(trusted for _, trusted in characters[place : place + len(name)])
        ]
        name = max(found, key=len, default="")
        pieces.append((name,) if name else text[place])
        place += len(name) or 1
    return pieces


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_only_what_the_template_wrote_becomes_special(data: st.DataObject) -> None:
    """Random special tokens, messages and templates, against a search character by character."""
    names = data.draw(NAMES)
    messages = [user(data.draw(fragments(names))) for _ in range(data.draw(st.integers(1, 3)))]
    source, characters = "", []
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            literal = data.draw(fragments(names))
            source += "{{ " + json.dumps(literal) + " }}"
            characters += [(character, True) for character in literal]
        else:
            number = data.draw(st.integers(0, len(messages) - 1))
            source += "{{ messages[" + str(number) + "].content }}"
            characters += [(character, False) for character in messages[number]["content"]]
    tok = Bytes(names)
    ids = ChatTemplate(source).encode(tok, messages)
    expected: list[int] = []
    for piece in expected_pieces(characters, names):
        expected += tok.encode(piece) if isinstance(piece, str) else [tok.special_tokens[piece[0]]]
    assert ids == expected
    assert tok.decode(ids) == ChatTemplate(source).render(messages)


# What templates do with the text of messages. None of them writes anything of its own but "x" and "é".
HANDLINGS = [
    "{{ m.content }}",
    "{{ m.content | trim }}",
    "{{ m.content.strip() ~ m.name }}",
    "{{ m.content + m.name + m.content }}",
    "{{ [m.content, m.name] | join }}",
    "{{ [m.content, m.name] | join('x') }}",
    "{{ ''.join([m.content, m.name]) }}",
    "{{ m.content.split('x') | join }}",
    "{{ m.content.split(' ')[-1] ~ m.name }}",
    "{% if ' ' in m.content %}{{ m.content.split(' ', 1)[1].lstrip() }}{% else %}{{ m.content.rstrip() }}{% endif %}",
    "{{ m.content | replace('x', '') }}",
    "{{ m.content.replace(' ', '') ~ m.content.replace('', 'é') }}",
    "{{ m.content | upper ~ m.content | lower ~ m.content.title() ~ m.content | title ~ m.content | capitalize }}",
    "{{ m.content[1:] ~ m.content[:-1] ~ m.content[::-1] ~ (m.content | reverse) }}",
    "{{ m.content | first ~ m.content | last ~ m.content | list | join }}",
    "{% for c in m.content %}{{ c }}{% endfor %}",
    "{% set t %}{{ m.content }}{{ m.name }}{% endset %}{{ t }}{{ t | trim }}{{ t[1:] }}",
    "{% macro f(t) %}{{ t }}{{ m.content }}{% endmacro %}{{ f(m.name) }}",
    "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}",
    "{{ '%s%s' % (m.content, m.name) }}{{ '%s' | format(m.content) }}",
    "{{ '{}{}'.format(m.content, m.name) }}",
    "{{ m.calls | tojson }}{{ m.content | tojson }}",
    "{{ m.calls | tojson(ensure_ascii=true, indent=1) }}",
    "{{ m.calls }}{{ m.calls | string }}{{ '%s' % m.calls }}",
    "{% for key, value in m.calls.items() %}{{ key }}{{ value }}{% endfor %}",
    "{% for key in m.calls %}{{ key ~ m.calls[key] }}{% endfor %}",
    "{% for part in m.content.splitlines() %}{{ part }}{% endfor %}",
    "{{ m.content.partition(' ')[2] ~ m.content.rpartition(' ')[0] }}",
    "{{ m.content | indent(2) }}{{ m.content | center(9) }}{{ m.content.center(9) }}{{ m.content | truncate(5) }}",
    "{{ m.content * 2 }}{{ m.content | safe }}",
    "{{ m.content if m.content.startswith('<') or m.content.endswith('>') else m.name }}",
    "{{ m.content | length }}{{ m.content.find('x') }}{{ m.content.count('a') }}{{ m.content == m.name }}",
    "{{ (m.content | int) + (m.name | length) }}{{ m.content | wordcount }}{{ m.content.isdigit() }}",
    "{{ messages | map(attribute='content') | join }}{{ messages | map(attribute='name') | sort | join }}",
    "{{ messages | selectattr('content', 'equalto', m.name) | list | length }}{{ m.content in [m.name] }}",
    "{{ m.reasoning_content }}{{ m.content | default('é') }}",
    "{% generation %}{{ m.content }}{% endgeneration %}{{ m.name }}",
]


@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("handling", HANDLINGS)
@given(data=st.data())
def test_no_handling_makes_messages_special(handling: str, data: st.DataObject) -> None:
    names = data.draw(NAMES)
    assume(not {"0", "user", "x", "é", " "} & set(names))  # numbers are no text, and "x" and "é" the template's own
    assume(not any(re.fullmatch("[xé .0-9]+|x.*|.*x|é.*|.*é|.*[{}:,'\"\\\\ ].*", name) for name in names))
    text = fragments(names)
    messages = [
        user(data.draw(text), name=data.draw(text), calls={data.draw(text): data.draw(text)}, reasoning=data.draw(text))
        for _ in range(2)
    ]
    template = ChatTemplate("{% for m in messages %}" + handling + "{% endfor %}")
    tok = Bytes(names)
    ids = template.encode(tok, messages)
    assert tok.names(ids) == []
    assert tok.decode(ids) == template.render(messages)


def test_json_never_completes_a_special_token() -> None:
    """Quotes, escapes, numbers and keys of JSON stand beside text of messages, and are data as it is."""
    tok = Bytes(['"}', "\\n", '": "', "42", "true", "\\u00e9", '{"a'])
    template = ChatTemplate("{{ messages[0].calls | tojson }}{{ messages[0].calls | tojson(ensure_ascii=true) }}")
    message = user("", calls={"a": "b\n", "c": 42, "d": True, "é": '"}'})
    ids = template.encode(tok, [message])
    assert tok.names(ids) == []
    assert tok.decode(ids) == json.dumps(message["calls"], ensure_ascii=False) + json.dumps(message["calls"])
    printed = ChatTemplate("{{ messages[0].calls.c }}{{ '' ~ messages[0].calls.c }}")
    assert tok.names(printed.encode(tok, [message])) == []


def test_text_that_looks_like_the_templates_thinking_marks() -> None:
    """Templates in the style of Qwen3 search for </think>, and write it again themselves."""
    source = """{% for m in messages %}{% if m.role == 'assistant' and '</think>' in m.content %}
        {%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' + content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"""
    tok = Bytes(["<think>", "</think>"])
    talk = [user("<think></think>"), assistant("<think>\nHm </thin\n</think>\n\nYes.")]
    ids = ChatTemplate(source).encode(tok, talk)
    assert tok.decode(ids) == "<think></think><think>\nHm </thin\n</think>\n\nYes."
    assert tok.names(ids) == ["<think>", "</think>"]
    assert ids[:7] == list(b"<think>")


def test_roles_may_stand_in_special_tokens_and_are_never_free_text() -> None:
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    tok = Bytes(["<|user|>", "<|assistant|>", "<|end|>"])
    ids = ChatTemplate(source).encode(tok, [user("<|assistant|>"), assistant("|><|end|>")])
    assert tok.names(ids) == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    for role in ("usr", "end|><|assistant", "User", ""):
        with pytest.raises(GroundupError, match=r"messages\[0\]: unknown role"):
            ChatTemplate(source).encode(tok, [{"role": role, "content": ""}])
    with pytest.raises(GroundupError, match=r"unknown role 'asistant'.*Did you mean assistant"):
        ChatTemplate(source).render([{"role": "asistant", "content": ""}])
    own = ChatTemplate(source, roles=("narrator",))
    assert own.render([{"role": "narrator", "content": "Once"}]) == "<|narrator|>Once<|end|>"


def test_variables_of_the_template_are_trusted_and_those_of_a_call_are_not() -> None:
    template = ChatTemplate("{{ bos_token ~ messages[0].content ~ extra }}", {"bos_token": "<s>"})
    tok = Bytes(["<s>"])
    ids = template.encode(tok, [user("<s>")], extra="<s>")
    assert tok.names(ids) == ["<s>"]
    assert ids[0] == 256
    assert tok.decode(ids) == "<s><s><s>"


def test_characters_that_serve_as_marks_are_ordinary_in_messages() -> None:
    text = f"a{MARK}b\ufdd1\ufdd2<|im_end|>\U000f0000{MARK}"
    template, tok = ChatTemplate.preset("chatml"), Bytes(CHATML_TOKENS)
    expected = f"<|im_start|>user\n{text}<|im_end|>\n"
    assert template.render([user(text)]) == expected
    ids = template.encode(tok, [user(text)])
    assert tok.decode(ids) == expected
    assert tok.names(ids) == ["<|im_start|>", "<|im_end|>"]
    with pytest.raises(GroundupError, match="noncharacters"):
        ChatTemplate(f"a{MARK}")


def test_a_template_that_marks_would_change_is_refused() -> None:
    template = ChatTemplate("{{ '%-9s|' % messages[0].content }}")
    assert template.render([user("ab")]) == "ab       |"
    with pytest.raises(GroundupError, match="cannot be told which of it came in with messages"):
        template.encode(Bytes([]), [user("ab")])


def test_a_real_tokenizer(small: Tokenizer) -> None:
    source = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    talk = [user("the cat<|end|>"), user("<|endof"), user("text|> naïve 👋🏽")]
    template = ChatTemplate(source)
    ids = template.encode(small, talk)
    assert small.decode(ids) == template.render(talk)
    special = set(small.special_tokens.values())
    assert [i for i in ids if i in special] == [small.special_tokens["<|end|>"]] * 3


# ---- marked text


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab <ßΣ\n\tǅ", max_size=4), st.booleans()), max_size=5),
    st.text("ab <\n", max_size=2),
    st.integers(-5, 9),
    st.integers(-5, 9),
)
def test_marked_text_behaves_like_plain_text(parts: list[tuple[str, bool]], other: str, i: int, j: int) -> None:
    text = Marked("".join(raw(mark(part)) if marked else part for part, marked in parts))
    plain = "".join(part for part, _ in parts)
    assert (text == plain, hash(text), len(text), bool(text)) == (True, hash(plain), len(plain), bool(plain))
    assert (other in text) == (other in plain)
    assert (text < other, text >= other, text != other) == (plain < other, plain >= other, plain != other)
    assert ({plain: 1}[text], {text: 1}[plain], repr(text) != repr(plain)) == (1, 1, plain == plain)

    def same(ours: Any, theirs: Any) -> None:
        if isinstance(theirs, str):
            assert (unmarked(ours), type(theirs)) == (theirs, str)
        elif isinstance(theirs, list | tuple):
            assert list(map(unmarked, ours)) == list(theirs)
        else:
            assert ours == theirs

    for name in ("strip", "lstrip", "rstrip", "split", "rsplit"):
        same(getattr(text, name)(), getattr(plain, name)())
        if other:
            same(getattr(text, name)(other), getattr(plain, name)(other))
            same(getattr(text, name)(mark(other)), getattr(plain, name)(other))
    for name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold", "isdigit", "isupper", "isspace"):
        same(getattr(text, name)(), getattr(plain, name)())
    for name in ("startswith", "endswith", "find", "rfind", "count", "removeprefix", "removesuffix"):
        same(getattr(text, name)(other), getattr(plain, name)(other))
    for name in ("center", "ljust", "zfill", "expandtabs"):
        same(getattr(text, name)(j), getattr(plain, name)(j))
    if other:
        same(text.partition(other), plain.partition(other))
        same(text.rpartition(other), plain.rpartition(other))
        same(text.split(other, i), plain.split(other, i))
        same(text.rsplit(other, i), plain.rsplit(other, i))
    same(text.split(None, i), plain.split(None, i))
    same(text.rsplit(None, i), plain.rsplit(None, i))
    same(text.replace(other, "xy"), plain.replace(other, "xy"))
    same(text.replace(other, "", i), plain.replace(other, "", i))
    same(text.splitlines(), plain.splitlines())
    same(text.splitlines(True), plain.splitlines(True))
    same(text[i:j], plain[i:j])
    same(text[j:i:-1], plain[j:i:-1])
    same(text[::2], plain[::2])
    same(list(text), list(plain))
    same(list(reversed(text)), list(reversed(plain)))
    if -len(plain) <= i < len(plain):
        same(text[i], plain[i])


@given(st.lists(st.tuples(st.sampled_from("ab "), st.booleans()), max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_parts_keep_the_marks_of_their_characters(characters: list[tuple[str, bool]], i: int, j: int) -> None:
    def written(characters: Sequence[tuple[str, bool]]) -> str:
        return "".join(character + MARK * marked for character, marked in characters)

    text = Marked(written(characters))
    assert raw(text[i:j]) == written(characters[i:j])
    stripped = list(characters)
    while stripped and stripped[0][0] == " ":
        del stripped[0]
    assert raw(text.lstrip()) == written(stripped)
    assert raw(text.upper()) == written(characters).upper()
    assert raw(text.replace("b", "")) == written([pair for pair in characters if pair[0] != "b"])
    assert "".join(map(raw, text.split("a"))) == written([pair for pair in characters if pair[0] != "a"])


# ---- what a template is given


def test_parts_of_text_are_joined_and_others_refused() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}]
    assert template.render([{"role": "user", "content": parts}]) == "abc"
    for part, kind in (({"type": "image_url", "image_url": "x"}, "image_url"), (7, "int"), ({"type": "text"}, "text")):
        with pytest.raises(GroundupError, match=rf"messages\[0\]\.content has a part of type '{kind}'"):
            template.render([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "there are no messages"),
        ("hello", "messages must be a list of dictionaries"),
        ({"role": "user", "content": "a"}, "messages must be a list of dictionaries"),
        (["hello"], r"messages\[0\] is str, not a dictionary"),
        ([user("a"), {"content": "b"}], r"messages\[1\] has no role"),
        ([{"role": 7, "content": "b"}], r"messages\[0\] has no role"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content is int; it must be text"),
        ([user("a", when=object())], r"messages\[0\] holds object; a chat template takes text"),
    ],
)
def test_messages_that_are_not_as_they_must_be(messages: Any, reason: str) -> None:
    with pytest.raises(GroundupError, match=reason) as caught:
        ChatTemplate(CHATML).render(messages)
    assert "\n" not in str(caught.value)


def test_data_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(GroundupError, match="nested more than 64 deep"):
        ChatTemplate(CHATML).render([user("a", x=endless)])
    with pytest.raises(GroundupError, match=r"has 16,777,\d+ characters; a chat template takes 16,777,216"):
        ChatTemplate(CHATML).render([user("a" * (1 << 24))])
    with pytest.raises(GroundupError, match="tools must be a list"):
        ChatTemplate(CHATML).render([user("a")], tools={"name": "f"})  # type: ignore[arg-type]


def test_the_callers_messages_are_left_alone() -> None:
    talk = [user("a", reasoning="b", x={"y": ["z"]})]
    before = json.dumps(talk)
    ChatTemplate.preset("chatml").encode(Bytes(CHATML_TOKENS), talk)
    assert json.dumps(talk) == before


def test_fields_without_a_value_are_not_there_and_reasoning_has_both_names() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.name is defined }} {{ m.thinking }} {{ m.reasoning_content }};{% endfor %}"
    )
    assert template.render([user("a", name=None, reasoning="r"), user("a", thinking="t")]) == "False r r;False t t;"


def test_a_tokenizer_without_the_special_tokens_is_refused(small: Tokenizer) -> None:
    with pytest.raises(GroundupError, match=r"lacks: <\|im_start\|>, <\|im_end\|>\. Train it with special_tokens="):
        ChatTemplate.preset("chatml").encode(small, TALK)
    used = ChatTemplate("{{ eos_token }}", {"bos_token": "<s>", "eos_token": "</s>"})
    assert used.special_tokens == ("</s>",)
    with pytest.raises(GroundupError, match="lacks: </s>"):
        used.encode_with_mask(small, TALK)


def test_lone_surrogates_end_in_one_line(small: Tokenizer) -> None:
    with pytest.raises(GroundupError, match="lone surrogate"):
        ChatTemplate("{{ messages[0].content }}").encode(small, [user("a\ud800")])


def test_what_templates_are_given() -> None:
    source = """{{ tools | length }} {{ documents }} {{ add_generation_prompt }} {{ enable_thinking }}
{%- for n in range(9) %}{% if n == 2 %}{% continue %}{% endif %}{% if n > 3 %}{% break %}{% endif %}{{ n }}{% endfor %}

{{ tools | tojson(indent=2, sort_keys=true) }} {{ '<é>' | tojson }} {{ strftime_now('%Y') }}"""
    text = ChatTemplate(source).render(TALK, tools=[{"b": 1, "a": "é"}], enable_thinking=False)
    first, *rest = text.split("\n")
    assert first == "1 None False False013"
    assert "\n".join(rest) == f'[\n  {{\n    "a": "é",\n    "b": 1\n  }}\n] "<é>" {time.strftime("%Y")}'


# ---- templates that fail, and templates that mean harm


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a\n{% for %}", "does not compile: line 2: "),
        ("a\n\n{{ 1 | nosuch }}", "does not compile: line 3: No filter named 'nosuch'"),
        ("{% generation %}", "does not compile: line 1: .*endgeneration"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile: .*too deep"),
        ("{% if 1 %}" * 300 + "{% endif %}" * 300, "does not compile: .*too deep"),
        ("a" * (1 << 18) + "a", "the chat template is too long: the most is 262,144"),
    ],
)
def test_templates_that_do_not_compile(source: str, reason: str) -> None:
    with pytest.raises(GroundupError, match=reason) as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('Only\n' + messages[0].role) }}", "refuses these messages: Only system$"),
        ("a\n{{ foo.bar }}", r"fails in line 2: 'foo' is undefined \(UndefinedError\)\. Does every message"),
        ("a\n\n{{ 1 / 0 }}", "fails in line 3: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'x' %}", "fails in line 1: no loader"),
        ("{{ range(10**9) | list }}", "Range too big"),
    ],
)
def test_templates_that_fail(source: str, reason: str) -> None:
    with pytest.raises(GroundupError, match=reason) as caught:
        ChatTemplate(source).render(TALK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages[0].content.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages[0].content.encode() }}",
        "{{ range.__init__ }}",
        "{{ namespace.__init__.__globals__ }}",
    ],
)
def test_templates_that_reach_outside(source: str) -> None:
    with pytest.raises(GroundupError, match=r"(reaches for what no template may have|fails) in line 1: .*unsafe"):
        ChatTemplate(source).encode(Bytes([]), TALK)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops without calls": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "lists": "{{ range(99999) | map('string') | map('list') | sum(start=[]) }}",
    "calls": "{% for a in range(99999) %}{{ 'a'.join(range(99999) | map('string')) }}{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_end_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_SECONDS", 0.3)
    started = time.thread_time()
    with pytest.raises(GroundupError, match=r"was stopped in line 1: it (does not come to an end|makes more than)"):
        ChatTemplate(ENDLESS[name]).render(TALK)
    assert time.thread_time() - started < 3


BIG = "{% set b = 'a' * 1000000 %}"
GROWING = {
    "times": "{{ 'a' * 10**10 }}",
    "times, turned": "{{ 10**10 * 'a' }}",
    "list times": "{{ [0] * 10**10 }}",
    "power": "{{ 10**(10**10) }}",
    "squares": "{% set ns = namespace(n=3) %}{% for i in range(999) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**10, 1) }}",
    "percent again and again": BIG + "{{ ('%(a)s' * 100000) % {'a': b} }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "format again and again": BIG + "{{ ('{0}' * 1000000).format(b) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "ljust of a message": "{{ messages[0].content.ljust(10**10) }}",
    "expandtabs": "{{ ('\t' * 1000000).expandtabs(10000) }}",
    "indent": "{{ ('\n' * 100000) | indent(10000) }}",
    "indent with text": BIG + "{{ ('\n' * 1000000) | indent(b) }}",
    "replace": BIG + "{{ b.replace('a', b) }}",
    "replace nothing": BIG + "{{ b.replace('', b) }}",
    "replace filter": BIG + "{{ b | replace('a', b) }}",
    "join": BIG + "{{ b.join('a' * 99999) }}",
    "join filter": BIG + "{{ range(99999) | join(b) }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "round": "{{ 1.5 | round(10**9) }}",
    "json": "{{ [1] | tojson(indent=10**10) }}",
    "date": "{{ strftime_now('%9999999999Y') }}",
    "doubling": BIG + "{% set ns = namespace(x=b) %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "keeping": BIG
    + "{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% set ns.l = ns.l + [b ~ i] %}{% endfor %}",
    "printing": BIG + "{% for i in range(999) %}{{ b }}{% endfor %}",
}


@pytest.mark.parametrize("name", GROWING)
def test_templates_that_make_much_of_little_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_CHARACTERS", 20_000_000)
    with pytest.raises(GroundupError, match=r"was stopped( in line [12])?: it (makes more|asks for|computes)"):
        ChatTemplate(GROWING[name]).render(TALK)


def test_a_width_that_is_a_variable_is_refused() -> None:
    with pytest.raises(GroundupError, match="a width inside a format must be a plain number"):
        ChatTemplate("{{ '{:{w}}'.format(1, w='9999999999') }}").render(TALK)


def test_a_long_conversation_is_no_endless_one() -> None:
    talk = [message for _ in range(1500) for message in (user("word " * 60), assistant("answer <|im_end|> " * 20))]
    template, tok = ChatTemplate.preset("chatml"), Bytes(CHATML_TOKENS)
    started = time.thread_time()
    ids, mask = template.encode_with_mask(tok, talk)
    assert time.thread_time() - started < 10  # 0.5 s on one quiet core
    assert len(tok.names(ids)) == 2 * len(talk)
    assert sum(mask) == 1500 * (len("answer <|im_end|> ") * 20 + 1)


def test_threads_render_apart() -> None:
    template, tok = ChatTemplate.preset("chatml"), Bytes(CHATML_TOKENS)
    talks = [[user(f"{n} <|im_end|>" * n)] for n in range(1, 9)]
    expected = [template.encode(tok, talk) for talk in talks]
    found: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        found[number] = [template.encode(tok, talks[number]) for _ in range(30)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(talks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [expected[number]] * 30 for number in range(len(talks))}

"""Chat templates of a tokenizer: given, saved, loaded, and the same ids in transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from groundup.runtime.errors import GroundupError, UsageError
from groundup.tokenizer import CHAT_TEMPLATES, PATTERNS, ChatTemplate, Tokenizer, Vocabulary
from groundup.tokenizer.chat_presets import PRESETS

NAMES = tuple(dict.fromkeys(name for preset in PRESETS.values() for name in preset.special_tokens))
TALK = [
    {"role": "user", "content": "The cat sat on <s> the mat.\nWhy?"},
    {"role": "assistant", "content": "  Because naïve 中文 👋🏽, <|im_end|> of course."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "So did it."},
]
QUESTION = TALK[:3]
# What users of transformers write: no special token of the text is one of the message's.
PLAIN = [{**message, "content": message["content"].replace("<", "(").replace(">", ")")} for message in TALK]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    """A tokenizer with the special tokens of all known templates."""
    text = "the cat sat on the mat and the dog sat on the cat; user: assistant: so they all sat, naïve 中文 👋🏽. " * 3
    return Tokenizer.train([text], 340, special_tokens=("<|endoftext|>", *NAMES), show_progress=False)


@pytest.fixture(scope="module")
def llama2(vocabularies: Path) -> Tokenizer:
    pytest.importorskip("sentencepiece")
    return Tokenizer.load(vocabularies / "llama2" / "tokenizer.model")


def in_transformers(folder: Path, talk: list[dict[str, Any]], **options: Any) -> list[int]:
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    ids: list[int] = peer.apply_chat_template(talk, return_dict=False, **options)
    return ids


# ---- given


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_known_template_writes_what_it_writes_alone(name: str, tok: Tokenizer) -> None:
    made = tok.with_chat_template(name)
    expected = CHAT_TEMPLATES[name].encode(tok, TALK)
    assert made.apply_chat_template(TALK) == expected
    assert made.apply_chat_template_with_mask(TALK) == CHAT_TEMPLATES[name].encode_with_mask(tok, TALK)
    assert made.decode(expected) == CHAT_TEMPLATES[name].render(TALK)
    assert made.chat_template == PRESETS[name].source
    assert tok.chat_template is None, "the tokenizer it was made from stays as it was"
    assert made.fingerprint == tok.fingerprint, "plain text becomes the same ids"


def test_options_reach_the_template(tok: Tokenizer) -> None:
    made = tok.with_chat_template("chatml")
    prompt = made.apply_chat_template(QUESTION, add_generation_prompt=True)
    whole = made.apply_chat_template(TALK)
    assert prompt == whole[: len(prompt)]
    assert made.decode(prompt).endswith("<|im_start|>assistant\n")
    going_on = made.apply_chat_template(TALK, continue_final_message=True)
    assert going_on == whole[: len(going_on)]
    assert made.decode(going_on).endswith("So did it.")
    ids, mask = made.apply_chat_template_with_mask(TALK, turns="last")
    assert made.decode([number for number, wanted in zip(ids, mask, strict=True) if wanted]) == "So did it.<|im_end|>"
    tools = tok.with_chat_template("{{ tools[0].name }} {{ mood }}")
    assert tools.decode(tools.apply_chat_template(TALK, [{"name": "sit"}], mood="calm")) == "sit calm"


def test_the_text_of_a_message_is_never_a_special_token(tok: Tokenizer) -> None:
    for name in CHAT_TEMPLATES:
        made = tok.with_chat_template(name)
        special = set(made.special_tokens.values())
        harmless = made.apply_chat_template([{"role": "user", "content": "x"}])
        spelled = made.apply_chat_template([{"role": "user", "content": "".join(NAMES)}])
        assert [number for number in spelled if number in special] == [n for n in harmless if n in special]


def test_the_tokenizers_own_names_come_before_the_published_ones(tok: Tokenizer) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    said = [{"role": "user", "content": "cat"}]
    assert tok.decode(tok.with_chat_template(source).apply_chat_template(said)) == "<|endoftext|>cat<|endoftext|>"
    named = tok.with_chat_template(source, bos_token="<s>", eos_token="</s>")
    assert tok.decode(named.apply_chat_template(said)) == "<s>cat</s>"
    again = named.with_chat_template(source)
    assert again.apply_chat_template(said) == named.apply_chat_template(said)
    other = tok.with_chat_template("vicuna", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    written = tok.decode(other.apply_chat_template(TALK))
    assert written.startswith("<|begin_of_text|>A chat")
    assert written.endswith("So did it.<|eot_id|>")
    assert tok.decode(tok.with_chat_template("vicuna").apply_chat_template(TALK)).startswith("<s>A chat")


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (("chatmll",), UsageError, r"unknown chat template 'chatmll'\. Known: chatml, .* Did you mean chatml\?"),
        (("chatml", "<bos>"), UsageError, "'<bos>' is no special token of this tokenizer"),
        (("{% for %}",), GroundupError, "the chat template does not compile: line 1"),
        (("{{ x" + " " * (1 << 22) + "}}",), GroundupError, "the chat template is too long"),
    ],
)
def test_a_template_that_cannot_be(given: tuple[str, ...], kind: type[Exception], words: str, tok: Tokenizer) -> None:
    with pytest.raises(kind, match=words) as caught:
        tok.with_chat_template(*given)
    assert "\n" not in str(caught.value)


def test_special_tokens_that_are_missing_are_named(small: Tokenizer) -> None:
    with pytest.raises(GroundupError, match=r"needs special tokens that this tokenizer lacks: <\|im_start\|>"):
        small.with_chat_template("chatml")
    with pytest.raises(GroundupError, match="lacks: <s>, </s>"):
        small.with_chat_template("llama2")
    bare = Tokenizer.train(["a cat"], 256, special_tokens=(), show_progress=False)
    with pytest.raises(GroundupError, match=r"this tokenizer has no chat template\. Give it one with"):
        bare.apply_chat_template(TALK)
    with pytest.raises(GroundupError, match=r"messages\[0\]: unknown role"):
        bare.with_chat_template("{{ messages[0].content }}").apply_chat_template([{"role": "usr", "content": "x"}])


# ---- saved and loaded


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_transformers_makes_the_same_ids_of_the_saved_folder(name: str, tok: Tokenizer, tmp_path: Path) -> None:
    made = tok.with_chat_template(name)
    made.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.chat_template == made.chat_template
    assert again.apply_chat_template(TALK) == made.apply_chat_template(TALK)
    assert again.apply_chat_template_with_mask(TALK) == made.apply_chat_template_with_mask(TALK)
    prompt = made.apply_chat_template(PLAIN[:1], add_generation_prompt=True)
    assert prompt == in_transformers(tmp_path, PLAIN[:1], add_generation_prompt=True)
    assert made.decode(made.apply_chat_template(PLAIN)) == made.decode(in_transformers(tmp_path, PLAIN))


def test_the_ends_of_text_are_the_same_in_transformers(tok: Tokenizer, tmp_path: Path) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    for number, names in enumerate([(), ("<s>", "</s>"), (None, "</s>")]):
        made = tok.with_chat_template(source, *names)
        made.save(tmp_path / str(number))
        again = Tokenizer.load(tmp_path / str(number))
        ids = made.apply_chat_template(PLAIN)
        assert again.apply_chat_template(PLAIN) == ids == in_transformers(tmp_path / str(number), PLAIN)


def test_a_template_that_an_earlier_tokenizer_left_does_not_win(tok: Tokenizer, tmp_path: Path) -> None:
    tok.with_chat_template("chatml").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == PRESETS["chatml"].source
    beside = tmp_path / "chat_template.jinja"
    assert not beside.exists()
    beside.write_text("{{ 'somebody else' }}")
    assert Tokenizer.load(tmp_path).chat_template == "{{ 'somebody else' }}"
    tok.with_chat_template("llama3").save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == PRESETS["llama3"].source
    prompt = tok.with_chat_template("llama3").apply_chat_template(PLAIN[:1])
    assert prompt == in_transformers(tmp_path, PLAIN[:1])
    tok.save(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template is None
    assert not beside.exists()


# ---- tokenizers that put a space before a text


def test_sentencepiece_makes_the_ids_of_transformers(llama2: Tokenizer, tmp_path: Path) -> None:
    for name in ("llama2", "vicuna", "alpaca"):
        made = llama2.with_chat_template(name)
        made.save(tmp_path / name)
        for talk in (PLAIN, PLAIN[:1], QUESTION[2:]):
            prompt = talk[-1]["role"] == "user"
            theirs = in_transformers(tmp_path / name, talk, add_generation_prompt=prompt)
            if name != "alpaca":  # whose answer begins a line: there generation cuts where a token would span
                assert made.apply_chat_template(talk, add_generation_prompt=prompt) == theirs
            assert made.decode(made.apply_chat_template(talk, add_generation_prompt=prompt)) == made.decode(theirs)


def test_a_continued_text_gets_no_space(llama2: Tokenizer, small: Tokenizer) -> None:
    first, rest = "The height of", " his glory"
    assert llama2.encode(first) + llama2.encode(rest, continued=True) == llama2.encode(first + rest)
    assert llama2.encode(rest, continued=True) != llama2.encode(rest)
    parts = small.vocabulary
    spaced = Tokenizer(Vocabulary("bpe", parts.tokens, PATTERNS["gpt2"], parts.merges, prefix_space=True))
    assert spaced.decode(spaced.encode("cat")) == " cat"
    assert spaced.decode(spaced.encode("cat", continued=True)) == "cat"
    assert small.encode("cat", continued=True) == small.encode("cat")


# ---- the door of the room


def test_opening_the_room_waits_for_nothing_heavy() -> None:
    heavy = ("numba", "jinja2", "sentencepiece", "gguf", "google.protobuf", "rich", "torch", "tiktoken", "tokenizers")
    code = (
        "import sys, groundup.tokenizer as room\n"
        "assert 'numpy' not in sys.modules\n"
        "missing = [name for name in room.__all__ if not hasattr(room, name)]\n"
        f"print(missing, [name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[] []"


def test_a_template_is_one_object(tok: Tokenizer) -> None:
    made = tok.with_chat_template("chatml")
    assert isinstance(made.chat, ChatTemplate)
    assert made.chat is made.chat

"""tokenizer.json files as other models have them: equal to Hugging Face in ids and offsets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError
from groundup.tokenizer import PATTERNS, Tokenizer
from groundup.tokenizer.alphabet import to_characters
from groundup.tokenizer.formats.huggingface import tokenizer_json

tokenizers = pytest.importorskip("tokenizers")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
BARE_BYTE_LEVEL = {**BYTE_LEVEL, "use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# What this Python knows of Unicode, the regex library and Hugging Face's Oniguruma know too.
characters = st.characters(exclude_categories=["Cs", "Cn"])


def split(expression: str, **settings: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False, **settings}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def added(number: int, content: str, special: bool = True, **rules: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **plain, **rules}


def document(
    tokens: Mapping[bytes, int],
    merges: Sequence[tuple[bytes, bytes]],
    added_tokens: Sequence[dict[str, Any]] = (),
    **parts: Any,
) -> dict[str, Any]:
    """A tokenizer.json written by hand, as its model's publisher would have it."""
    settings = dict(parts.pop("model", {}))
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {to_characters(token): number for token, number in tokens.items()} | settings.pop("extra", {}),
        "merges": [[to_characters(left), to_characters(right)] for left, right in merges],
        **settings,
    }
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added_tokens)}
    defaults = {"normalizer": None, "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL}
    return {**whole, **defaults, **parts, "model": model}


def both(folder: Path, content: dict[str, Any]) -> tuple[Tokenizer, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer.load(file), tokenizers.Tokenizer.from_file(str(file))


@pytest.fixture(scope="module")
def gpt2_parts(gpt2: Tokenizer) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    tokens = {gpt2.token_bytes(number): number for number in range(50256)}
    return tokens, [(gpt2.token_bytes(left), gpt2.token_bytes(right)) for left, right in gpt2.merges]


Maker = Callable[..., tuple[Tokenizer, Any]]


@pytest.fixture(scope="module")
def make(gpt2_parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Writes a tokenizer.json over GPT-2's vocabulary with the parts given, and opens it with us and with them."""

    def build(added_tokens: Sequence[dict[str, Any]] = (), **parts: Any) -> tuple[Tokenizer, Any]:
        content = document(*gpt2_parts, [added(50256, "<|endoftext|>"), *added_tokens], **parts)
        return both(tmp_path_factory.mktemp("made"), content)

    return build


KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama3": {
        "pre_tokenizer": sequence(split(LLAMA3), BARE_BYTE_LEVEL),
        "model": {"ignore_merges": True},
    },
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence(split(QWEN2), BARE_BYTE_LEVEL),
        "added_tokens": [added(50257, "<|im_start|>"), added(50258, "<tool_call>", special=False)],
    },
    "gpt-neox": {
        "normalizer": {"type": "NFC"},
        "added_tokens": [added(50257 + n, " " * (12 - n), special=False, normalized=True) for n in range(11)],
    },
    "starcoder": {
        "pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
    },
    "runs of digits": {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL)},
    "nfkd": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}]},
        "added_tokens": [added(50257, "éé", special=False, normalized=True), added(50258, "ﬁﬁ", special=False)],
    },
    "prefix space": {
        "pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True},
        "added_tokens": [added(50257, "<x>", special=False)],
    },
    "no pattern": {"pre_tokenizer": BARE_BYTE_LEVEL},
    "removed but for matches": {
        "pre_tokenizer": sequence(split(LLAMA3, behavior="Removed", invert=True), BARE_BYTE_LEVEL)
    },
    "a string": {"pre_tokenizer": sequence({**split(""), "pattern": {"String": "."}}, BARE_BYTE_LEVEL)},
    "greedy tokens": {
        "added_tokens": [
            added(50257, "<l>", lstrip=True),
            added(50258, "<r>", special=False, rstrip=True),
            added(50259, "<lr>", special=False, lstrip=True, rstrip=True, normalized=True),
            added(50260, " y", special=False),
            added(50261, "w中rd", special=False, single_word=True),
            added(50262, "<l>x", special=False),
        ],
    },
    "parts of the vocabulary": {  # tokens that merging makes as well, and a byte of its own beside the alphabet's
        "added_tokens": [
            added(262, " the", special=False) | {"content": "the", "id": 1169},
            added(64, "a", special=False),
            added(50257, "\n", special=False),
        ],
    },
    "gaps": {
        "model": {"extra": {"<|endoftext|>": 50256, "<|far|>": 60000, "<|farther|>": 60007}},
        "added_tokens": [added(60000, "<|far|>"), added(60007, "<|farther|>", special=False), added(60008, "<|next|>")],
    },
}

SNIPPETS = [
    *(
        "<|endoftext|>",
        "<|im_start|>",
        "<tool_call>",
        "<x>",
        "<l>",
        "<r>",
        "<lr>",
        " y",
        "w中rd",
        "<l>x",
        "éé",
        "ﬁﬁ",
        "<|far|>",
    ),
    *("  ", "    ", "             ", "\n", "\r\n", "\t", "it's", "'LL", "123456", "1 2", "  7", "x\u0301", "e\u0301"),
    *(
        "ﬁ",
        "①",
        "가",
        "각",
        "naïve",
        "中文",
        "👋🏽",
        " the",
        "the",
        "def f(x):",
        "\u2028",
        "\u00a0",
        ".",
        "Ω",
        "\u0344",
    ),
]
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(characters, max_size=8), max_size=12).map("".join)


@pytest.fixture(scope="module")
def pairs(make: Maker) -> Callable[[str], tuple[Tokenizer, Any]]:
    made: dict[str, tuple[Tokenizer, Any]] = {}

    def get(kind: str) -> tuple[Tokenizer, Any]:
        if kind not in made:
            made[kind] = make(**KINDS[kind])
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_hugging_faces_on_any_text(pairs: Callable[[str], tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = pairs(kind)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(texts)
    def check(text: str) -> None:
        found = theirs.encode(text, add_special_tokens=False)
        ids = ours.encode(text, allow_special="all")
        assert ids == found.ids
        with_offsets, offsets = ours.encode_with_offsets(text, allow_special="all")
        assert with_offsets == ids
        if kind not in ("nfkd", "qwen2", "gpt-neox"):
            assert offsets == found.offsets
        if kind != "nfkd":  # where they write an added token decomposed
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        plain = ours.encode(text)
        assert not set(plain) & set(ours.special_tokens.values())
        assert ours.encode_batch([text, "x", text]) == [plain, ours.encode("x"), plain]
        array, ends = ours.encode_array([text, "", text])
        assert array.tolist() == plain * 2
        assert ends.tolist() == [0, len(plain), len(plain), 2 * len(plain)]

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_imported_is_written_and_read_equal(
    pairs: Callable[[str], tuple[Tokenizer, Any]], kind: str, tmp_path: Path, code: list[str]
) -> None:
    ours, theirs = pairs(kind)
    ours.save(tmp_path)
    again, peer = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.fingerprint == ours.fingerprint
    for text in ["".join(SNIPPETS), " ".join(SNIPPETS), *code[:3]]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert again.encode(text, allow_special="all") == ids
        assert peer.encode(text, add_special_tokens=False).ids == ids


def test_tokens_that_the_post_processor_puts_around(make: Maker, tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<s>": {"id": "<s>", "ids": [50257], "tokens": ["<s>"]},
            "</s>": {"id": "</s>", "ids": [50258], "tokens": ["</s>"]},
        },
    }
    names = [added(50257, "<s>"), added(50258, "</s>")]
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 50258], "cls": ["<s>", 50257], "trim_offsets": True}
    roberta["add_prefix_space"] = False
    for processor in (template, {"type": "Sequence", "processors": [BYTE_LEVEL, template]}, roberta):
        ours, theirs = make(names, post_processor=processor)
        assert ours.encode("a text", add_special=True) == theirs.encode("a text").ids
        assert ours.encode("a text") == theirs.encode("a text", add_special_tokens=False).ids
        ours.save(tmp_path)
        peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert peer.encode("a text").ids == Tokenizer.load(tmp_path).encode("a text", add_special=True)


def test_offsets_of_normalized_text_cover_what_it_came_from(make: Maker) -> None:
    ours, theirs = make(normalizer={"type": "NFC"})
    for text in ("ae\u0301b", "o\u0308\u0301 x", "\u1112\u1161\u11ab", "a\u0323\u0302"):
        assert ours.encode_with_offsets(text) == (theirs.encode(text).ids, theirs.encode(text).offsets)
    ours, theirs = make(normalizer={"type": "NFKD"})
    for text in ("aéb", "ﬁ ① ㎏x", "가나다", "b\u0344c"):
        assert ours.encode_with_offsets(text) == (theirs.encode(text).ids, theirs.encode(text).offsets)


def test_the_chat_template_and_the_ends_of_text_come_along(make: Maker, tmp_path: Path) -> None:
    ours, _ = make([added(50257, "<s>"), added(50258, "</s>")])
    ours.save(tmp_path)
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = Tokenizer.load(tmp_path)
    assert (tok.vocabulary.bos_token, tok.vocabulary.eos_token, tok.chat_template) == ("<s>", "</s>", "{{ x }}")
    assert tok.end_of_text_id == 50256
    tok.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").vocabulary == tok.vocabulary
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "nobody", "chat_template": named}))
    tok = Tokenizer.load(tmp_path)
    assert (tok.vocabulary.eos_token, tok.chat_template) == (None, "d")
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert Tokenizer.load(tmp_path).chat_template == "from its own file"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(GroundupError, match="tokenizer configuration is damaged"):
        Tokenizer.load(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.lists(characters.filter(lambda c: c != "\n"), min_size=1, max_size=9, unique=True), texts)
def test_added_tokens_of_any_name(gpt2_json: dict[str, Any], names: list[str], text: str) -> None:
    tokens = ["".join(names[:2]), "".join(names[2:5]), "".join(names[5:])]
    tokens = [name for name in dict.fromkeys(tokens) if name]
    vocab = gpt2_json["model"]["vocab"]
    assume(not any(name in vocab for name in tokens))
    content = {**gpt2_json, "added_tokens": [added(256 + n, name, n % 2 == 0) for n, name in enumerate(tokens)]}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ours, _ = both(Path(folder), content)
    mixed = text + tokens[0] + text[:3] + tokens[-1]
    assert ours.encode(mixed, allow_special="all") == theirs.encode(mixed).ids


@pytest.fixture(scope="module")
def gpt2_json() -> dict[str, Any]:
    """Bytes alone, so that it is opened quickly."""
    return document({bytes([byte]): byte for byte in range(256)}, [])


def test_two_tokens_that_would_be_written_alike_are_refused(small: Tokenizer) -> None:
    from dataclasses import replace

    size = small.vocab_size
    parts = replace(small.vocabulary, tokens=(*small.vocabulary.tokens, b"\xc4\xa0the"), special_tokens={"Ġthe": size})
    assert b" the" in small.vocabulary.tokens
    with pytest.raises(GroundupError, match=f"writes the tokens .* and {size} alike, as 'Ġthe'"):
        tokenizer_json(parts)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "the normalizer is Lowercase; only NFC"),
    "two normal forms": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace"}]}},
        r"the normalizer is NFC \+ Replace",
    ),
    "words": ({"pre_tokenizer": {"type": "Whitespace"}}, "the pre-tokenizer is Whitespace; only ByteLevel"),
    "punctuation too": (
        {"pre_tokenizer": sequence({"type": "Punctuation"}, BYTE_LEVEL, {"type": "Digits"})},
        r"Punctuation \+ ByteLevel \+ Digits",
    ),
    "two splits": ({"pre_tokenizer": sequence(split("a"), split("b"), BARE_BYTE_LEVEL)}, r"Split \+ Split"),
    "two expressions": ({"pre_tokenizer": sequence(split("a"), BYTE_LEVEL)}, "by one expression .* not by two"),
    "removed": ({"pre_tokenizer": sequence(split("a", behavior="Removed"), BARE_BYTE_LEVEL)}, "behavior is Removed"),
    "removed between matches": (
        {"pre_tokenizer": sequence(split("a", behavior="Removed", invert=True), BARE_BYTE_LEVEL)},
        "behavior is Removed",
    ),
    "another dialect": ({"pre_tokenizer": sequence(split("^a|b"), BARE_BYTE_LEVEL)}, "of a dialect"),
    "prefix space in every chunk": (
        {"pre_tokenizer": sequence(split("a"), {**BARE_BYTE_LEVEL, "add_prefix_space": True})},
        "add_prefix_space is not supported after Split",
    ),
    "dropout": ({"model": {"dropout": 0.1}}, "model.dropout = 0.1"),
    "byte fallback": ({"model": {"byte_fallback": True}}, "pass its tokenizer.model"),
    "another post-processor": ({"post_processor": {"type": "Dropper"}}, "post_processor Dropper"),
    "an id from nowhere": (
        {"post_processor": {"type": "BertProcessing", "sep": ["x", 99], "cls": ["y", 99999]}},
        "adds the id 99999",
    ),
    "a shared id": ({"added_tokens": [added(256, "<a>"), added(256, "<b>")]}, "the added token '<b>' has the id 256"),
    "a taken id": ({"added_tokens": [added(5, "<a>")], "model": {"extra": {"<a>": 5}}}, "the id 5 is used twice"),
    "a huge id": ({"model": {"extra": {"ab": 10**12}}}, "1000000000000 is not a token id"),
    "a negative id": ({"model": {"extra": {"ab": -1}}}, "-1 is not a token id"),
    "an id that is text": ({"added_tokens": [added("256", "<a>")]}, "'256' is not a token id"),  # type: ignore
    "an id that its readers would not give": (
        {"added_tokens": [added(300, "<a>")]},
        "the added token '<a>' has the id 300, but .* as 256",
    ),
    "no name": ({"added_tokens": [added(300, "")]}, "the added token 300 is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_exactly_is_refused(tmp_path: Path, name: str) -> None:
    parts, reason = REFUSED[name]
    content = document({bytes([byte]): byte for byte in range(256)}, [], **parts)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(GroundupError, match=r"tokenizer\.json: .*" + reason) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_patterns_are_the_published_ones() -> None:
    assert PATTERNS["gpt4"] == LLAMA3

"""tokenizer.json: byte-level BPE, words and characters as Hugging Face ``tokenizers`` writes and reads them.

What is written encodes identically there. What is read is read exactly: a file with a setting that would change ids
and is not known here is refused, never read wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from groundup.runtime.errors import GroundupError, UsageError, os_errors
from groundup.runtime.files import read_json, write_atomic, write_json
from groundup.tokenizer.alphabet import from_characters, to_characters
from groundup.tokenizer.formats.common import (
    UnreadableError,
    check_merges,
    check_tokens,
    config_beside,
    place_tokens,
    reading,
)
from groundup.tokenizer.lookup import CHARACTER
from groundup.tokenizer.pretokenize import PATTERNS, Splitter
from groundup.tokenizer.vocabulary import END_OF_TEXT, NORMALIZATIONS, Normalization, Vocabulary

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

_WHOLE = r"[\s\S]+"
# GPT-2's pattern after the digits were cut out: each alone, or run by run. A digit ends the text before it, so white
# space before one is not divided.
_GPT2_WITHOUT_DIGITS = PATTERNS["gpt2"].replace(r" ?\p{N}+|", "").replace(r"\s+(?!\S)", r"\s+(?![^\s\p{N}])")
DIGITS = rf"\p{{N}}|{_GPT2_WITHOUT_DIGITS}"
_DIGIT_RUNS = rf"\p{{N}}+|{_GPT2_WITHOUT_DIGITS}"
# Oniguruma reads these in another way than the regex library does.
_OTHER_DIALECT = re.compile(r"(?<![\\\[])[\^$]|&&|\\[hHRXGZ]|\[\[:")
_RULES = ("single_word", "lstrip", "rstrip", "normalized")


# ---- writing


def write(folder: Path, vocabulary: Vocabulary) -> None:
    """Write tokenizer.json and tokenizer_config.json into ``folder``, each whole or not at all.

    Args:
        folder: where they go.
        vocabulary: not SentencePiece; with its merges, where it is byte-pair encoding.

    Raises:
        GroundupError: the place cannot be written, or the format cannot hold the vocabulary.
    """
    write_json(folder / TOKENIZER_FILE, tokenizer_json(vocabulary))
    write_config(folder, vocabulary, {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_config(folder: Path, vocabulary: Vocabulary, settings: Mapping[str, Any]) -> None:
    """Write tokenizer_config.json: ``settings``, the tokens that begin and end a text, and the chat template.

    Raises:
        GroundupError: the place cannot be written.
    """
    config: dict[str, Any] = {**settings, "clean_up_tokenization_spaces": False, **named_tokens(vocabulary)}
    beside = folder / TEMPLATE_FILE
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    # Readers take the template of this file before the other: what an earlier tokenizer left must not win.
    if beside.exists():
        if vocabulary.chat_template is not None:
            write_atomic(beside, vocabulary.chat_template)
        else:
            with os_errors(beside, "cannot remove"):
                beside.unlink()
    write_json(folder / CONFIG_FILE, config)


def named_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    """The special tokens that have a part to play, by the name that the configuration and chat templates give them.

    Where no file said which they are, ``<|endoftext|>`` begins and ends a text.
    """
    end_of_text = END_OF_TEXT if END_OF_TEXT in vocabulary.special_tokens else None
    unknown = vocabulary.tokens[vocabulary.unknown].decode() if vocabulary.unknown is not None else None
    found = {
        "bos_token": vocabulary.bos_token or (None if vocabulary.eos_token else end_of_text),
        "eos_token": vocabulary.eos_token or end_of_text,
        "unk_token": unknown if unknown in vocabulary.special_tokens else None,
    }
    return {role: name for role, name in found.items() if name is not None}


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of tokenizer.json.

    Raises:
        GroundupError: two tokens would be written alike.
    """
    names = {number: name for name, number in (*vocabulary.added_tokens.items(), *vocabulary.special_tokens.items())}
    as_text = vocabulary.kind != "bpe"
    written = [
        names.get(number) or (token.decode() if as_text else to_characters(token))
        for number, token in enumerate(vocabulary.tokens)
    ]
    ids: dict[str, int] = {}
    for number, text in enumerate(written):
        if text and ids.setdefault(text, number) != number:
            raise GroundupError(
                f"tokenizer.json writes the tokens {ids[text]} and {number} alike, as '{text}'. "
                "Rename the special or added token of the two."
            )
    return {
        **shared_parts(vocabulary, written),
        "normalizer": {"type": vocabulary.normalization} if vocabulary.normalization else None,
        "pre_tokenizer": _written_pre_tokenizer(vocabulary),
        "decoder": {"type": "Fuse"} if as_text else _BYTE_LEVEL,
        "model": _written_words(vocabulary, ids) if as_text else _written_bpe(vocabulary, written, ids),
    }


def added_entries(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The list ``added_tokens`` of a tokenizer.json."""
    names = {**vocabulary.added_tokens, **vocabulary.special_tokens}
    return [
        {"id": number, "content": name, "special": name in vocabulary.special_tokens}
        | {rule: rule in vocabulary.token_rules.get(name, ()) for rule in _RULES}
        for name, number in sorted(names.items(), key=lambda entry: entry[1])
    ]


def shared_parts(vocabulary: Vocabulary, written: Sequence[str]) -> dict[str, Any]:
    """The parts of a tokenizer.json that do not depend on the algorithm.

    Args:
        vocabulary: any.
        written: each token by id as the file writes it.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_entries(vocabulary),
        "post_processor": _written_post_processor(vocabulary, written),
    }


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _written_bpe(vocabulary: Vocabulary, written: Sequence[str], ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": vocabulary.whole_words,
        "vocab": ids,
        "merges": [f"{written[left]} {written[right]}" for left, right in vocabulary.merges or ()],
    }


def _written_words(vocabulary: Vocabulary, ids: Mapping[str, int]) -> dict[str, Any]:
    assert vocabulary.unknown is not None
    return {"type": "WordLevel", "vocab": ids, "unk_token": vocabulary.tokens[vocabulary.unknown].decode()}


def _written_pre_tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False}
    if vocabulary.kind != "bpe":
        return split
    if vocabulary.prefix_space:
        if vocabulary.pattern not in (PATTERNS["gpt2"], _WHOLE):
            raise GroundupError("tokenizer.json has no way to write a space before text that another pattern cuts.")
        return {**_BYTE_LEVEL, "add_prefix_space": True, "use_regex": vocabulary.pattern != _WHOLE}
    return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]}


def _written_post_processor(vocabulary: Vocabulary, written: Sequence[str]) -> dict[str, Any] | None:
    if not vocabulary.prefix and not vocabulary.suffix:
        return None

    def around(text: str, type_id: int) -> list[dict[str, Any]]:
        return [
            *({"SpecialToken": {"id": written[number], "type_id": type_id}} for number in vocabulary.prefix),
            {"Sequence": {"id": text, "type_id": type_id}},
            *({"SpecialToken": {"id": written[number], "type_id": type_id}} for number in vocabulary.suffix),
        ]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            written[number]: {"id": written[number], "ids": [number], "tokens": [written[number]]}
            for number in (*vocabulary.prefix, *vocabulary.suffix)
        },
    }


# ---- reading


def read(path: Path) -> Vocabulary:
    """Read a tokenizer.json, and from the tokenizer_config.json beside it the chat template and the like.

    Raises:
        GroundupError: the file cannot be read, is damaged, is of another kind, or has a setting that is not supported;
            the message names the file and the setting.
    """
    document = read_json(path, "tokenizer")
    with reading(path, TOKENIZER_FILE):
        vocabulary = _vocabulary(document)
    return config_beside(path, vocabulary)


def is_sentencepiece(path: Path) -> bool:
    """Whether a tokenizer.json was made from a SentencePiece model."""
    document = read_json(path, "tokenizer")
    model = document.get("model") if isinstance(document, dict) else None
    return isinstance(model, dict) and (model.get("type") == "Unigram" or bool(model.get("byte_fallback")))


class Added(NamedTuple):
    """The added tokens of a file, by name."""

    special: dict[str, int]
    others: dict[str, int]
    rules: dict[str, tuple[str, ...]]


def added_tokens(entries: Sequence[Mapping[str, Any]]) -> Added:
    """The list ``added_tokens`` of a tokenizer.json.

    Raises:
        UnreadableError: a token is empty, or has two ids.
    """
    found = Added({}, {}, {})
    for entry in entries:
        name, number = entry["content"], entry["id"]
        if not name:
            raise UnreadableError(f"the added token {number} is empty")
        if {**found.special, **found.others}.get(name, number) != number:
            raise UnreadableError(f"the token {name!r} has two ids")
        (found.special if entry.get("special") else found.others)[name] = number
        if rules := tuple(rule for rule in _RULES if entry.get(rule)):
            found.rules[name] = rules
    return found


def _vocabulary(document: dict[str, Any]) -> Vocabulary:
    model = document["model"]
    added = added_tokens(document.get("added_tokens") or [])
    names = added.special | added.others
    for name, number in names.items():
        if model["vocab"].get(name, number) != number:
            raise UnreadableError(f"the token {name!r} has two ids, {model['vocab'][name]} and {number}")
    _check_numbering(document.get("added_tokens") or [], model["vocab"])
    prefix, suffix = _around(document.get("post_processor"))
    shared: dict[str, Any] = {
        "special_tokens": added.special,
        "added_tokens": added.others,
        "token_rules": added.rules,
        "normalization": _normalization(document.get("normalizer")),
        "prefix": prefix,
        "suffix": suffix,
    }
    if model["type"] == "BPE":
        vocabulary = _bpe(model, document["pre_tokenizer"], names, shared)
    elif model["type"] == "WordLevel":
        vocabulary = _words(model, document["pre_tokenizer"], names, shared)
    else:
        raise UnreadableError(
            f"the model is {model['type']}; only byte-level BPE and WordLevel can be read. "
            "For a SentencePiece model pass its tokenizer.model"
        )
    for number in (*prefix, *suffix):
        if not 0 <= number < len(vocabulary.tokens) or not vocabulary.tokens[number]:
            raise UnreadableError(f"the post_processor adds the id {number}, which no token has")
    return vocabulary


def _check_numbering(entries: Sequence[Mapping[str, Any]], vocab: Mapping[str, int]) -> None:
    """See that added tokens outside the model's vocabulary have the ids that ``tokenizers`` would give them.

    It counts on from the highest there is, and passes over what the file says.
    """
    highest = len(vocab) - 1
    for entry in entries:
        name, number = entry["content"], entry["id"]
        if not isinstance(number, int):
            raise UnreadableError(f"{number!r} is not a token id")
        if name not in vocab and number != highest + 1:
            raise UnreadableError(
                f"the added token {name!r} has the id {number}, but Hugging Face tokenizers would read it as "
                f"{highest + 1}, the next one; which of them the model was trained with is not to be seen"
            )
        highest = max(highest, number)


def _bpe(
    model: dict[str, Any], pre_tokenizer: dict[str, Any] | None, names: Mapping[str, int], shared: dict[str, Any]
) -> Vocabulary:
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            hint = ". For a SentencePiece model pass its tokenizer.model" if setting == "byte_fallback" else ""
            raise UnreadableError(f"model.{setting} = {model[setting]!r} is not supported{hint}")
    ordinary = {
        written: number for written, number in model["vocab"].items() if written not in shared["special_tokens"]
    }
    merges = check_merges(model["merges"], ordinary)
    made = {ordinary["".join(merge.split(" ") if isinstance(merge, str) else merge)] for merge in model["merges"]}
    bytes_by_id: dict[int, bytes] = {}
    for written, number in ordinary.items():
        token = from_characters(written)
        if written in names and number not in made and not (token and len(token) == 1):
            continue  # found in text by its name only
        if not token:
            raise UnreadableError(f"the token {written!r} is not byte-level text; only byte-level BPE can be read")
        if number in bytes_by_id:
            raise UnreadableError(f"the id {number} is used twice")
        bytes_by_id[number] = token
    tokens = place_tokens(bytes_by_id, names)
    pattern, prefix_space = _cutting(pre_tokenizer)
    vocabulary = Vocabulary(
        "bpe",
        tokens,
        pattern,
        merges,
        whole_words=bool(model.get("ignore_merges")),
        prefix_space=prefix_space,
        **shared,
    )
    check_tokens(vocabulary)
    return vocabulary


def _words(
    model: dict[str, Any], pre_tokenizer: dict[str, Any] | None, names: Mapping[str, int], shared: dict[str, Any]
) -> Vocabulary:
    unknown = model["vocab"].get(model["unk_token"])
    if unknown is None:
        raise UnreadableError(f"its unknown token, {model['unk_token']!r}, is not in the vocabulary")
    if pre_tokenizer is None or pre_tokenizer["type"] != "Split":
        found = pre_tokenizer and pre_tokenizer["type"]
        raise UnreadableError(f"the pre-tokenizer is {found}; only a Split can be read for words and characters")
    pattern = _split_expression(pre_tokenizer)
    by_id: dict[int, bytes] = {}
    for word, number in model["vocab"].items():
        if word in names:
            continue
        if not word or number in by_id:
            raise UnreadableError(f"the id {number} is used twice, or its word is empty")
        by_id[number] = word.encode()
    kind: Literal["characters", "words"] = "characters" if pattern == CHARACTER else "words"
    # The unknown token need not be one that is looked for in text; it is never made from text but as unknown.
    return Vocabulary(kind, place_tokens(by_id, names), pattern, unknown=unknown, **shared)


def _normalization(normalizer: dict[str, Any] | None) -> Normalization | None:
    """The one Unicode normal form that a normalizer asks for."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kinds = [step["type"] for step in steps]
    if not kinds:
        return None
    if len(kinds) > 1 or kinds[0] not in NORMALIZATIONS:
        raise UnreadableError(f"the normalizer is {' + '.join(kinds)}; only {', '.join(NORMALIZATIONS)} can be read")
    return kinds[0]


def _cutting(pre_tokenizer: dict[str, Any] | None) -> tuple[str, bool]:
    """One regular expression that cuts as the pre-tokenizer does, and whether a space comes before text."""
    steps = _flat(pre_tokenizer)
    kinds = [step["type"] for step in steps]
    byte_level = steps[-1] if kinds and kinds[-1] == "ByteLevel" else None
    if byte_level is None or kinds[:-1] not in ([], ["Split"], ["Digits"]):
        raise UnreadableError(
            f"the pre-tokenizer is {' + '.join(kinds) or None}; only ByteLevel, alone or after one Split or Digits, "
            "can be read"
        )
    cuts_like_gpt2 = byte_level.get("use_regex", True)
    prefix_space = bool(byte_level.get("add_prefix_space"))
    if kinds == ["ByteLevel"]:
        return PATTERNS["gpt2"] if cuts_like_gpt2 else _WHOLE, prefix_space
    if prefix_space:
        raise UnreadableError(f"the pre-tokenizer's add_prefix_space is not supported after {kinds[0]}")
    if kinds[0] == "Digits":
        if not cuts_like_gpt2:
            raise UnreadableError("a pre-tokenizer of Digits and ByteLevel without use_regex is not supported")
        return DIGITS if steps[0].get("individual_digits") else _DIGIT_RUNS, False
    if cuts_like_gpt2:
        raise UnreadableError("only a pre-tokenizer that cuts text by one expression can be read, not by two")
    return _split_expression(steps[0]), False


def _flat(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _flat(inner)]
    return [pre_tokenizer]


def _split_expression(split: dict[str, Any]) -> str:
    pattern = split["pattern"]
    expression = str(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern["String"])
    # What lies between the matches is removed; but these match every character, so nothing does.
    complete = split["behavior"] == "Removed" and split.get("invert") and expression in PATTERNS.values()
    if split["behavior"] != "Isolated" and not complete:
        raise UnreadableError(f"a Split whose behavior is {split['behavior']} is not supported; only Isolated is")
    if expression not in PATTERNS.values() and _OTHER_DIALECT.search(expression):
        raise UnreadableError(f"the expression {expression!r} is of a dialect that would cut in other places here")
    try:
        Splitter(expression)
    except UsageError as error:  # for the file, not for a person who typed it
        raise UnreadableError(str(error).removesuffix(".")) from error
    return expression


def _around(post_processor: dict[str, Any] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post-processor puts before and after one text."""
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    steps = [] if post_processor is None else post_processor.get("processors", [post_processor])
    for step in steps:
        if step["type"] == "ByteLevel":  # which changes offsets only
            continue
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            prefix, suffix = (step["cls"][1], *prefix), (*suffix, step["sep"][1])
            continue
        if step["type"] != "TemplateProcessing":
            raise UnreadableError(f"the post_processor {step['type']} is not supported")
        before: list[int] = []
        after: list[int] = []
        seen = 0
        for part in step["single"]:
            if "Sequence" in part:
                seen += 1
            else:
                (after if seen else before).extend(step["special_tokens"][part["SpecialToken"]["id"]]["ids"])
        if seen != 1:
            raise UnreadableError("the post_processor does not hold the text once")
        prefix, suffix = (*before, *prefix), (*suffix, *after)
    return prefix, suffix

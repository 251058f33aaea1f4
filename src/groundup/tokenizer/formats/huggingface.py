"""tokenizer.json: byte-level BPE as Hugging Face ``tokenizers`` writes and reads it.

What is written encodes identically there. What is read must be byte-level BPE without a normalizer or any
other setting that would change ids; a file that needs more is refused, never read wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from groundup.runtime.errors import GroundupError
from groundup.runtime.files import read_json, write_json
from groundup.tokenizer.alphabet import from_characters, to_characters
from groundup.tokenizer.pretokenize import PATTERNS

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


class Parts(NamedTuple):
    """What a tokenizer consists of."""

    pattern: str
    """The regular expression that cuts text into chunks."""
    vocabulary: Sequence[bytes]
    """The bytes of each token by id; for a special token, its name."""
    merges: Sequence[tuple[int, int]]
    """Pairs of ids in the order they were learned."""
    special_tokens: Mapping[str, int]
    """Names and ids of the tokens that ordinary text never becomes."""


def write(folder: Path, parts: Parts, end_of_text: str | None) -> None:
    """Write tokenizer.json and tokenizer_config.json into ``folder``, each whole or not at all.

    Args:
        end_of_text: the special token that separates documents, if there is one: transformers' eos and bos
            token.

    Raises:
        GroundupError: the place cannot be written.
    """
    write_json(folder / TOKENIZER_FILE, tokenizer_json(parts))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if end_of_text is not None:
        config |= {"bos_token": end_of_text, "eos_token": end_of_text}
    write_json(folder / CONFIG_FILE, config)


def tokenizer_json(parts: Parts) -> dict[str, Any]:
    """The content of tokenizer.json."""
    names = {number: name for name, number in parts.special_tokens.items()}
    written = [names.get(number) or to_characters(token) for number, token in enumerate(parts.vocabulary)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for number, name in sorted(names.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": parts.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: number for number, text in enumerate(written)},
            "merges": [f"{written[left]} {written[right]}" for left, right in parts.merges],
        },
    }


def read(path: Path) -> Parts:
    """Read a tokenizer.json.

    Every added token becomes a special token. A post-processor (which puts tokens around a text) is not read.

    Raises:
        GroundupError: the file cannot be read, is damaged, is not byte-level BPE, or has a setting that is
            not supported; the message names the file and the setting.
    """
    document = read_json(path, "tokenizer")
    try:
        return _parts(document)
    except _UnreadableError as error:
        raise GroundupError(f"{path}: {error}.") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise GroundupError(f"{path}: this is not a whole tokenizer.json ({reason}).") from error


class _UnreadableError(Exception):
    """The document is not one that can be read; the message says why."""


def _parts(document: dict[str, Any]) -> Parts:
    model = document["model"]
    if model["type"] != "BPE":
        raise _UnreadableError(f"the model is {model['type']}, not BPE; only byte-level BPE can be read")
    for setting in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ):
        if model.get(setting):
            raise _UnreadableError(f"model.{setting} = {model[setting]!r} is not supported")
    if document.get("normalizer") is not None:
        raise _UnreadableError("it has a normalizer, which is not supported")
    special_tokens = _special_tokens(document.get("added_tokens") or [])
    ids = _ordinary_ids(model["vocab"], special_tokens)
    return Parts(
        pattern=_pattern(document["pre_tokenizer"]),
        vocabulary=_vocabulary(ids, special_tokens),
        merges=_merges(model["merges"], ids),
        special_tokens=special_tokens,
    )


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression behind a ByteLevel step, alone or after one Split step."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [step and step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise _UnreadableError(f"the pre-tokenizer is {kinds}; only ByteLevel, alone or after one Split, can be read")
    *split, byte_level = steps
    if byte_level.get("add_prefix_space"):
        raise _UnreadableError("the pre-tokenizer's add_prefix_space is not supported")
    cuts_like_gpt2 = byte_level.get("use_regex", True)
    if cuts_like_gpt2 and not split:
        return PATTERNS["gpt2"]
    expression = split[0]["pattern"].get("Regex") if split else None
    if cuts_like_gpt2 or expression is None or split[0]["behavior"] != "Isolated" or split[0].get("invert"):
        raise _UnreadableError("only a pre-tokenizer that cuts text by one Isolated Regex can be read")
    return str(expression)


def _special_tokens(added_tokens: list[dict[str, Any]]) -> dict[str, int]:
    for token in added_tokens:
        for setting in ("single_word", "lstrip", "rstrip"):
            if token.get(setting):
                raise _UnreadableError(f"the added token {token['content']!r} has {setting}, which is not supported")
    return {token["content"]: token["id"] for token in added_tokens}


def _ordinary_ids(vocab: dict[str, int], special_tokens: dict[str, int]) -> dict[str, int]:
    """Ids of the ordinary tokens, as written. With the special tokens they must fill 0 to n - 1."""
    for name, number in special_tokens.items():
        if vocab.get(name, number) != number:
            raise _UnreadableError(f"the token {name!r} has two ids, {vocab[name]} and {number}")
    ids = {written: number for written, number in vocab.items() if written not in special_tokens}
    found = sorted([*ids.values(), *special_tokens.values()])
    for expected, number in enumerate(found):
        if number != expected:
            raise _UnreadableError(
                f"the token ids must be 0 to {len(found) - 1}, each once; around {expected} they are not"
            )
    return ids


def _vocabulary(ids: dict[str, int], special_tokens: dict[str, int]) -> list[bytes]:
    tokens = [b""] * (len(ids) + len(special_tokens))
    for name, number in special_tokens.items():
        tokens[number] = name.encode()
    for written, number in ids.items():
        token = from_characters(written)
        if not token:
            raise _UnreadableError(f"the token {written!r} is not byte-level text; only byte-level BPE can be read")
        tokens[number] = token
    for byte in range(256):
        if to_characters(bytes([byte])) not in ids:
            raise _UnreadableError(f"byte {byte} has no token; only byte-level BPE over all 256 bytes can be read")
    return tokens


def _merges(merges: list[Any], ids: dict[str, int]) -> list[tuple[int, int]]:
    """Merges as pairs of ids; a file holds them as ``"left right"`` or, newer, as two strings."""
    pairs = []
    for number, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        for token in (left, right, left + right):
            if token not in ids:
                raise _UnreadableError(
                    f"merge {number}, {left!r} + {right!r}, needs {token!r}, which is not in the vocabulary"
                )
        pairs.append((ids[left], ids[right]))
    return pairs

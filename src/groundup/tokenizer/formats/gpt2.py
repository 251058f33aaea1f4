"""GPT-2's own files, ``encoder.json`` (ids) and ``vocab.bpe`` (merges); also ``vocab.json`` and ``merges.txt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from groundup.runtime.errors import UsageError, os_errors
from groundup.runtime.files import read_json
from groundup.tokenizer.alphabet import from_characters
from groundup.tokenizer.formats.common import (
    UnreadableError,
    check_merges,
    check_tokens,
    config_beside,
    place_tokens,
    read_config,
    reading,
)
from groundup.tokenizer.formats.huggingface import Added, added_tokens
from groundup.tokenizer.pretokenize import PATTERNS
from groundup.tokenizer.vocabulary import Vocabulary

FILES = {
    "encoder.json": "vocab.bpe",
    "vocab.json": "merges.txt",
    "vocab.bpe": "encoder.json",
    "merges.txt": "vocab.json",
}
"""Each of the files, and the one that belongs to it."""

_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "RobertaTokenizer", "RobertaTokenizerFast")


def read(path: Path, pattern: str | None = None) -> Vocabulary:
    """Read the pair of files that ``path`` belongs to.

    A token of several characters that no merge makes is special: text could not become it.

    Args:
        path: one of the two.
        pattern: the regular expression that cuts text; None for GPT-2's.

    Raises:
        GroundupError: one of them is missing or damaged.
        UsageError: tokenizer_config.json names another model's tokenizer, and there is no pattern.
    """
    other = path.with_name(FILES[path.name])
    vocab_file, merges_file = (path, other) if path.suffix == ".json" else (other, path)
    config = read_config(path.parent)
    if pattern is None and config.get("tokenizer_class") not in _CLASSES:
        raise UsageError(
            f"{path.parent}: these files of a {config['tokenizer_class']} do not say how text is cut. Give its pattern."
        )
    vocab = read_json(vocab_file, "tokenizer")
    with os_errors(merges_file, "cannot read tokenizer"):
        lines = merges_file.read_bytes()
    added = _added_beside(path.parent, config)
    with reading(vocab_file, "vocabulary"):
        ids: dict[str, int] = dict(vocab.items())
    with reading(merges_file, "list of merges"):
        written = [line for line in lines.decode("utf-8").split("\n") if line and not line.startswith("#version")]
        for number, line in enumerate(written):
            if line.count(" ") != 1:
                raise UnreadableError(
                    f"merge {number}, {line[:40]!r}, is not two tokens; the file is damaged or cut short"
                )
        merges = check_merges(written, ids)
    with reading(vocab_file, "vocabulary"):
        made = {line.replace(" ", "") for line in written}
        special = {name: number for name, number in ids.items() if len(name) > 1 and name not in made}
        special = {name: number for name, number in special.items() if name not in added.others} | added.special
        by_id: dict[int, bytes] = {}
        for name, number in ids.items():
            if name in special or name in added.others:
                continue
            token = from_characters(name)
            if not token or number in by_id:
                raise UnreadableError(f"the token {name!r} is not byte-level text, or its id {number} is used twice")
            by_id[number] = token
        names = special | added.others
        vocabulary = Vocabulary(
            "bpe",
            place_tokens(by_id, names),
            pattern or PATTERNS["gpt2"],
            merges,
            special,
            added.others,
            added.rules,
        )
        check_tokens(vocabulary)
    return config_beside(path, vocabulary)


def _added_beside(folder: Path, config: dict[str, Any]) -> Added:
    """The added tokens that tokenizer_config.json, or an older added_tokens.json, names."""
    with reading(folder / "tokenizer_config.json", "tokenizer configuration"):
        listed = config.get("added_tokens_decoder") or {}
        found = added_tokens([{"id": int(number), **entry} for number, entry in listed.items()])
    older = folder / "added_tokens.json"
    if older.is_file():
        names = read_json(older, "list of added tokens")
        with reading(older, "list of added tokens"):
            for name, number in names.items():
                if name not in found.special and name not in found.others:
                    found.others[name] = number
    return found

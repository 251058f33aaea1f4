"""Other people's vocabularies: which file is of which format, and one reader and writer per format.

huggingface.py (tokenizer.json), tiktoken.py, gpt2.py (encoder.json + vocab.bpe), sentencepiece.py (tokenizer.model),
gguf.py, llama2c.py (tokenizer.bin); fetch.py gets them by name; common.py holds what they share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from groundup.runtime.errors import GroundupError, UsageError, nearest, os_errors
from groundup.runtime.files import sha256_file
from groundup.tokenizer.formats import gguf, gpt2, huggingface, llama2c, sentencepiece, tiktoken
from groundup.tokenizer.formats.fetch import from_hub, from_openai
from groundup.tokenizer.vocabulary import Vocabulary

__all__ = ["named_tokens", "read", "write", "write_tiktoken"]

LARGEST_FILE = 1 << 28  # bytes; the largest vocabularies there are have a tenth of that. GGUF files hold weights too

named_tokens = huggingface.named_tokens
write_tiktoken = tiktoken.write


def write(folder: Path, vocabulary: Vocabulary) -> None:
    """Write a vocabulary as the files that Hugging Face tools open.

    Raises:
        GroundupError: the place cannot be written, or the format cannot hold the vocabulary.
    """
    writer = sentencepiece.write if vocabulary.kind == "sentencepiece" else huggingface.write
    writer(folder, vocabulary)


def read(
    path: str | os.PathLike[str],
    pattern: str | None = None,
    special_tokens: Mapping[str, int] | None = None,
    sha256: str | None = None,
) -> Vocabulary:
    """Read a vocabulary of any known format, fetching it first where ``path`` is a name.

    Args:
        path: see :meth:`groundup.tokenizer.Tokenizer.load`.
        pattern: the regular expression that cuts text; None where the file says.
        special_tokens: names and ids to be special besides those that the file says are.
        sha256: what the file's SHA-256 must be.

    Raises:
        GroundupError: it cannot be had, or cannot be read.
        UsageError: an argument is needed, or does not fit.
    """
    text = os.fspath(path)
    if text.startswith("hf:"):
        file = _file_in(from_hub(text))
    elif text.startswith("openai:") or (text in tiktoken.NAMES and not Path(text).exists()):
        name = text.removeprefix("openai:")
        file = from_openai(name)
        _check_sha256(file, sha256)
        return _with_arguments(tiktoken.read_named(file, name), file, pattern, special_tokens)
    else:
        file = _file_in(Path(path))
    _check_sha256(file, sha256)
    return _with_arguments(_read_file(file, pattern), file, pattern, special_tokens)


def _file_in(path: Path) -> Path:
    """The file of a folder that holds its vocabulary; a file is that itself."""
    if not path.is_dir():
        return path
    document, model = path / huggingface.TOKENIZER_FILE, path / sentencepiece.MODEL_FILE
    if document.is_file():
        # What was made from a SentencePiece model is best read from that.
        return model if model.is_file() and huggingface.is_sentencepiece(document) else document
    for names in (sentencepiece.MODEL_FILE, "encoder.json", "vocab.json"):
        if (path / names).is_file():
            return path / names
    for kind in ("*.tiktoken", "*.model", "*.gguf", llama2c.PATTERN):
        found = sorted(path.glob(kind))
        if len(found) > 1:
            raise UsageError(f"{path}: there are {len(found)} vocabularies ({kind}). Name the file.")
        if found:
            return found[0]
    return document


def _read_file(file: Path, pattern: str | None) -> Vocabulary:
    if not file.exists() and file.name != huggingface.TOKENIZER_FILE:
        raise GroundupError(
            f"{file}: no such file or folder.{nearest(str(file), tiktoken.NAMES)} A tokenizer is a file, a folder, "
            f"hf:owner/name, or one of: {', '.join(tiktoken.NAMES)}."
        )
    with os_errors(file, "cannot read tokenizer"):
        size = file.stat().st_size
    if file.suffix == ".gguf":
        return gguf.read(file, pattern)
    if size > LARGEST_FILE:
        raise GroundupError(f"{file}: {size:,} bytes are too many for a vocabulary. Is it another file?")
    if file.suffix == ".tiktoken":
        return tiktoken.read(file, pattern)
    if file.suffix == ".model":
        return sentencepiece.read(file)
    if file.suffix == llama2c.SUFFIX:
        return llama2c.read(file)
    if file.name in gpt2.FILES:
        return gpt2.read(file, pattern)
    return huggingface.read(file)


def _with_arguments(
    vocabulary: Vocabulary, file: Path, pattern: str | None, special_tokens: Mapping[str, int] | None
) -> Vocabulary:
    """What the caller gave wins over what the file says."""
    if pattern is not None:
        if vocabulary.kind in ("sentencepiece", "characters"):
            raise UsageError(f"{file}: a vocabulary of kind {vocabulary.kind} has no pattern.")
        vocabulary = replace(vocabulary, pattern=pattern)
    tokens = [*vocabulary.tokens]
    for name, number in (special_tokens or {}).items():
        if not 0 <= number < len(tokens) + len(special_tokens or {}) + 100_000:
            raise UsageError(f"special token '{name}': {number} is far from the {len(tokens)} ids of {file}.")
        tokens += [b""] * (number + 1 - len(tokens))
        if tokens[number] not in (b"", name.encode()):
            raise UsageError(f"special token '{name}': the id {number} is that of {tokens[number]!r} in {file}.")
        tokens[number] = name.encode()
    if special_tokens:
        vocabulary = replace(
            vocabulary, tokens=tuple(tokens), special_tokens={**vocabulary.special_tokens, **special_tokens}
        )
    return vocabulary


def _check_sha256(file: Path, expected: str | None) -> None:
    if expected is None:
        return
    found = sha256_file(file)
    if found != expected.lower():
        raise GroundupError(
            f"{file}: not the file it should be (SHA-256 {found[:12]}…, expected {expected.lower()[:12]}…)."
        )

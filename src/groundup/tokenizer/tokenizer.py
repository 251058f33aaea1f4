"""The one public class: train, load, save, encode, decode."""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import regex

from groundup.runtime.console import Progress, progress
from groundup.runtime.errors import GroundupError, UsageError, nearest
from groundup.runtime.files import write_atomic
from groundup.tokenizer import bpe, huggingface
from groundup.tokenizer.alphabet import from_characters
from groundup.tokenizer.describe import vocabulary_dump
from groundup.tokenizer.pretokenize import Splitter, pattern_regex

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_FILE = "vocabulary.txt"


class Tokenizer:
    """Text to token ids and back, by byte-pair encoding over bytes.

    Any text can be encoded, nothing is unknown, and decoding gives it back exactly. Make one with
    :meth:`train` or :meth:`load`.

    Args:
        pattern: the regular expression that cuts text into chunks.
        vocabulary: the bytes of each token by id. All 256 single bytes are in it; a special token's are its
            name.
        merges: pairs of ids, in the order they were learned.
        special_tokens: names and ids of the tokens that text never becomes unless asked for.

    Raises:
        UsageError: the pattern does not compile.
    """

    def __init__(
        self,
        pattern: str,
        vocabulary: Sequence[bytes],
        merges: Sequence[tuple[int, int]],
        special_tokens: Mapping[str, int],
    ) -> None:
        self._parts = huggingface.Parts(pattern, tuple(vocabulary), tuple(merges), dict(special_tokens))
        self._splitter = Splitter(pattern)
        special_ids = set(special_tokens.values())
        ids = {token: number for number, token in enumerate(vocabulary) if number not in special_ids}
        self._typecode: Literal["H", "I"] = "H" if len(vocabulary) <= 1 << 16 else "I"
        self._words = bpe.WordCache(
            byte_ids=[ids[bytes([byte])] for byte in range(256)],
            merges=merges,
            products=[ids[vocabulary[left] + vocabulary[right]] for left, right in merges],
            typecode=self._typecode,
        )

    def __repr__(self) -> str:
        return f"<Tokenizer: {self.vocab_size} tokens, {len(self.special_tokens)} of them special>"

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process is sent the parts, and fills its own word cache.
        return Tokenizer, tuple(self._parts)

    # ---- making, loading, saving

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = "gpt4",
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        min_frequency: int = 2,
        show_progress: bool = True,
    ) -> Tokenizer:
        """Learn a vocabulary from texts. The same texts, in any order, give the same vocabulary.

        The merges are those of Hugging Face's ``BpeTrainer`` for the same pattern.

        Args:
            texts: documents; read once, one at a time.
            vocab_size: how many tokens to stop at, special tokens included. A small text may not have as
                many.
            pattern: how text is cut before merging: gpt2, gpt4 (= cl100k), o200k, or a regular expression.
            special_tokens: names that get the last ids, in this order.
            min_frequency: two tokens that occur together less often than this are not merged.

        Raises:
            UsageError: ``vocab_size`` has no room for the 256 bytes and the special tokens, or an argument is
                wrong.
            GroundupError: there is no text, or a text holds a lone surrogate.
        """
        splitter = Splitter(pattern_regex(pattern))
        reserved = _check_special_tokens(special_tokens)
        ordinary_size = vocab_size - len(special_tokens)
        if ordinary_size < 256:
            raise UsageError(
                f"vocab_size = {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens "
                f"need at least {256 + len(special_tokens)}."
            )
        if min_frequency < 1:
            raise UsageError(f"min_frequency = {min_frequency} must be at least 1.")
        chunk_counts = _count_chunks(_several(texts), splitter, show_progress)
        with _bar(show_progress, "learning merges", ordinary_size - 256, "merges") as bar:
            vocabulary, merges = bpe.learn(
                chunk_counts,
                ordinary_size,
                min_frequency,
                reserved,
                on_merge=(lambda size: bar.update(size - 256)) if bar else None,
            )
        names = {name: len(vocabulary) + number for number, name in enumerate(special_tokens)}
        vocabulary += [name.encode() for name in special_tokens]
        return cls(pattern_regex(pattern), vocabulary, merges, names)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a ``tokenizer.json``, or the one in a folder.

        Raises:
            GroundupError: it is missing, damaged, or not byte-level BPE.
        """
        path = Path(path)
        file = path / huggingface.TOKENIZER_FILE if path.is_dir() else path
        parts = huggingface.read(file)
        try:
            return cls(*parts)
        except UsageError as error:  # the file's pattern, which the person did not type
            raise GroundupError(f"{file}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that Hugging Face tools open, and the vocabulary for people, into ``folder``.

        They are ``tokenizer.json``, ``tokenizer_config.json`` and ``vocabulary.txt``; each is written whole
        or not at all, and other files in the folder stay.

        Raises:
            GroundupError: the folder cannot be written.
        """
        folder = Path(folder)
        huggingface.write(folder, self._parts, END_OF_TEXT if END_OF_TEXT in self.special_tokens else None)
        write_atomic(folder / VOCABULARY_FILE, vocabulary_dump(self))

    # ---- what it consists of

    @property
    def pattern(self) -> str:
        """The regular expression that cuts text into chunks."""
        return self._parts.pattern

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included. Ids are 0 to ``vocab_size - 1``."""
        return len(self._parts.vocabulary)

    @property
    def merges(self) -> Sequence[tuple[int, int]]:
        """Pairs of ids, in the order they were learned."""
        return self._parts.merges

    @property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of the special tokens."""
        return dict(self._parts.special_tokens)

    @property
    def end_of_text_id(self) -> int | None:
        """The id of ``<|endoftext|>``, which separates documents; None when there is no such token."""
        return self._parts.special_tokens.get(END_OF_TEXT)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over pattern, vocabulary, merges and special tokens: equal tokenizers share it."""
        pattern, vocabulary, merges, special_tokens = self._parts
        content = [pattern, [token.hex() for token in vocabulary], merges, sorted(special_tokens.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token.

        Raises:
            GroundupError: there is no such id.
        """
        return self.decode_bytes([token_id])

    # ---- encoding

    def encode(self, text: str, allow_special: Collection[str] | str = ()) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            allow_special: the names of the special tokens that are to be recognised in the text, or
                ``"all"``. The others are encoded as the ordinary characters of their name, so text from
                strangers is harmless.

        Raises:
            GroundupError: the text holds a lone surrogate.
            UsageError: ``allow_special`` names no special token.
        """
        allowed = self._allowed(allow_special)
        if not allowed:
            return self._unpack(self._pack(text))
        ids: list[int] = []
        # The longest name first, so that <|end|> cannot hide <|end|>x. The group makes split keep the names.
        names = "|".join(map(regex.escape, sorted(allowed, key=len, reverse=True)))
        for piece in regex.split(f"({names})", text):
            if piece in allowed:
                ids.append(self._parts.special_tokens[piece])
            else:
                ids.extend(self._unpack(self._pack(piece)))
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text; special tokens in them are ordinary text.

        Raises:
            GroundupError: a text holds a lone surrogate.
        """
        return [self._unpack(self._pack(text)) for text in _several(texts)]

    def encode_array(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of many texts, one after another, as arrays; special tokens in them are ordinary text.

        Returns:
            ids: all tokens, uint16 when the vocabulary has at most 65,536 tokens, else uint32.
            offsets: int64, one more than there are texts; text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

        Raises:
            GroundupError: a text holds a lone surrogate.
        """
        packed, ends = bytearray(), [0]
        for text in _several(texts):
            packed += self._pack(text)
            ends.append(len(packed))
        ids = np.frombuffer(packed, dtype=self._typecode)
        return ids, np.array(ends, dtype=np.int64) // ids.itemsize

    def _pack(self, text: str) -> bytes:
        """Token ids of a text as machine integers."""
        try:
            return b"".join(map(self._words.__getitem__, self._splitter.split(text)))
        except UnicodeEncodeError as error:
            raise _lone_surrogate(error) from error

    def _unpack(self, packed: bytes) -> list[int]:
        return memoryview(packed).cast(self._typecode).tolist()

    def _allowed(self, allow_special: Collection[str] | str) -> set[str]:
        known = self._parts.special_tokens
        if allow_special == "all":
            return set(known)
        names = {allow_special} if isinstance(allow_special, str) else set(allow_special)
        for name in names - known.keys():
            raise UsageError(f"'{name}' is no special token of this tokenizer.{nearest(name, known)}")
        return names

    # ---- decoding

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens, special tokens as their names.

        Raises:
            GroundupError: an id is out of range.
        """
        vocabulary = self._parts.vocabulary
        numbers = list(map(operator.index, ids))
        if numbers and not (min(numbers) >= 0 and max(numbers) < len(vocabulary)):
            wrong = next(number for number in numbers if not 0 <= number < len(vocabulary))
            raise GroundupError(
                f"token id {wrong} is out of range: this tokenizer has ids 0 to {len(vocabulary) - 1}. "
                "Were the ids made by another tokenizer?"
            )
        return b"".join(map(vocabulary.__getitem__, numbers))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text of the tokens.

        Args:
            ids: token ids, from any sequence or array.
            errors: what becomes of bytes that are not UTF-8, as in :meth:`bytes.decode`.

        Raises:
            GroundupError: an id is out of range.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, in pieces that never hold half a character.

        The pieces joined are ``decode(ids)``.

        Raises:
            GroundupError: an id is out of range.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in ids:
            if piece := decoder.decode(self.token_bytes(token_id)):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece


def _check_special_tokens(names: Sequence[str]) -> set[bytes]:
    """Check the names; returns the bytes that tokenizer.json would write like a name: never learned."""
    if isinstance(names, str):
        raise UsageError(f"special_tokens must be a list of names, not one string: ['{names}'].")
    reserved = {name: from_characters(name) for name in names}
    for number, name in enumerate(names):
        if len(name) < 2 or name in names[:number]:
            raise UsageError(f"special token '{name}': names must be two characters or longer, and each given once.")
    return {token for token in reserved.values() if token}


def _count_chunks(texts: Iterable[str], splitter: Splitter, show_progress: bool) -> dict[bytes, int]:
    """How often each distinct chunk occurs in the texts."""
    counts: Counter[str] = Counter()
    with _bar(show_progress, "counting words", None, "characters") as bar:
        unreported = 0
        for text in texts:
            counts.update(splitter.split(text))
            unreported += len(text)
            # A bar that moved with every short text would cost more than the counting.
            if bar and unreported > 1_000_000:
                bar.advance(unreported)
                unreported = 0
    if not any(counts):
        raise GroundupError("there is no text to train a tokenizer on. Give it at least a sentence.")
    try:
        return {chunk.encode(): count for chunk, count in counts.items()}
    except UnicodeEncodeError as error:
        raise _lone_surrogate(error) from error


def _several(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):  # which would be read as many texts of one character
        raise UsageError("texts must be several strings, such as a list; for one text write [text].")
    return texts


def _bar(show: bool, label: str, total: int | None, unit: str) -> AbstractContextManager[Progress | None]:
    return progress(label, total, unit) if show else nullcontext()


def _lone_surrogate(error: UnicodeEncodeError) -> GroundupError:
    chunk = error.object[max(0, error.start - 20) : error.end + 20]
    return GroundupError(
        f"the text holds a lone surrogate, U+{ord(error.object[error.start]):04X}, in {chunk!a}: UTF-8 "
        "cannot write it. Read the file with errors='replace', or clean the text with "
        "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
    )

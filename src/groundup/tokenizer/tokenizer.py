"""The one public class: train, load, save, encode, decode."""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np

from groundup.runtime.errors import GroundupError, UsageError, nearest
from groundup.runtime.files import write_atomic
from groundup.tokenizer import formats, lookup
from groundup.tokenizer.added_tokens import AddedTokens
from groundup.tokenizer.chat import ChatTemplate, Message
from groundup.tokenizer.chat_presets import PRESETS
from groundup.tokenizer.describe import vocabulary_dump
from groundup.tokenizer.encoder import BytePairEncoder, recover_merges
from groundup.tokenizer.formats.sentencepiece import SentencePieceEncoder
from groundup.tokenizer.pretokenize import pattern_regex
from groundup.tokenizer.train import check_special_tokens, lone_surrogate, several, train
from groundup.tokenizer.vocabulary import END_OF_TEXT, Normalization, Vocabulary

VOCABULARY_FILE = "vocabulary.txt"


class Algorithm(Protocol):
    """What turns text without special tokens into ids. A lone surrogate raises UnicodeEncodeError."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Token ids of each text."""

    def encode_array(self, texts: Sequence[str], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts, one after another, and where each text begins."""

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the byte (in UTF-8) at which each of them ends."""


class Tokenizer:
    """Text to token ids and back: one class over byte-pair encoding, bytes, words, characters and SentencePiece.

    Over byte-pair encoding and bytes any text can be encoded, nothing is unknown, and decoding gives it back exactly.
    Make one with :meth:`train` or :meth:`load`.

    Args:
        vocabulary: what the tokenizer consists of.

    Raises:
        UsageError: the pattern does not compile.
        GroundupError: the vocabulary lacks a byte, or what its kind needs.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._algorithm = _algorithm(vocabulary)
        self._added = AddedTokens(vocabulary)
        self._tokens = vocabulary.tokens

    def __repr__(self) -> str:
        return f"<Tokenizer: {self.vocab_size} tokens, {len(self.special_tokens)} of them special>"

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process is sent the vocabulary, and builds its own tables and caches.
        return Tokenizer, (self.vocabulary,)

    # ---- making, loading, saving

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int | None = None,
        pattern: str = "gpt4",
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        min_frequency: int | None = None,
        show_progress: bool = True,
        algorithm: str = "bpe",
        normalization: Normalization | None = None,
        threads: int | None = None,
    ) -> Tokenizer:
        """Learn a vocabulary from texts. The same texts, in any order, give the same vocabulary.

        The merges are those of Hugging Face's ``BpeTrainer`` for the same pattern.

        Args:
            texts: documents; read once, one at a time.
            vocab_size: how many tokens to stop at, special tokens included. A small text may not have as
                many. None takes all bytes, characters or words; byte-pair encoding needs a number.
            pattern: how text is cut before merging, and what a word is: gpt2, gpt4 (= cl100k), o200k, or a
                regular expression.
            special_tokens: names that get the last ids, in this order.
            min_frequency: two tokens that occur together less often than this are not merged; words and
                characters that occur less often are unknown. None is 2 for byte-pair encoding, else 1.
            show_progress: whether progress bars are shown.
            algorithm: ``bpe``; or ``bytes``, where each byte is a token; or ``characters`` or ``words``, where
                those of the texts are the tokens and any other is the unknown token ``<|unk|>``.
            normalization: the Unicode normal form that texts are brought to, here and in encoding: NFC, NFD,
                NFKC or NFKD. Decoding gives the normalized text.
            threads: how many count at once; None for one per core. Learning merges takes one.

        Raises:
            UsageError: ``vocab_size`` has no room for the 256 bytes and the special tokens, or an argument is
                wrong.
            GroundupError: there is no text, or a text holds a lone surrogate.
        """
        return cls(
            train(
                texts,
                vocab_size,
                pattern,
                special_tokens,
                min_frequency,
                show_progress,
                algorithm,
                normalization,
                threads,
            )
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        pattern: str | None = None,
        special_tokens: Mapping[str, int] | None = None,
        sha256: str | None = None,
    ) -> Tokenizer:
        """Read a tokenizer from a file or a folder, or fetch it by name.

        What can be read: ``tokenizer.json`` (byte-level BPE, and our words and characters), ``x.tiktoken``,
        GPT-2's ``encoder.json`` + ``vocab.bpe`` and the same as ``vocab.json`` + ``merges.txt``,
        ``tokenizer.model`` (SentencePiece) and ``x.gguf``; each by its own path or that of its folder.

        Args:
            path: a file; a folder; ``hf:owner/name`` for a repository of the Hugging Face hub; or the name of
                an OpenAI vocabulary: r50k, p50k, cl100k, o200k (with or without ``_base``), p50k_edit,
                o200k_harmony, or the same after ``openai:``. Fetched files are kept and checked.
            pattern: how text is cut (as in :meth:`train`), where the file does not say. What is given wins.
            special_tokens: names and ids, where the file does not say.
            sha256: the SHA-256 that the file must have, in hexadecimal.

        Raises:
            GroundupError: it is missing, damaged, not the file it should be, or not a kind that can be read.
            UsageError: ``pattern`` does not compile, or is needed and not given.
        """
        expression = pattern_regex(pattern) if pattern is not None else None
        return cls(formats.read(path, expression, special_tokens, sha256))

    def with_special_tokens(self, names: Sequence[str]) -> Tokenizer:
        """A tokenizer that has further special tokens, with the ids that follow its own. :meth:`save` writes them, too.

        All ids that there were stay. What is a special token already is passed over, and an added token that was found
        in any text becomes one that is found when asked for. A model needs a row for each new id.

        Args:
            names: of the tokens, in the order of their ids.

        Raises:
            UsageError: a name is too short, given twice, or that of an ordinary token.
        """
        check_special_tokens(names)
        parts = self.vocabulary
        ordinary = {parts.tokens[number] for number in parts.ordinary_ids()}
        tokens, special, added = [*parts.tokens], dict(parts.special_tokens), dict(parts.added_tokens)
        for name in names:
            if name in special:
                continue
            if name.encode() in ordinary:
                raise UsageError(f"'{name}' is an ordinary token of this vocabulary already. Choose another name.")
            special[name] = added.pop(name, len(tokens))
            if special[name] == len(tokens):
                tokens.append(name.encode())
        return Tokenizer(replace(parts, tokens=tuple(tokens), special_tokens=special, added_tokens=added))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that Hugging Face tools open, and the vocabulary for people, into ``folder``.

        They are ``tokenizer.json`` (for SentencePiece ``tokenizer.model``), ``tokenizer_config.json`` and
        ``vocabulary.txt``; each is written whole or not at all, and other files in the folder stay.

        Raises:
            GroundupError: the folder cannot be written.
        """
        formats.write(Path(folder), self._explicit())
        write_atomic(Path(folder) / VOCABULARY_FILE, vocabulary_dump(self))

    def save_tiktoken(self, path: str | os.PathLike[str]) -> None:
        """Write the ordinary tokens as a ``.tiktoken`` file: base64 of the bytes, and the rank, a line each.

        The format holds neither the pattern nor the special tokens: :meth:`load` wants them back as arguments.

        Raises:
            GroundupError: tiktoken would make other ids of it, or the place cannot be written.
        """
        formats.write_tiktoken(Path(path), self._explicit())

    def gguf_fields(self, vocab_size: int | None = None) -> dict[str, Any]:
        """What a GGUF file (llama.cpp's) says of the tokenizer: values by name, such as ``tokenizer.ggml.tokens``.

        Args:
            vocab_size: of the model, where it has more tokens; None for the tokenizer's.

        Raises:
            UsageError: the format has no place for what the tokenizer does.
        """
        return formats.gguf.fields_of(self._explicit(), vocab_size or self.vocab_size)

    def _explicit(self) -> Vocabulary:
        """The vocabulary, with the merges that its ranks stand for."""
        if self.vocabulary.kind != "bpe":
            return self.vocabulary
        return replace(self.vocabulary, merges=self.merges)

    # ---- what it consists of

    @property
    def pattern(self) -> str:
        """The regular expression that cuts text into chunks."""
        return self.vocabulary.pattern

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; special tokens included. Some vocabularies leave ids out."""
        return len(self._tokens)

    @cached_property
    def merges(self) -> Sequence[tuple[int, int]]:
        """Pairs of ids, in the order they were learned; none where the algorithm does not merge."""
        if self.vocabulary.kind != "bpe":
            return ()
        if self.vocabulary.merges is not None:
            return self.vocabulary.merges
        return tuple(recover_merges(*self.vocabulary.with_all_bytes()))

    @property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of the special tokens."""
        return dict(self.vocabulary.special_tokens)

    @property
    def end_of_text_id(self) -> int | None:
        """The id of ``<|endoftext|>``, which separates documents, else of the file's own end-of-text token.

        None when there is no such token.
        """
        special_tokens = self.vocabulary.special_tokens
        return special_tokens.get(END_OF_TEXT, special_tokens.get(self.vocabulary.eos_token or END_OF_TEXT))

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens after which a model has nothing more to say: the end of a text, and, where there is a chat
        template, the end of the assistant's turn.
        """
        turn = None if self.chat_template is None else self.chat.end_of_turn(self)
        return [end for end in dict.fromkeys((self.end_of_text_id, turn)) if end is not None]

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over everything that decides ids: equal tokenizers share it."""
        parts = self.vocabulary
        # Only what differs from the default is added, so that a plain vocabulary keeps the fingerprint it had
        # before there were others.
        more: dict[str, Any] = {
            "kind": parts.kind if parts.kind != "bpe" else None,
            "added_tokens": sorted(parts.added_tokens.items()),
            "token_rules": sorted((name, sorted(rules)) for name, rules in parts.token_rules.items() if rules),
            "whole_words": parts.whole_words,
            "normalization": parts.normalization,
            "prefix_space": parts.prefix_space,
            "prefix": parts.prefix,
            "suffix": parts.suffix,
            "unknown": parts.unknown,
            "model": hashlib.sha256(parts.model).hexdigest() if parts.model else None,
        }
        content: list[Any] = [
            parts.pattern,
            [token.hex() for token in parts.tokens],
            self.merges,
            sorted(parts.special_tokens.items()),
        ]
        if told := {name: value for name, value in more.items() if value or (name == "unknown" and value is not None)}:
            content.append(told)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; of a special token, its name.

        Raises:
            GroundupError: there is no such id.
        """
        number = operator.index(token_id)
        if not 0 <= number < len(self._tokens) or not (token := self._tokens[number]):
            self._refuse([number])
        return token

    # ---- encoding

    def encode(
        self,
        text: str,
        allow_special: Collection[str] | str = (),
        add_special: bool = False,
        continued: bool = False,
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            allow_special: the names of the special tokens that are to be recognised in the text, or
                ``"all"``. The others are encoded as the ordinary characters of their name, so text from
                strangers is harmless.
            add_special: whether to put the tokens around the ids that the file asks for, such as one that
                begins a text.
            continued: whether the text goes on from another: SentencePiece, and what asks for a space before a
                text, then put none before it. For all others it makes no difference.

        Raises:
            GroundupError: the text holds a lone surrogate.
            UsageError: ``allow_special`` names no special token.
        """
        try:
            if not allow_special and self._added.idle and not continued:
                ids = self._algorithm.encode(text)
            else:
                ids = []
                pieces = self._added.cut(text, self._allowed(allow_special), continued=continued)
                for number, piece in enumerate(pieces):
                    if isinstance(piece.content, int):
                        ids.append(piece.content)
                    elif continued and number == 0 and isinstance(self._algorithm, SentencePieceEncoder):
                        ids += self._algorithm.encode_continued(piece.content)
                    else:
                        ids += self._algorithm.encode(piece.content)
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from error
        return [*self.vocabulary.prefix, *ids, *self.vocabulary.suffix] if add_special else ids

    def encode_batch(
        self, texts: Iterable[str], allow_special: Collection[str] | str = (), threads: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text.

        Args:
            texts: any texts.
            allow_special: as in :meth:`encode`.
            threads: how many work at once; None for one per core.

        Raises:
            GroundupError: a text holds a lone surrogate.
            UsageError: ``allow_special`` names no special token.
        """
        given = list(several(texts))
        allowed = self._allowed(allow_special)
        try:
            if self._added.idle and not allowed:
                return self._algorithm.encode_batch(given, threads)
            pieces = [self._added.cut(text, allowed) for text in given]
            stretches = [piece.content for parts in pieces for piece in parts if isinstance(piece.content, str)]
            encoded = iter(self._algorithm.encode_batch(stretches, threads))
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from error
        return [
            [
                number
                for piece in parts
                for number in ([piece.content] if isinstance(piece.content, int) else next(encoded))
            ]
            for parts in pieces
        ]

    def encode_array(
        self, texts: Iterable[str], allow_special: Collection[str] | str = (), threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of many texts, one after another, as arrays.

        Args:
            texts: any texts.
            allow_special: as in :meth:`encode`.
            threads: how many work at once; None for one per core.

        Returns:
            ids: all tokens, uint16 when the vocabulary has at most 65,536 tokens, else uint32.
            offsets: int64, one more than there are texts; text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``.

        Raises:
            GroundupError: a text holds a lone surrogate.
            UsageError: ``allow_special`` names no special token.
        """
        given = list(several(texts))
        allowed = self._allowed(allow_special)
        try:
            if self._added.idle and not allowed:
                return self._algorithm.encode_array(given, threads)
            pieces = [self._added.cut(text, allowed) for text in given]
            stretches = [piece.content for parts in pieces for piece in parts if isinstance(piece.content, str)]
            ids, ends = self._algorithm.encode_array(stretches, threads)
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from error
        encoded = iter(np.split(ids, ends[1:-1]) if stretches else ())
        arrays, offsets = [ids[:0]], [0]
        for parts in pieces:
            arrays += [
                np.array([piece.content], ids.dtype) if isinstance(piece.content, int) else next(encoded)
                for piece in parts
            ]
            offsets.append(offsets[-1] + sum(map(len, arrays[len(arrays) - len(parts) :])) if parts else offsets[-1])
        return np.concatenate(arrays), np.array(offsets, dtype=np.int64)

    def encode_with_offsets(
        self, text: str, allow_special: Collection[str] | str = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and where in it each of them lies.

        Args:
            text: any text.
            allow_special: as in :meth:`encode`.

        Returns:
            ids: as :meth:`encode` gives them.
            offsets: start and end of each token, in characters, as Hugging Face gives them: a token that begins
                or ends inside a character covers all of it, so neighbours may overlap. A character that
                normalization composed of several lies where the first of them does.

        Raises:
            GroundupError: the text holds a lone surrogate.
            UsageError: ``allow_special`` names no special token.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        try:
            for piece in self._added.cut(text, self._allowed(allow_special), locate=True):
                assert piece.spans is not None
                if isinstance(piece.content, int):
                    ids.append(piece.content)
                    offsets += piece.spans
                else:
                    numbers, ends = self._algorithm.spans(piece.content)
                    ids += numbers
                    offsets += _character_offsets(piece.content, ends, piece.spans)
        except UnicodeEncodeError as error:
            raise lone_surrogate(error) from error
        return ids, offsets

    def _allowed(self, allow_special: Collection[str] | str) -> Collection[str]:
        known = self.vocabulary.special_tokens
        if not allow_special:
            return ()
        if allow_special == "all":
            return known.keys()
        names = {allow_special} if isinstance(allow_special, str) else set(allow_special)
        for name in names - known.keys():
            raise UsageError(f"'{name}' is no special token of this tokenizer.{nearest(name, known)}")
        return names

    # ---- conversations

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that writes a conversation as text, where there is one."""
        return self.vocabulary.chat_template

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template, with this tokenizer's ``bos_token``, ``eos_token`` and ``unk_token`` in it.

        Raises:
            GroundupError: there is none, or it does not compile.
        """
        if self.chat_template is None:
            raise GroundupError(
                "this tokenizer has no chat template. Give it one with with_chat_template: the name of a known one "
                f"({', '.join(PRESETS)}) or Jinja source."
            )
        return ChatTemplate(self.chat_template, formats.named_tokens(self.vocabulary))

    def with_chat_template(
        self, template: str, bos_token: str | None = None, eos_token: str | None = None
    ) -> Tokenizer:
        """A tokenizer that differs from this one in the chat template only. :meth:`save` writes it, too.

        Args:
            template: chatml, hermes, llama2, llama3, alpaca or vicuna; or Jinja source, as in Hugging Face's
                ``chat_template``.
            bos_token: the special token that the template knows by this name; None is the one that the
                tokenizer's file names, else what the known template was published with.
            eos_token: the same for the other end.

        Raises:
            UsageError: no template has that name, or ``bos_token`` or ``eos_token`` is no special token.
            GroundupError: it does not compile, or needs special tokens that are not there.
        """
        self._allowed({name for name in (bos_token, eos_token) if name is not None})
        begin, end = bos_token or self.vocabulary.bos_token, eos_token or self.vocabulary.eos_token
        needed: Sequence[str] = ()
        if "{" not in template:
            preset = ChatTemplate.preset(template)
            published = preset.variables.get("bos_token"), preset.variables.get("eos_token")
            begin, end = begin or published[0], end or published[1]
            # The published names give way to the tokenizer's own.
            own = dict(zip(published, (begin, end), strict=True))
            template, needed = preset.source, [own.get(name) or name for name in preset.special_tokens]
        ChatTemplate(template, {}, needed).check_tokens(self)
        return Tokenizer(replace(self.vocabulary, chat_template=template, bos_token=begin, eos_token=end))

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, as the chat template writes it.

        Only what the template itself writes becomes special tokens: text of a message never does, whatever it spells.
        The ids are those of Hugging Face's ``apply_chat_template``, except that the assistant's text is encoded apart
        from what stands before it where the template marks it with ``{% generation %}``, as generation would.
        SentencePiece puts its space before the text after each special token, as the library and Llama 2 do; files
        that put it before the first text only (``legacy=false``) have other ids there.

        Args:
            messages: dictionaries with ``role`` and ``content``, the oldest first.
            tools: the JSON schemas of the functions the model may call.
            add_generation_prompt: end with the beginning of the assistant's next message.
            continue_final_message: end in the middle of the last message, for the model to go on with it.
            variables: further variables of the template, such as ``enable_thinking``.

        Raises:
            GroundupError: there is no chat template, a message is not as it must be, or the template refuses it.
        """
        return self.chat.encode(self, messages, tools, add_generation_prompt, continue_final_message, **variables)

    def apply_chat_template_with_mask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        turns: Literal["all", "last"] = "all",
        **variables: Any,
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and which of them the assistant is to produce, for supervised fine-tuning.

        Args:
            messages, tools, variables: as for :meth:`apply_chat_template`.
            turns: every message of the assistant, or only the last.

        Returns:
            The ids, and a list as long with 1 for the assistant's tokens and 0 for the others.

        Raises:
            GroundupError: as for :meth:`apply_chat_template`; or the assistant says nothing, or its tokens cannot be
                told apart.
        """
        return self.chat.encode_with_mask(self, messages, tools, turns, **variables)

    # ---- decoding

    def decode_bytes(self, ids: Iterable[int], continued: bool = False) -> bytes:
        """The bytes of the tokens, special tokens as their names.

        Args:
            ids: token ids, from any sequence or array.
            continued: whether other tokens came before: SentencePiece writes a space before a text and takes
                it away again, which is wrong in the middle of one.

        Raises:
            GroundupError: an id is out of range, or no token has it.
        """
        numbers: list[int] = list(map(operator.index, ids.tolist() if isinstance(ids, np.ndarray) else ids))
        if numbers and not (min(numbers) >= 0 and max(numbers) < len(self._tokens)):
            self._refuse(numbers)
        if self._has_gaps and not all(map(self._tokens.__getitem__, numbers)):
            self._refuse(numbers)
        if isinstance(self._algorithm, SentencePieceEncoder):
            return b"".join(self._algorithm.written(numbers, continued))
        return b"".join(map(self._tokens.__getitem__, numbers))

    def decode(self, ids: Iterable[int], errors: str = "replace", continued: bool = False) -> str:
        """The text of the tokens.

        Args:
            ids: token ids, from any sequence or array.
            errors: what becomes of bytes that are not UTF-8, as in :meth:`bytes.decode`.
            continued: whether other tokens came before, as in :meth:`decode_bytes`.

        Raises:
            GroundupError: an id is out of range, or no token has it.
        """
        return self.decode_bytes(ids, continued).decode("utf-8", errors)

    def decode_stream(self, ids: Iterable[int], continued: bool = False) -> Iterator[str]:
        """The text of tokens as they come, in pieces that never hold half a character.

        The pieces joined are ``decode(ids)``.

        Raises:
            GroundupError: an id is out of range, or no token has it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self._written_one_by_one(ids, continued):
            if piece := decoder.decode(token):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def _written_one_by_one(self, ids: Iterable[int], continued: bool) -> Iterator[bytes]:
        if isinstance(self._algorithm, SentencePieceEncoder):
            checked = (number for number in ids if self.token_bytes(number))
            return self._algorithm.written(checked, continued)
        return map(self.token_bytes, ids)

    @cached_property
    def _has_gaps(self) -> bool:
        return not all(self._tokens)

    def _refuse(self, numbers: Iterable[int]) -> NoReturn:
        """Say what is wrong with the first of the ids that no token has."""
        size = len(self._tokens)
        wrong = next(number for number in numbers if not 0 <= number < size or not self._tokens[number])
        if 0 <= wrong < size:
            raise GroundupError(f"token id {wrong} is out of use: this vocabulary leaves it out.")
        raise GroundupError(
            f"token id {wrong} is out of range: this tokenizer has ids 0 to {size - 1}. "
            "Were the ids made by another tokenizer?"
        )


def _algorithm(vocabulary: Vocabulary) -> Algorithm:
    """The algorithm that a vocabulary asks for.

    Raises:
        UsageError: the pattern does not compile.
        GroundupError: a byte has no token, or the kind needs a library that is not there.
    """
    if vocabulary.kind == "sentencepiece":
        return SentencePieceEncoder(vocabulary)
    if vocabulary.kind == "bpe":
        for byte in vocabulary.missing_bytes():
            raise GroundupError(f"byte {byte} has no token; byte-pair encoding needs one for each of the 256 bytes.")
        tokens, ordinary = vocabulary.with_all_bytes()
        return BytePairEncoder(tokens, vocabulary.merges, vocabulary.pattern, ordinary, vocabulary.whole_words)
    if vocabulary.unknown is None:
        raise GroundupError(f"a vocabulary of {vocabulary.kind} needs an unknown token.")
    return lookup.LookupEncoder(vocabulary.tokens, vocabulary.pattern, vocabulary.ordinary_ids(), vocabulary.unknown)


def _character_offsets(text: str, ends: list[int], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """From the bytes at which tokens end to the characters that they cover.

    Args:
        text: what was encoded.
        ends: the byte at which each token ends, in UTF-8.
        spans: where each character of ``text`` lies in the text as given.
    """
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    character = np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte
    offsets = []
    start = 0
    for end in ends:
        covered = spans[character[start] : character[end - 1] + 1] if end > start else []
        place = spans[character[min(start, len(data) - 1)]][0] if not covered else 0
        offsets.append((min(s for s, _ in covered), max(e for _, e in covered)) if covered else (place, place))
        start = end
    return offsets

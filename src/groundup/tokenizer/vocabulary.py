"""What a tokenizer consists of, whichever file it came from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"

Kind = Literal["bpe", "words", "characters", "sentencepiece"]
Normalization = Literal["NFC", "NFD", "NFKC", "NFKD"]
NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
"""The bytes that no text holds. A vocabulary that was learned from text may lack them."""

NORMALIZATIONS: tuple[Normalization, ...] = ("NFC", "NFD", "NFKC", "NFKD")


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides which ids a text becomes. Two equal vocabularies make equal tokenizers."""

    kind: Kind
    """The algorithm. Single bytes are ``bpe`` without merges."""
    tokens: Sequence[bytes]
    """The bytes of each token by id; a special token's are its name, ``b""`` is an id that no token has."""
    pattern: str = ""
    """The regular expression that cuts text into chunks; empty where the kind has none."""
    merges: Sequence[tuple[int, int]] | None = None
    """Pairs of ids in the order they were learned. None for kind ``bpe`` is tiktoken's rule: a token's id is its
    rank, and of all neighbours whose joined bytes are a token, those with the lowest id are merged first, leftmost
    on ties."""
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    """Names and ids of the tokens that text becomes only when asked for."""
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    """Texts and ids of the tokens that are always found in text, before anything else: Hugging Face's added tokens
    that are not special."""
    token_rules: Mapping[str, Collection[str]] = field(default_factory=dict)
    """How special and added tokens are found in text, by name, as Hugging Face's AddedToken has it: ``lstrip`` and
    ``rstrip`` take white space beside the token along, ``single_word`` wants no letter or digit beside it,
    ``normalized`` looks for it after the text was normalized. A token that is not here follows none of them."""
    whole_words: bool = False
    """A chunk that is itself a token becomes it without merging: Hugging Face's ignore_merges; tiktoken always does."""
    normalization: Normalization | None = None
    """The Unicode normal form that text is brought to first."""
    prefix_space: bool = False
    """A text that does not begin with a space is encoded as if it did: Hugging Face's add_prefix_space."""
    prefix: tuple[int, ...] = ()
    """Ids that are put before a text when asked for, such as that of a beginning-of-text token."""
    suffix: tuple[int, ...] = ()
    """Ids that are put after a text when asked for."""
    unknown: int | None = None
    """The id of what is not in the vocabulary; None where nothing is unknown."""
    bos_token: str | None = None
    """The special token that begins a text, by name, where the file says so."""
    eos_token: str | None = None
    """The special token that ends a text, by name, where the file says so."""
    chat_template: str | None = None
    """Jinja source that writes a conversation as text."""
    model: bytes = b""
    """For kind ``sentencepiece``: the model as its file holds it (a ModelProto)."""

    def missing_bytes(self) -> list[int]:
        """The bytes that no ordinary token stands for, though text or a longer token may hold them."""
        return self._missing_bytes

    @cached_property
    def _missing_bytes(self) -> list[int]:
        ordinary = [self.tokens[number] for number in self.ordinary_ids()]
        there = {token for token in ordinary if len(token) == 1}
        if len(there) == 256:
            return []
        needed = (set(range(256)) - NEVER_IN_UTF8) | set(b"".join(ordinary))
        return [byte for byte in sorted(needed) if bytes([byte]) not in there]

    def with_all_bytes(self) -> tuple[Sequence[bytes], list[int]]:
        """The tokens and the ordinary ids for merging, which has a place for each of the 256 bytes.

        Those that a vocabulary may lack get ids past its end, which no text brings forth.
        """
        ordinary = self.ordinary_ids()
        there = {self.tokens[number] for number in ordinary if len(self.tokens[number]) == 1}
        lacking = [bytes([byte]) for byte in range(256) if bytes([byte]) not in there]
        if not lacking:
            return self.tokens, ordinary
        size = len(self.tokens)
        return (*self.tokens, *lacking), [*ordinary, *range(size, size + len(lacking))]

    def ordinary_ids(self) -> list[int]:
        """The ids that plain text may become, ascending.

        Those of special tokens are not among them, and of added tokens only those that are a part of the algorithm as
        well: a byte that no other token holds, or what a merge makes.
        """
        return self._ordinary_ids

    @cached_property
    def _ordinary_ids(self) -> list[int]:
        outside = set(self.special_tokens.values())
        added = set(self.added_tokens.values()) - outside
        if added:
            held = {token for number, token in enumerate(self.tokens) if number not in added and number not in outside}
            made = {self.tokens[left] + self.tokens[right] for left, right in self.merges or ()}
            outside |= {
                number
                for number in added
                if (token := self.tokens[number]) in held or (len(token) > 1 and token not in made)
            }
        return [number for number, token in enumerate(self.tokens) if token and number not in outside]

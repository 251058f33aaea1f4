"""Every byte as one printable character: how byte-level vocabularies are written in JSON.

GPT-2 (Radford et al. 2019) gave each of the 256 bytes a character that can be seen and contains no space:
printable Latin-1 bytes stand for themselves, the other 68 become the characters from U+0100 on, so a space is
"Ġ" and a newline "Ċ". Hugging Face ``tokenizers`` calls it the ByteLevel alphabet.
"""

from __future__ import annotations


def _characters() -> str:
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = (chr(0x100 + n) for n in range(256))
    return "".join(chr(byte) if byte in visible else next(shifted) for byte in range(256))


CHARACTER_OF_BYTE = _characters()
"""256 characters; the one at index ``b`` stands for byte ``b``."""

BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}

ALPHABET_ORDER = bytes(BYTE_OF_CHARACTER[character] for character in sorted(CHARACTER_OF_BYTE))
"""The 256 bytes in the order of their characters: the order in which Hugging Face's trainer numbers them."""


def to_characters(token: bytes) -> str:
    """A token's bytes in the printable alphabet: ``b" the"`` is ``"Ġthe"``."""
    return "".join(map(CHARACTER_OF_BYTE.__getitem__, token))


def from_characters(written: str) -> bytes | None:
    """The bytes that ``written`` stands for, or None when a character of it is outside the alphabet."""
    try:
        return bytes(map(BYTE_OF_CHARACTER.__getitem__, written))
    except KeyError:
        return None

"""A tokenizer shown to a person: its vocabulary as text, and how far it compresses a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groundup.tokenizer.tokenizer import Tokenizer


def escaped(token: bytes) -> str:
    r"""Bytes as one line of text from which they can be told: ``\n`` or ``\u200b`` where not printable.

    ``\x80`` to ``\xff`` are bytes that are not UTF-8; the characters of these numbers are ``\u0080`` to
    ``\u00ff``.
    """
    text = token.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else _escaped_character(c) for c in text)


def _escaped_character(character: str) -> str:
    if 0x80 <= ord(character) <= 0xFF:
        return f"\\u{ord(character):04x}"
    return character.encode("unicode_escape").decode()


def vocabulary_dump(tok: Tokenizer) -> str:
    """The vocabulary, one token per line: id, bytes in quotes, the two tokens it was first merged from."""
    parents: dict[bytes, tuple[int, int]] = {}
    for left, right in tok.merges:
        parents.setdefault(tok.token_bytes(left) + tok.token_bytes(right), (left, right))
    special_ids = set(tok.special_tokens.values())
    lines = []
    for number in range(tok.vocab_size):
        token = tok.token_bytes(number)
        line = f'{number:>6}  "{escaped(token)}"'
        if number in special_ids:
            line += "  special"
        elif token in parents:
            left, right = parents[token]
            line += f'  = {left} "{escaped(tok.token_bytes(left))}" + {right} "{escaped(tok.token_bytes(right))}"'
        lines.append(line + "\n")
    return "".join(lines)


def compression(tok: Tokenizer, text: str) -> dict[str, float]:
    """How far the tokenizer compresses a text.

    Returns:
        The counts ``bytes`` (UTF-8), ``words`` (between white space) and ``tokens``; ``bytes_per_token``,
        higher is tighter; ``tokens_per_word``, also called fertility. A ratio over nothing is 0.

    Raises:
        GroundupError: the text holds a lone surrogate.
    """
    tokens, words, size = len(tok.encode(text)), len(text.split()), len(text.encode())
    return {
        "bytes": size,
        "words": words,
        "tokens": tokens,
        "bytes_per_token": size / tokens if tokens else 0.0,
        "tokens_per_word": tokens / words if words else 0.0,
    }

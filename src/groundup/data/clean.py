"""Cleaning: what is mended in a document, and which documents are dropped, with the reason."""

from __future__ import annotations

import re
from dataclasses import replace

from groundup.data.document import Document, Dropped

MAX_BLANK_LINES = 3
MAX_DAMAGE = 0.1  # a text of which more than this part is control or replacement characters is no text

_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]"
)  # \r and U+0085 end lines instead
_SURROGATES = re.compile("[\ud800-\udfff]")
_NEWLINES = re.compile("\r\n?|\x85")
_BLANK_LINES = re.compile("\n" * (MAX_BLANK_LINES + 2) + "+")


def clean(document: Document, min_chars: int = 16) -> Document | Dropped:
    """Mend a document's text, or drop it.

    Line ends become ``\\n``; control characters other than tab and newline, and stray byte order marks, go;
    lone surrogates (which UTF-8 cannot hold) become U+FFFD; more than three blank lines in a row become
    three. Spaces, also at the ends of lines, stay: the text may be source code.

    Args:
        document: the document as it was read.
        min_chars: a shorter text, not counting the space around it, is dropped as "too short".

    Returns:
        The document itself where nothing had to be mended.
    """
    text = document.text
    if "\r" in text or "\x85" in text:
        text = _NEWLINES.sub("\n", text)
    text, damage = _CONTROLS.subn("", text)
    if not text.isascii():
        text = _SURROGATES.sub("\ufffd", text)
        damage += text.count("\ufffd")
    text = _BLANK_LINES.sub("\n" * (MAX_BLANK_LINES + 1), text)
    if damage > MAX_DAMAGE * len(document.text):
        return Dropped(document.name, "mostly not text", f"{damage:,} of {len(document.text):,} characters")
    if len(text.strip()) < min_chars:
        return Dropped(document.name, "too short", f"{len(text.strip())} characters")
    return document if text == document.text else replace(document, text=text)

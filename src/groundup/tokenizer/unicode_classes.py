r"""Which characters are letters, numbers, marks and white space: the table behind ``\p{L}``, ``\p{N}``, ``\s`` …

Every library brings the Unicode version of its day: Python 3.11's own is 14, the ``regex`` library's is newer than
tiktoken's. Ids must not depend on that, so the table is fixed to Unicode 16.0, tiktoken's, and
lies beside this file as text.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

import numpy as np

CODE_POINTS = 0x110000
LETTER, NUMBER, SPACE, UPPER, LOWER = 1, 2, 4, 8, 16
"""Bits of a class. GPT-4o's pattern has two overlapping classes of word characters; UPPER and LOWER are those:
letters without case, and marks, are in both."""

BITS = {
    "u": LETTER | UPPER,
    "l": LETTER | LOWER,
    "o": LETTER | UPPER | LOWER,
    "m": UPPER | LOWER,
    "n": NUMBER,
    "s": SPACE,
    "-": 0,
}
"""The bits of each class that unicode_classes.txt names."""


@cache
def class_bits() -> np.ndarray:
    """The class bits of every code point: uint8 [0x110000], read-only."""
    text = files("groundup.tokenizer").joinpath("unicode_classes.txt").read_text("ascii")
    runs = re.findall(r"([a-z-])(\d*)", "".join(line for line in text.splitlines(True) if not line.startswith("#")))
    bits = np.array([BITS[name] for name, _ in runs], dtype=np.uint8)
    table = np.repeat(bits, [int(length or 1) for _, length in runs])
    assert len(table) == CODE_POINTS
    table.flags.writeable = False
    return table

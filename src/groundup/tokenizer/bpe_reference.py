"""Byte-pair encoding as you would explain it: the truth that bpe.py is tested against.

Tokens are plain ``bytes`` here, so that nothing stands between the reader and the idea:

    Training   Write the text as single bytes. Find the two neighbours that occur together most often, glue
               them into one token everywhere, remember that merge. Repeat until the vocabulary is large
               enough.
    Encoding   Write the text as single bytes. Apply the remembered merge that was learned earliest, wherever
               it fits, until none fits.

Text is first cut into chunks (pretokenize.py) and no merge ever crosses a chunk's edge. Because the same
chunks come again and again, training needs each distinct chunk once, with its count.

Sources: Sennrich, Haddow, Birch 2016, algorithm 1; over bytes: Radford et al. 2019.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from groundup.tokenizer.alphabet import ALPHABET_ORDER

Pair = tuple[bytes, bytes]


def train(chunk_counts: Mapping[bytes, int], vocab_size: int, min_frequency: int = 2) -> tuple[list[bytes], list[Pair]]:
    """Learn merges from chunks.

    The pair that occurs most often is merged first. Of pairs that occur equally often it is the one whose
    left token, then whose right token, is older; single bytes count as old in the order of
    ``ALPHABET_ORDER``. This is the rule of Hugging Face's ``BpeTrainer``.

    Args:
        chunk_counts: each distinct chunk, and how often it occurs.
        vocab_size: how many tokens to stop at, the 256 bytes included.
        min_frequency: stop when no pair occurs this often.

    Returns:
        All tokens, oldest first, and the merges in the order they were learned. Every merge makes a new
        token: the same bytes, wherever no merge reaches across their ends, go through the same merges.
    """
    words = {chunk: split_bytes(chunk) for chunk in chunk_counts}
    tokens = split_bytes(ALPHABET_ORDER)
    merges: list[Pair] = []
    while len(tokens) < vocab_size:
        counts: Counter[Pair] = Counter()
        for chunk, word in words.items():
            for pair in pairwise(word):
                counts[pair] += chunk_counts[chunk]
        if not counts or max(counts.values()) < min_frequency:
            break
        age = {token: position for position, token in enumerate(tokens)}
        best = min(counts, key=lambda pair: (-counts[pair], age[pair[0]], age[pair[1]]))
        merges.append(best)
        tokens.append(best[0] + best[1])
        words = {chunk: merge_everywhere(word, best) for chunk, word in words.items()}
    return tokens, merges


def encode(chunk: bytes, merges: list[Pair]) -> list[bytes]:
    """Cut one chunk into tokens: always the earliest-learned merge that fits, leftmost first.

    >>> encode(b"banana", [(b"a", b"n"), (b"an", b"an")])
    [b'b', b'anan', b'a']
    """
    rank = {pair: position for position, pair in enumerate(merges)}
    word = split_bytes(chunk)
    while True:
        known = [(rank[pair], place) for place, pair in enumerate(pairwise(word)) if pair in rank]
        if not known:
            return word
        _, place = min(known)
        word[place : place + 2] = [word[place] + word[place + 1]]


def merge_everywhere(word: list[bytes], pair: Pair) -> list[bytes]:
    """Glue every occurrence of ``pair``, from left to right.

    >>> merge_everywhere([b"a", b"a", b"a"], (b"a", b"a"))
    [b'aa', b'a']
    """
    merged: list[bytes] = []
    place = 0
    while place < len(word):
        if tuple(word[place : place + 2]) == pair:
            merged.append(word[place] + word[place + 1])
            place += 2
        else:
            merged.append(word[place])
            place += 1
    return merged


def split_bytes(data: bytes) -> list[bytes]:
    """Every byte as a token of its own."""
    return [bytes([byte]) for byte in data]

"""What a run learns from, to look at: one example with what is learnt in it, and figures of all of them."""

# T tokens

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.data import Dropped
from groundup.posttraining.encoding import Example
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.describe import escaped

if TYPE_CHECKING:
    from rich.text import Text

MOST_TOKENS = 512  # of an example that are shown
BEGIN, END = ">>>", "<<<"  # around what is learnt, where there are no colours
LEARNT, SPECIAL, LEFT_OUT = "green", "dim", "dim italic"  # styles


@dataclass(frozen=True)
class Piece:
    """A part of an example that is shown in one way.

    Args:
        text: printable, but for line breaks and tabs.
        learnt: whether it is to be learnt.
        special: whether it is a special token.
        note: whether it stands for tokens that are left out.
    """

    text: str
    learnt: bool = False
    special: bool = False
    note: bool = False


def pieces(tokenizer: Tokenizer, example: Example, most: int = MOST_TOKENS) -> list[Piece]:
    """An example in parts, none of which begins or ends inside a character.

    Args:
        tokenizer: that made it.
        example: its ids, and what is learnt.
        most: tokens that are shown; of a longer example the middle is left out, up to whole characters.
    """
    groups = _characters(tokenizer, example)
    if len(example.ids) <= most:
        return _joined(groups)
    head = _fitting(groups, (most + 1) // 2)
    tail = _fitting(groups[::-1], most // 2)
    left_out = sum(size for _, size in groups[head : len(groups) - tail])
    note = Piece(f" … {left_out:,} tokens … ", note=True), 0
    return _joined([*groups[:head], note, *groups[len(groups) - tail :]])


def preview(tokenizer: Tokenizer, example: Example, most: int = MOST_TOKENS) -> Text:
    """An example in colours: what is learnt is green, special tokens are dim.

    Args:
        tokenizer, example, most: as for :func:`pieces`.
    """
    from rich.text import Text

    view = Text()
    for piece in pieces(tokenizer, example, most):
        styles = [LEARNT] * piece.learnt + [SPECIAL] * piece.special + [LEFT_OUT] * piece.note
        view.append(piece.text, style=" ".join(styles))
    return view


def plain_preview(tokenizer: Tokenizer, example: Example, most: int = MOST_TOKENS) -> str:
    """An example for where there are no colours: what is learnt stands between ``>>>`` and ``<<<``.

    Args:
        tokenizer, example, most: as for :func:`pieces`.
    """
    shown, learning = [], False
    for piece in pieces(tokenizer, example, most):
        if piece.learnt != learning:
            shown.append(BEGIN if piece.learnt else END)
        learning = piece.learnt
        shown.append(piece.text)
    return "".join([*shown, END] if learning else shown)


def summary(
    form: str, examples: Sequence[Example], dropped: Iterable[Dropped] = (), packing: Mapping[str, Any] | None = None
) -> list[str]:
    """What a run learns from, as lines of a name and what there is to say.

    Args:
        form: that the records have.
        examples: what is learnt from.
        dropped: what was left out.
        packing: the report of an :class:`~groundup.posttraining.ExampleLoader`.
    """
    reasons = Counter(one.reason for one in dropped)
    rows = {"form": form, "examples": f"{len(examples):,}"}
    if examples:
        sizes = [len(example.ids) for example in examples]
        learnt, longest = sum(int(example.learn.sum()) for example in examples), int(np.argmax(sizes))
        rows["tokens"] = f"{sum(sizes):,}, of which {learnt:,} ({learnt / sum(sizes):.1%}) are learnt"
        rows["longest"] = f"{sizes[longest]:,} tokens ({examples[longest].where}), half have at most {_median(sizes):,}"
    listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    rows["left out"] = f"{reasons.total():,}: {listed}" if listed else "none"
    if packing is not None:
        way = {"best_fit": "packed by best fit", "padded": "an example to a row"}[packing["packing"]]
        rows["packing"] = f"{way}: {packing['rows']:,} rows, {packing['padding']:.1%} of their positions empty"
    return [f"{name:<10}{value}" for name, value in rows.items()]


# ---- how it is cut


def _characters(tokenizer: Tokenizer, example: Example) -> list[tuple[Piece, int]]:
    """The smallest groups of tokens that hold whole characters, each with how many tokens it has.

    Bytes that are no characters are shown as one that stands for them.
    """
    special = set(tokenizer.special_tokens.values())
    groups: list[tuple[Piece, int]] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, size, learnt = "", 0, False

    def close() -> None:
        nonlocal text, size, learnt
        text += decoder.decode(b"", final=True)
        if size:
            groups.append((Piece(_printable(text), learnt), size))
        text, size, learnt = "", 0, False

    for place, (token, learn) in enumerate(zip(example.ids.tolist(), example.learn.tolist(), strict=True)):
        data = tokenizer.decode_bytes([token], continued=place > 0 and example.ids[place - 1] not in special)
        if token in special:
            close()
            groups.append((Piece(_printable(data.decode()), learn, special=True), 1))
            continue
        text, size, learnt = text + decoder.decode(data), size + 1, learnt or learn
        if not decoder.getstate()[0]:
            close()
    close()
    return groups


def _joined(groups: Iterable[tuple[Piece, int]]) -> list[Piece]:
    """Groups, those that follow one another and look alike in one."""
    found: list[Piece] = []
    for piece, _ in groups:
        last = found[-1] if found else None
        if last and (last.learnt, last.special, last.note) == (piece.learnt, piece.special, piece.note):
            found[-1] = Piece(last.text + piece.text, piece.learnt, piece.special, piece.note)
        else:
            found.append(piece)
    return found


def _fitting(groups: Sequence[tuple[Piece, int]], most: int) -> int:
    """How many groups from the beginning on have at most this many tokens together."""
    sizes = np.cumsum([size for _, size in groups])
    return int(np.searchsorted(sizes, most, side="right"))


def _printable(text: str) -> str:
    """A text that moves no cursor and changes no colour: its other control characters are spelt out."""
    return "".join(c if c.isprintable() or c in "\n\t" else escaped(c.encode()) for c in text)


def _median(sizes: Sequence[int]) -> int:
    """What half of the sizes do not exceed."""
    return sorted(sizes)[(len(sizes) - 1) // 2]

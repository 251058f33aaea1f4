"""Labelled texts as token ids, and as micro-batches in which texts of like length stand together.

Around every text stand the tokens that stood around it in pretraining: before it what begins a document, and behind it,
where the last token is what a classifier looks at, the end-of-text token. That one has seen the whole text, and is the
same for all.
"""

# N texts, or pieces of them   M tokens of all of them   B batch   L positions of a micro-batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from groundup.data import Loader, Permutation, derive_key
from groundup.posttraining.labelled import LabelledText, label_ids
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer
from groundup.training.objectives import LabelledTexts

Pooling = Literal["last", "mean"]
TooLong = Literal["cut", "split", "refuse"]
Int64Array = npt.NDArray[np.int64]

BLOCK_BATCHES = 32  # micro-batches whose texts are sorted by length together
WHOLE = 8  # positions of a micro-batch are a multiple of it: kernels are faster, and meet fewer shapes


class Around(NamedTuple):
    """The token ids that stand before and behind every text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def around(tokenizer: Tokenizer, pooling: Pooling) -> Around:
    """What stands around a text.

    Before it is what stands before every document in training: what the tokenizer's file asks for, such as ``<s>``,
    else the end-of-text token. Behind it, for pooling ``last``, is what the file asks for, else the end-of-text token.
    A tokenizer may have neither.
    """
    parts, end = tokenizer.vocabulary, tokenizer.end_of_text_id
    ends = () if end is None else (end,)
    return Around(tuple(parts.prefix) or ends, (tuple(parts.suffix) or ends) if pooling == "last" else ())


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """Texts as token ids, or pieces of texts.

    Args:
        ids: int64 M, those of one text after the other.
        ends: int64 N, where each ends among them.
        labels: int64 N, the id of each text's class; -1 where it is not known.
        where: N, file and number of each record.
        cut: how many texts did not fit, and lost their end.
        owners: int64 N, ascending: of which text each is a piece; None where each is a whole one.
    """

    ids: Int64Array
    ends: Int64Array
    labels: Int64Array
    where: list[str]
    cut: int = 0
    owners: Int64Array | None = None

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> Int64Array:
        """Tokens of each text, int64 N."""
        return np.diff(self.ends, prepend=0)

    @property
    def labels_of_texts(self) -> Int64Array:
        """The class of each text, however many pieces it has."""
        return self.labels if self.owners is None else self.labels[np.unique(self.owners, return_index=True)[1]]

    def text(self, number: int) -> Int64Array:
        """The ids of one text, or piece."""
        return self.ids[self.ends[number - 1] if number else 0 : self.ends[number]]


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[LabelledText], classes: Sequence[str], context_length: int,
    too_long: TooLong = "cut", *, pooling: Pooling = "mean",
) -> EncodedTexts:  # fmt: skip
    """Labelled texts as token ids, with what stands around them.

    Args:
        classes: their names, as of :func:`groundup.posttraining.labelled.class_names`.
        context_length: positions that the model sees.
        too_long: of a text that does not fit, ``cut`` keeps the head, with what stands around it; ``split`` makes
            pieces of about the same length, each with what stands around it; ``refuse`` ends with a line that names it.
        pooling: what of a text the classifier looks at.

    Raises:
        GroundupError: a text does not fit, or has no token, or its label is none of the classes; the line names it.
        UsageError: the context has no room for any text.
    """
    labels = label_ids(texts, classes)
    ring, split = around(tokenizer, pooling), too_long == "split"
    found = encode_plain(tokenizer, [text.text for text in texts], ring, context_length, split=split)
    tokens, where = found.tokens, [text.where for text in texts]
    longer = np.flatnonzero(tokens > context_length)
    if too_long == "refuse" and len(longer):
        first = int(longer[0])
        raise GroundupError(
            f"{where[first]}: it has {tokens[first]:,} tokens, the context holds {context_length:,}. Give a larger "
            "--context-length, or --too-long split."
        )
    if not tokens.all():
        raise GroundupError(
            f"{where[int(tokens.argmin())]}: its text comes to no token of this tokenizer. Leave it out."
        )
    if split:
        pieces = [where[owner] for owner in found.owners]
        return EncodedTexts(found.ids, found.ends, labels[found.owners], pieces, 0, found.owners)
    return EncodedTexts(found.ids, found.ends, labels, where, len(longer))


class PlainIds(NamedTuple):
    """Texts as token ids: :class:`EncodedTexts` without labels.

    Args:
        ids, ends, owners: as there; a whole text owns itself.
        tokens: int64, of each text before it was cut or split.
    """

    ids: Int64Array
    ends: Int64Array
    owners: Int64Array
    tokens: Int64Array


def pieces_of(sizes: Int64Array, room: int) -> Int64Array:
    """Into how many pieces texts of so many tokens are split, where a row has room for so many."""
    return np.maximum(1, -(-sizes // room))


def encode_plain(
    tokenizer: Tokenizer, texts: Sequence[str], ring: Around, context_length: int, *, split: bool = False
) -> PlainIds:
    """Token ids of texts with those of ``ring`` around each; of a text that does not fit, the head.

    Args:
        split: of a text that does not fit, all of it, in pieces that differ by a token at most.

    Raises:
        UsageError: the context has no room for any text.
    """
    before, after = ring
    room = context_length - len(before) - len(after)
    if room < 1:
        raise UsageError(
            f"context_length = {context_length} has no room for a text: {len(before) + len(after)} tokens stand around "
            "each. Give a larger one."
        )
    raw, offsets = tokenizer.encode_array(texts)
    whole = np.diff(offsets)
    count = pieces_of(whole, room) if split else np.ones(len(whole), np.int64)
    owners = np.repeat(np.arange(len(whole)), count)
    piece = np.arange(len(owners)) - np.repeat(np.cumsum(count) - count, count)
    first = piece * whole[owners] // count[owners]  # of a piece's tokens, in its text
    sizes = np.minimum((piece + 1) * whole[owners] // count[owners] - first, room)
    ends = np.cumsum(sizes + len(before) + len(after))
    begins = ends - len(after) - sizes  # of the text itself
    ids = np.empty(ends[-1] if len(ends) else 0, np.int64)
    for place, token in enumerate(before):
        ids[begins - len(before) + place] = token
    for place, token in enumerate(after):
        ids[ends - len(after) + place] = token
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ids[np.repeat(begins, sizes) + within] = raw[np.repeat(offsets[:-1][owners] + first, sizes) + within]
    return PlainIds(ids, ends.astype(np.int64), owners, (whole + len(before) + len(after)).astype(np.int64))


def width(longest: npt.ArrayLike, context_length: int) -> Any:
    """L, the positions of a micro-batch whose longest text has so many tokens; whole arrays at once, too."""
    return np.minimum(-(-np.asarray(longest) // WHOLE) * WHOLE, context_length)


def pad_texts(
    texts: EncodedTexts, numbers: npt.NDArray[np.integer], context_length: int, pad: int = 0
) -> tuple[Int64Array, Int64Array]:
    """Some texts as rows, padded on the right: ids int64 B L, and lengths int64 B.

    L is the longest one's length, rounded up to a multiple of 8 that the context holds.
    """
    rows = [texts.text(int(number)) for number in numbers]
    lengths_B = np.array([len(row) for row in rows], np.int64)
    ids_BL = np.full((len(rows), int(width(lengths_B.max(), context_length))), pad, np.int64)
    for place, row in enumerate(rows):
        ids_BL[place, : len(row)] = row
    return ids_BL, lengths_B


class TextLoader(Loader):
    """Deals texts and their classes: :class:`groundup.training.LabelledTexts` of NumPy arrays.

    The texts of an epoch come in the order of a keyed permutation. Blocks of 32 micro-batches of them are sorted by
    length, so that a micro-batch has texts of like length and little is padded, and a block's micro-batches are dealt
    in shuffled order. Which texts make micro-batch i hangs on the seed and on i; one that lies across two epochs ends
    the first and begins the second.

    Args:
        texts: to learn from.
        context_length: the longest row.
        batch_size: B, texts of a micro-batch. Texts stay in the order that it decides on when the loader is resized.
        seed: of the order.
        pad: the id in empty positions, which no text attends to.

    Raises:
        GroundupError: there is no text.
    """

    def __init__(self, texts: EncodedTexts, context_length: int, batch_size: int, seed: int, *, pad: int = 0) -> None:
        super().__init__(context_length, batch_size, seed)
        if not len(texts):
            raise GroundupError("there is no labelled text to learn from. Give more, or look at what was left out.")
        self.texts, self.pad, self.together = texts, pad, batch_size
        self.lengths = texts.lengths
        if self.lengths.max() > context_length:
            raise ValueError(f"a text of {self.lengths.max()} tokens in rows of {context_length}")
        self._orders: dict[int, Int64Array] = {}

    def samples(self, first: int, count: int) -> Any:
        """The texts ``first`` to ``first + count``: ids int64 B L, lengths and labels int64 B."""
        numbers = np.array([self._number(sample) for sample in range(first, first + count)])
        ids, lengths = pad_texts(self.texts, numbers, self.context_length, self.pad)
        labels: Any = self.texts.labels[numbers]
        rows: tuple[Any, Any] = ids, lengths
        return LabelledTexts(*rows, labels)

    def epoch_of(self, sample: int) -> int:
        """The epoch that a text belongs to, from 0."""
        return sample // len(self.texts)

    def report(self) -> dict[str, Any]:
        """Of epoch 0: ``padding``, the part of all positions that is empty; ``texts``, and those that were cut."""
        lengths = self.lengths[self._order(0)]
        begins = np.arange(0, len(lengths), self.batch_size)
        rows = np.diff(np.append(begins, len(lengths)))
        positions = int((width(np.maximum.reduceat(lengths, begins), self.context_length) * rows).sum())
        return {
            "packing": "padded", "texts": len(self.texts), "documents_cut": self.texts.cut,
            "padding": 1 - int(lengths.sum()) / positions,
        }  # fmt: skip

    def _number(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self.texts))
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> Int64Array:
        """The texts of an epoch, in order."""
        order = self._orders.get(epoch)
        if order is None:
            order = self._sorted(epoch)
            self._orders = {epoch: order}  # an epoch at a time; put in place whole, for another thread may ask too
        return order

    def _sorted(self, epoch: int) -> Int64Array:
        count, size = len(self.texts), self.together
        order = Permutation(count, derive_key(self.seed, epoch))(np.arange(count))
        # What stands at either end of an epoch shares a micro-batch with another epoch, and is not sorted.
        head = min(-epoch * count % size, count)
        tail = head + (count - head) // size * size
        parts = [order[:head]]
        for number, begin in enumerate(range(head, tail, BLOCK_BATCHES * size)):
            block = order[begin : min(begin + BLOCK_BATCHES * size, tail)]
            batches = block[np.argsort(self.lengths[block], kind="stable")].reshape(-1, size)
            dealt = Permutation(len(batches), derive_key(self.seed, epoch, 9, number))(np.arange(len(batches)))
            parts.append(batches[dealt].reshape(-1))
        return np.concatenate([*parts, order[tail:]])

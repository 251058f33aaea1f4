"""Whole documents, packed into rows so that little is cut and little is left empty.

Windows of the running text cut most documents that are about as long as a window, and what a model reads then lacks
its beginning. Best-fit packing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling") cuts only documents
that are longer than a row, into rows and a rest; documents and rests are put, the longest first, where they fit with
the least room left.

A document takes as many positions as it has tokens with its end-of-text id: inputs are the end-of-text id that opens
it and its tokens, targets its tokens and the end-of-text id that closes it. So every token of the corpus is learnt
once per epoch, also the first of a rest, which sees the one before it.
"""

# B batch   T positions

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.data.batch import IGNORED, Loader, TokenBatch
from groundup.data.fim import SENTINELS, Cuts, FillInTheMiddle
from groundup.data.permutation import Permutation, derive_key
from groundup.data.shards import TokenSet
from groundup.runtime import GroundupError

BLOCK_DOCUMENTS = 16_384  # packed together: more would leave hardly less room, and take longer to plan
_PLANS_KEPT = 4

Int64Array = npt.NDArray[np.int64]


def best_fit(sizes: Int64Array, capacity: int) -> tuple[Int64Array, int]:
    """Best-fit-decreasing bin packing: the longest first, each into the fullest row that still has room for it.

    Pieces of one size are placed together: a row that takes one of them is then the fullest, and takes more until it
    has no room for another. So the work grows with the number of different sizes, not with that of pieces alone.

    Args:
        sizes: int64 [P], each from 1 to ``capacity``.
        capacity: of a row.

    Returns:
        The row of each piece, int64 [P], and how many rows there are.
    """
    rows_of = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    borders = np.flatnonzero(np.diff(sizes[order])) + 1
    open_rows: dict[int, list[int]] = {}  # rows with so much room left
    rooms: list[int] = []  # its keys, ascending
    n_rows = 0
    for pieces in np.split(order, borders) if len(order) else ():
        size, placed = int(sizes[pieces[0]]), 0
        while placed < len(pieces):
            left = len(pieces) - placed
            at = bisect.bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms[at]
                per_row = room // size
                fullest = open_rows[room]
                rows = [fullest.pop() for _ in range(min(len(fullest), -(-left // per_row)))]
                if not fullest:
                    del open_rows[room], rooms[at]
            else:
                room = capacity
                per_row = room // size
                rows = list(range(n_rows, n_rows - (-left // per_row)))
                n_rows += len(rows)
            taken = min(left, per_row * len(rows))
            rows_of[pieces[placed : placed + taken]] = np.repeat(rows, per_row)[:taken]
            placed += taken
            in_last = taken - per_row * (len(rows) - 1)
            for rest, some in ((room - per_row * size, rows[:-1]), (room - in_last * size, rows[-1:])):
                if rest and some:
                    if rest not in open_rows:
                        open_rows[rest] = []
                        bisect.insort(rooms, rest)
                    open_rows[rest] += some
    return rows_of, n_rows


@dataclass(frozen=True)
class _Plan:
    """How one block of documents lies in rows. Row r holds the pieces ``first[r]`` to ``first[r + 1]``.

    Args:
        first: int64 [rows + 1].
        starts: int64 [P]: where in the corpus the first target of each piece lies.
        lengths: int64 [P]: its tokens.
        cuts: how they become fill-in-the-middle examples, three tokens longer; None where none does.
        documents: documents of the block.
        cut: those of them that are longer than a row.
    """

    first: Int64Array
    starts: Int64Array
    lengths: Int64Array
    cuts: Cuts | None
    documents: int
    cut: int

    @property
    def rearranged(self) -> int:
        """How many pieces become fill-in-the-middle examples."""
        return 0 if self.cuts is None else int(self.cuts.chosen.sum())


class PackedLoader(Loader):
    """Deals rows of whole documents.

    The documents of an epoch come in the order of a keyed permutation. Blocks of 16,384 of them are packed, each by
    itself, and its rows are dealt in shuffled order. How a block is packed depends on seed, epoch and its number alone,
    but how many rows it makes is known only afterwards: to find a sample, the lengths of all documents before it are
    packed first, once. No token is read for that, and a million documents take about a second; so long does it take
    until a run that resumes behind a million documents gets its first batch.

    Attention must be kept inside the documents of a row: they are numbered. What is empty at the end of a row is a
    document of its own, of end-of-text ids, with no targets.

    Args:
        tokens: the corpus.
        context_length: T, positions of a row.
        batch_size: B, rows per micro-batch.
        seed: of the order.
        fill: turns documents into fill-in-the-middle examples; room for the sentinels is made, nothing is lost.
        block_documents: documents packed together.

    Raises:
        GroundupError: the corpus holds no document, or rows have no room for the sentinels.
    """

    def __init__(
        self, tokens: TokenSet, context_length: int, batch_size: int, seed: int, fill: FillInTheMiddle | None = None,
        block_documents: int = BLOCK_DOCUMENTS,
    ) -> None:  # fmt: skip
        super().__init__(context_length, batch_size, seed)
        self.tokens, self._fill, self._block_documents = tokens, fill, block_documents
        self._borders = np.append(tokens.document_starts(), tokens.n_tokens)  # of documents: int64 [D + 1]
        self._n_documents = len(self._borders) - 1
        if not self._n_documents:
            raise GroundupError(f"{tokens.folder}: there is no document in it. Give more text.")
        self._most = context_length - (SENTINELS if fill else 0)
        if self._most < 1:
            raise GroundupError(
                f"a context_length of {context_length} has no room for the {SENTINELS} tokens of fill-in-the-middle. "
                f"Use at least {SENTINELS + 1}."
            )
        self._n_blocks = -(-self._n_documents // block_documents)
        self._ends = [0]  # rows before each block, counted over all epochs; grows as far as samples are asked for
        self._totals = dict.fromkeys(("rows", "tokens", "pieces", "documents", "documents_cut", "rearranged"), 0)
        self._plans: OrderedDict[int, _Plan] = OrderedDict()
        self._lock = threading.Lock()  # a prefetching thread asks for samples while another asks for the epoch

    def samples(self, first: int, count: int) -> TokenBatch:
        """The rows ``first`` to ``first + count``: int64 [count, T]."""
        shape = count, self.context_length
        inputs, targets = np.full(shape, self.tokens.end_of_text_id, np.int64), np.full(shape, IGNORED, np.int64)
        begins = np.zeros(shape, np.int64)
        of_inputs: list[Int64Array] = []
        of_targets: list[Int64Array] = []
        starts: list[int] = []
        for row in range(count):
            _, plan, place = self._find(first + row)
            filled = 0
            pieces = slice(plan.first[place], plan.first[place + 1])
            lengths = plan.lengths[pieces].tolist()
            for piece, start in enumerate(plan.starts[pieces].tolist()):
                begins[row, filled] = 1
                if plan.cuts is not None and plan.cuts.chosen[pieces.start + piece]:
                    ids = self._rearranged(start, lengths[piece], plan.cuts, pieces.start + piece)
                    end = filled + len(ids) - 1
                    inputs[row, filled:end], targets[row, filled:end] = ids[:-1], ids[1:]
                else:
                    end = filled + lengths[piece]
                    of_inputs.append(inputs[row, filled:end])
                    of_targets.append(targets[row, filled:end])
                    starts.append(start)
                filled = end
            if filled < self.context_length:
                begins[row, filled] = 1
        at = np.array(starts, np.int64)
        self.tokens.fill(of_inputs, (at - 1) % self.tokens.n_tokens, within=inputs)
        self.tokens.fill(of_targets, at, within=targets)
        return TokenBatch(inputs, targets, np.cumsum(begins, axis=1) - 1)

    def epoch_of(self, sample: int) -> int:
        """The epoch that a row belongs to, from 0; all blocks before it are packed first."""
        return self._find(sample)[0] // self._n_blocks

    def report(self) -> dict[str, Any]:
        """Of what was packed of epoch 0 so far: rows, the empty part of them, documents, those that are cut."""
        if len(self._ends) == 1:
            self._find(0)
        rows = self._totals["rows"]
        padding = 1 - self._totals["tokens"] / (rows * self.context_length)
        return {"packing": "best_fit", "padding": padding, **self._totals}

    def _rearranged(self, start: int, length: int, cuts: Cuts, piece: int) -> Int64Array:
        """The tokens of a piece as a fill-in-the-middle example, the one before it first: int64 [length + 4]."""
        assert self._fill is not None
        ids = np.empty((1, length + 1), np.int64)
        self.tokens.fill(ids, np.array([(start - 1) % self.tokens.n_tokens]))
        closes = self._borders[np.searchsorted(self._borders, start + length)] == start + length
        end = length if closes else length + 1  # where a document closes, its end-of-text id stays behind all else
        how = int(cuts.first[piece]), int(cuts.second[piece]), bool(cuts.suffix_first[piece])
        return np.concatenate([ids[0, :1], self._fill.rearrange(ids[0, 1:end], *how), ids[0, end:]])

    def _find(self, sample: int) -> tuple[int, _Plan, int]:
        """The block of a row, counted over all epochs, its plan, and the row's number in it."""
        with self._lock:
            while self._ends[-1] <= sample:
                number = len(self._ends) - 1
                plan = self._keep(number, self._pack(number))
                self._ends.append(self._ends[-1] + len(plan.first) - 1)
                if number < self._n_blocks:
                    self._count(plan)
            number = bisect.bisect_right(self._ends, sample) - 1
            plan = self._plans.get(number) or self._keep(number, self._pack(number))
            return number, plan, sample - self._ends[number]

    def _keep(self, number: int, plan: _Plan) -> _Plan:
        self._plans[number] = plan
        if len(self._plans) > _PLANS_KEPT:
            self._plans.popitem(last=False)
        return plan

    def _count(self, plan: _Plan) -> None:
        totals = self._totals
        totals["rows"] += len(plan.first) - 1
        totals["rearranged"] += plan.rearranged
        totals["tokens"] += int(plan.lengths.sum()) + SENTINELS * plan.rearranged
        totals["pieces"] += len(plan.starts)
        totals["documents"] += plan.documents
        totals["documents_cut"] += plan.cut

    def _pack(self, number: int) -> _Plan:
        """Pack block ``number``, counted over all epochs."""
        epoch, block = divmod(number, self._n_blocks)
        first_place = block * self._block_documents
        places = np.arange(first_place, min(first_place + self._block_documents, self._n_documents))
        documents = Permutation(self._n_documents, derive_key(self.seed, epoch))(places)
        begins = self._borders[documents]
        sizes = self._borders[documents + 1] - begins
        n_pieces = -(-sizes // self._most)
        of_document = np.repeat(np.arange(len(documents)), n_pieces)
        inside = self._most * (np.arange(len(of_document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces))
        starts = begins[of_document] + inside
        lengths = np.minimum(sizes[of_document] - inside, self._most)
        cuts, taken = None, lengths
        if self._fill is not None:
            content = lengths - (inside + lengths == sizes[of_document])  # without the end-of-text id
            cuts = self._fill.draw(epoch, starts, content)
            cuts = cuts._replace(chosen=cuts.chosen & (content > 0))
            taken = lengths + SENTINELS * cuts.chosen
        rows_of, n_rows = best_fit(taken, self.context_length)
        # Best fit puts the longest documents into the first rows: those are dealt in another order.
        rows_of = Permutation(n_rows, derive_key(self.seed, epoch, 8, block))(rows_of)
        order = np.argsort(rows_of, kind="stable")
        first = np.concatenate([[0], np.cumsum(np.bincount(rows_of, minlength=n_rows))])
        cut = int(np.count_nonzero(n_pieces > 1))
        cuts = cuts and cuts.ordered(order)
        return _Plan(first, starts[order], lengths[order], cuts, len(documents), cut)

"""Fill-in-the-middle: documents rearranged so that a model learns to write what is missing between two texts.

After Bavarian et al. 2022, "Efficient training of language models to fill in the middle". A document is cut at two
places into prefix, middle and suffix, and becomes (their section 3)

    PSM   <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle
    SPM   <|fim_prefix|> <|fim_suffix|> suffix <|fim_middle|> prefix middle

and the end-of-text id stays behind it: it then says that the middle has reached the suffix. They cut between
characters; here the cut is between tokens, since shards hold no characters. A model so trained completes best where
the prompt ends with a token, not inside a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from groundup.data.permutation import derive_key, fractions
from groundup.runtime import UsageError

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

SENTINEL_TOKENS = PREFIX, MIDDLE, SUFFIX = "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"
SENTINELS = 3  # tokens that a rearranged document has more

Int64Array = npt.NDArray[np.int64]


class Cuts(NamedTuple):
    """What becomes of P documents.

    Args:
        chosen: bool [P]: whether it is rearranged.
        suffix_first: bool [P]: in the order SPM.
        first, second: int64 [P]: tokens before the middle and before the suffix.
    """

    chosen: npt.NDArray[np.bool_]
    suffix_first: npt.NDArray[np.bool_]
    first: Int64Array
    second: Int64Array

    def ordered(self, order: Int64Array) -> Cuts:
        """The same for the documents in another order."""
        return Cuts(self.chosen[order], self.suffix_first[order], self.first[order], self.second[order])


@dataclass(frozen=True)
class FillInTheMiddle:
    """Which documents are rearranged, and how: a function of seed, epoch and the place of a document in the corpus.

    Args:
        prefix_id, middle_id, suffix_id: of the three sentinels.
        rate: part of the documents that is rearranged; the others stay as they are.
        spm_rate: part of those that put the suffix first.
        seed: of the choices.
    """

    prefix_id: int
    middle_id: int
    suffix_id: int
    rate: float
    spm_rate: float
    seed: int

    @classmethod
    def with_tokens_of(cls, tokenizer: Tokenizer, rate: float, spm_rate: float, seed: int) -> FillInTheMiddle:
        """Look the sentinels up.

        Raises:
            UsageError: the tokenizer has none; the message says how to train one that has.
        """
        known = tokenizer.special_tokens
        if missing := [name for name in (PREFIX, MIDDLE, SUFFIX) if name not in known]:
            raise UsageError(
                f"loader.fim_rate = {rate}: the tokenizer lacks {', '.join(missing)}. Train one that has them: "
                f"groundup tokenizer train --special-tokens '<|endoftext|>,{PREFIX},{MIDDLE},{SUFFIX}', "
                "and prepare the data with it (tokenizer.path)."
            )
        return cls(known[PREFIX], known[MIDDLE], known[SUFFIX], rate, spm_rate, seed)

    def draw(self, epoch: int, places: Int64Array, lengths: Int64Array) -> Cuts:
        """What becomes of the documents (or pieces of them) that begin at these places of the corpus.

        Args:
            epoch: the epoch.
            places: int64 [P].
            lengths: int64 [P]: their tokens, without end-of-text ids.
        """
        chance = [fractions(places, derive_key(self.seed, epoch, 4 + number)) for number in range(4)]
        one, other = ((part * (lengths + 1)).astype(np.int64) for part in chance[2:])
        return Cuts(
            chance[0] < self.rate, chance[1] < self.spm_rate, np.minimum(one, other), np.maximum(one, other)
        )  # fmt: skip

    def rearrange(self, ids: Int64Array, first: int, second: int, suffix_first: bool) -> Int64Array:
        """A document (or a piece of one) of n tokens, rearranged: n + 3 tokens.

        Args:
            ids: int64 [n], no end-of-text id among them.
            first, second: where it is cut.
            suffix_first: whether in the order SPM.
        """
        after = len(ids) - second
        result = np.empty(len(ids) + SENTINELS, np.int64)
        result[0] = self.prefix_id
        at = 1 if suffix_first else first + 1  # of the sentinel before the suffix
        result[at], result[at + after + 1] = self.suffix_id, self.middle_id
        result[at + 1 : at + after + 1] = ids[second:]
        if suffix_first:
            result[at + after + 2 :] = ids[:second]
        else:
            result[1:at], result[at + after + 2 :] = ids[:first], ids[first:second]
        return result

    def rearrange_windows(
        self, windows_BL: Int64Array, end_of_text_id: int, epochs: Int64Array, starts: Int64Array
    ) -> None:
        """Rearrange the chosen documents of windows in place.

        A window's length stays: a rearranged document loses its last three tokens to the sentinels. Documents of
        fewer than four tokens stay as they are.

        Args:
            windows_BL: stretches of the corpus.
            end_of_text_id: what stands between documents.
            epochs: int64 [B]: the epoch of each window.
            starts: int64 [B]: where in the corpus each window starts.
        """
        length = windows_BL.shape[1]
        flat = windows_BL.reshape(-1)
        is_end = windows_BL == end_of_text_id
        ends = np.flatnonzero(np.pad(is_end, ((0, 0), (0, 1)), constant_values=True))  # a window's end is one, too
        rows, ends = ends // (length + 1), ends - ends // (length + 1)
        begins = np.concatenate([[0], ends[:-1] + (np.diff(rows) == 0)])
        for epoch in np.unique(epochs).tolist():
            of_epoch = np.flatnonzero((epochs[rows] == epoch) & (ends - begins > SENTINELS))
            places = starts[rows[of_epoch]] + begins[of_epoch] - rows[of_epoch] * length
            cuts = self.draw(epoch, places, ends[of_epoch] - begins[of_epoch] - SENTINELS)
            parts = (begins[of_epoch], ends[of_epoch], cuts.first, cuts.second, cuts.suffix_first)
            for begin, end, *how in zip(*(part[cuts.chosen].tolist() for part in parts), strict=True):
                flat[begin:end] = self.rearrange(flat[begin : end - SENTINELS], *how)

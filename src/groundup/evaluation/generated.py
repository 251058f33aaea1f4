"""How near generated answers are to given ones, and whether they have the form that was asked for.

BLEU is sacrebleu's (Post 2018). ROUGE is written out here, since it is short: it equals the package ``rouge-score`` on
text in ASCII letters and digits; the words of other scripts, which that package throws away, count here too.

Such measures compare words. Of answers that say the same otherwise they know nothing: for those ask a judge.
"""

# M words of one text   N words of the other

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from groundup.runtime import GroundupError, UsageError

LOOP = 0.5  # an answer more than half of whose 4-grams stood in it before is in a loop

_WORD = re.compile(r"[^\W_]+")
# Writing without spaces, and a loop without any, is cut into parts of a length that hardly a word exceeds.
_PART = re.compile(r"\w{1,20}|[^\w\s]")


# ---- beside the answers that were given


@dataclass(frozen=True)
class Nearness:
    """Generated answers beside the given ones, over all of them.

    Args:
        bleu: of the whole corpus, 0 to 100 (Papineni et al. 2002); None without sacrebleu.
        rouge1, rouge2: shared words and pairs of words, F1, mean over answers, 0 to 1 (Lin 2004, section 2).
        rouge_l: longest common subsequence of words, F1, mean over answers, 0 to 1 (Lin 2004, section 3.1).
        exact_match: share of answers that are the given ones but for white space.
        length_ratio: characters of all answers, divided by those of the given ones.
        answers: how many there are.
    """

    bleu: float | None
    rouge1: float
    rouge2: float
    rouge_l: float
    exact_match: float
    length_ratio: float
    answers: int


def nearness(answers: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> Nearness:
    """Measure generated answers against the given ones.

    Args:
        answers: what was generated.
        references: for each of them the answer that was given.
        tokenize: how sacrebleu cuts text into words: 13a, or zh, ja-mecab, char … for writing without spaces.

    Raises:
        UsageError: there are not as many of one as of the other, or ``tokenize`` is unknown to sacrebleu.
        GroundupError: there are none.
    """
    _paired(answers, references)
    try:
        import sacrebleu  # noqa: F401 - whether it is there
    except ImportError:
        score = None
    else:
        score = bleu(answers, references, tokenize=tokenize)
    pairs = list(zip(answers, references, strict=True))
    words = [(words_of(answer), words_of(reference)) for answer, reference in pairs]
    given = sum(map(len, references))
    return Nearness(
        bleu=score,
        rouge1=_mean(rouge_n(ours, theirs, 1) for ours, theirs in words),
        rouge2=_mean(rouge_n(ours, theirs, 2) for ours, theirs in words),
        rouge_l=_mean(rouge_l(ours, theirs) for ours, theirs in words),
        exact_match=_mean(float(answer.split() == reference.split()) for answer, reference in pairs),
        length_ratio=sum(map(len, answers)) / given if given else float("inf"),
        answers=len(answers),
    )


def bleu(answers: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> float:
    """BLEU of a corpus, 0 to 100, as sacrebleu computes it (Post 2018): up to 4 words, smoothed where none are shared.

    Raises:
        UsageError, GroundupError: as for :func:`nearness`; or sacrebleu is not installed.
    """
    _paired(answers, references)
    try:
        import sacrebleu
    except ImportError as error:
        raise UsageError("BLEU needs the package sacrebleu: pip install 'groundup[finetune]'") from error
    if tokenize not in sacrebleu.BLEU.TOKENIZERS:
        known = ", ".join(sorted(map(str, sacrebleu.BLEU.TOKENIZERS)))
        raise UsageError(f"BLEU has no tokenizer {tokenize!r}. Known: {known}.")
    return float(sacrebleu.corpus_bleu(list(answers), [list(references)], tokenize=tokenize).score)


def words_of(text: str) -> list[str]:
    """The words that ROUGE compares: runs of letters and digits, in lower case, not stemmed."""
    return _WORD.findall(text.lower())


def rouge_n(answer: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F1 of the runs of ``n`` words that two texts share, each as often as in the one that has it less often.

    Lin 2004, section 2, with precision beside recall; 0 where one of them has no such run.
    """
    ours, theirs = Counter(_runs(answer, n)), Counter(_runs(reference, n))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two texts' words (Lin 2004, section 3.1); 0 where one has none."""
    return _f1(common_subsequence(answer, reference), len(answer), len(reference))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, in N steps on numbers of M bits (Hyyrö 2004, "Bit-parallel
    LCS-length computation revisited").

    Bit i of ``row`` is 0 where the length grows from the first i words of ``one`` to the first i + 1.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(one)) - 1
    row = everything
    for word in other:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(one) - row.bit_count()


# ---- the form that was asked for


@dataclass(frozen=True)
class Adherence:
    """How many answers keep to a form: shares, 0 to 1; None where it was not asked for.

    Args:
        valid_json: are one JSON value, with nothing around it.
        fits_pattern: fit a regular expression as a whole.
        ends_itself: were ended by the model, and not by the limit of tokens.
        without_loop: repeat at most half of their 4-grams.
        repetition: the share of 4-grams that stood in the answer before, mean over answers.
        answers: how many there are.
    """

    valid_json: float | None
    fits_pattern: float | None
    ends_itself: float | None
    without_loop: float
    repetition: float
    answers: int


def adherence(
    answers: Sequence[str], *, as_json: bool = False, pattern: str | None = None,
    finishes: Sequence[str | None] | None = None,
) -> Adherence:  # fmt: skip
    """Count the answers that keep to a form. White space around an answer never counts.

    Args:
        answers: what was generated.
        as_json: whether they are to be JSON.
        pattern: a regular expression that they are to fit.
        finishes: why each of them ended, as the engine tells it.

    Raises:
        UsageError: the pattern does not compile, or there are not as many ``finishes`` as answers.
        GroundupError: there are no answers.
    """
    if not answers:
        _nothing()
    if finishes is not None and len(finishes) != len(answers):
        raise UsageError(f"{len(answers)} answers and {len(finishes)} reasons why they ended: give one for each.")
    try:
        expression = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UsageError(f"pattern {pattern!r} is no regular expression: {error}.") from error
    repeated = [repetition(answer) for answer in answers]
    texts = [answer.strip() for answer in answers]
    return Adherence(
        valid_json=_mean(map(is_json, texts)) if as_json else None,
        fits_pattern=_mean(expression.fullmatch(text) is not None for text in texts) if expression else None,
        ends_itself=None if finishes is None else _mean(end in ("end_of_text", "stopped") for end in finishes),
        without_loop=_mean(share <= LOOP for share in repeated),
        repetition=_mean(repeated),
        answers=len(answers),
    )


def is_json(text: str) -> bool:
    """Whether a text is one JSON value (RFC 8259, so no NaN and no Infinity), but for white space around it."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def repetition(text: str, n: int = 4) -> float:
    """The share of a text's n-grams that stood in it before: 1 - distinct / all (seq-rep-n of Welleck et al. 2020).

    0 for a text with fewer than n words. Signs count as words, and so do stretches of 20 letters.
    """
    runs = list(_runs(_PART.findall(text), n))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


# ---- small things


def _runs(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[begin:] for begin in range(n)), strict=False)


def _f1(shared: int, ours: int, theirs: int) -> float:
    """The harmonic mean of precision, shared / ours, and recall, shared / theirs."""
    return 2 * shared / (ours + theirs) if shared else 0.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _paired(answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references):
        raise UsageError(f"{len(answers)} answers and {len(references)} to compare them with: give one for each.")
    if not answers:
        _nothing()


def _nothing() -> NoReturn:
    raise GroundupError("there are no answers to measure. Generate some first.")

"""Labelled texts: what a classifier learns from, and what it is measured on.

A record is a text and the name of its class. Which columns hold them is found out by their names, and in a file without
a header line by what stands in them; ``columns`` says it where that fails. A text has one class.
"""

# N texts   C classes

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from groundup.data import Dropped, derive_key, open_records
from groundup.data.dedup import content_key
from groundup.posttraining.conversations import BadRecord, Conversation, Skip, leave_out
from groundup.posttraining.quality import Shared, shared_with_training
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.errors import nearest

# The first of these that a file has; in small letters.
TEXT_COLUMNS = (
    "text", "sentence", "review", "content", "message", "comment", "question", "utterance", "query", "tweet", "sms",
    "post", "body", "document", "description", "headline", "title",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "category", "class", "intent", "sentiment", "target", "topic", "emotion", "polarity", "tag", "rating",
    "stars", "labels",
)  # fmt: skip

LOOKED_AT = 1_000  # records from which the columns are found out
_NAME_LIKE = re.compile(r"(?:[^\W\d][\w./-]*(?: [\w./-]+){0,2})?")  # three words at most; an index has no name
_INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and its class.

    Args:
        where: file and number of the record, for messages.
        text: the text.
        label: the name of its class, never empty.
    """

    where: str
    text: str
    label: str


class Columns(NamedTuple):
    """What the columns of a file are called that hold the text and the label."""

    text: str
    label: str


# ---- reading


def load_labelled(
    spec: str, columns: Mapping[str, str] | None = None, limit: int | None = None, skip: Skip | None = None
) -> list[LabelledText]:
    """Read the labelled texts of a file, a folder or a data set of the hub.

    Args:
        spec: as for :func:`groundup.data.open_records`.
        columns: which column holds what, as in ``{"text": "review", "label": "stars"}``; either may be left out. The
            columns of a file without a header line are called ``1``, ``2`` …
        limit: at most so many records.
        skip: is told of records that are bad; without it the first one ends the reading.

    Raises:
        BadRecord: a record is bad; the line names it.
        UsageError: the columns are not found.
        GroundupError: there is no labelled text, or a file cannot be read.
    """
    left_out: list[Dropped] = []

    def note(dropped: Dropped) -> None:
        left_out.append(dropped)
        assert skip is not None
        skip(dropped)

    records = open_records(spec, limit, headed=_headed(columns or {}))
    texts = list(read_labelled(records, columns, None if skip is None else note))
    if not texts:
        why = f" All {len(left_out):,} records are bad, the first: {left_out[0].detail}" if left_out else ""
        raise GroundupError(f"{spec}: there is no labelled text in it.{why}")
    return texts


def read_labelled(
    records: Iterable[tuple[str, Any]], columns: Mapping[str, str] | None = None, skip: Skip | None = None
) -> Iterator[LabelledText]:
    """Make labelled texts of records.

    Args:
        records: each with its name, such as ``train.csv#12``.
        columns, skip: as for :func:`load_labelled`.

    Raises:
        BadRecord: a record is bad; the line names it.
        UsageError: the columns are not found.
    """
    waiting = iter(records)
    first = list(islice(waiting, LOOKED_AT))
    if not first:
        return
    found = find_columns(first, columns)
    for where, record in chain(first, waiting):
        try:
            yield _labelled(where, record, found)
        except BadRecord as error:
            leave_out(where, error, skip)


def find_columns(records: Sequence[tuple[str, Any]], columns: Mapping[str, str] | None = None) -> Columns:
    """Which columns hold the text and the label.

    By their names; numbered ones by what stands in them: the text is the longest on average, the label the one of the
    others that has the fewest values.

    Args:
        records: some of the file's, at least one.
        columns: what is known already.

    Raises:
        UsageError: it cannot be told, or a column that ``columns`` names is not there.
    """
    where = records[0][0]
    rows = [record for _, record in records if isinstance(record, Mapping)]
    if not rows:
        kind = type(records[0][1]).__name__
        raise UsageError(f"{where}: a {kind}, and not a record with named fields, of which one is a text.")
    names = list(dict.fromkeys(str(name) for row in rows for name in row if name is not None))
    known = _checked(columns or {}, names, where)
    free = [name for name in names if name not in known.values()]
    if all(name.isdigit() for name in names):
        by_length = sorted(free, key=lambda name: -sum(len(str(row.get(name) or "")) for row in rows))
        text = known.get("text") or next(iter(by_length), None)
        others = [name for name in reversed(by_length) if name != text]
        label = known.get("label") or min(
            others, key=lambda name: len({str(row.get(name)) for row in rows}), default=None
        )
    else:
        text = known.get("text") or _known(free, TEXT_COLUMNS)
        label = known.get("label") or _known(free, LABEL_COLUMNS)
    if text is None or label is None:
        missing = "text" if text is None else "label"
        raise UsageError(
            f"{where}: which of its columns ({', '.join(names)[:120]}) holds the {missing} cannot be told. Say it, as "
            "in --columns '{text: review, label: stars}'; in a file without a header line, '{text: 2, label: 1}'."
        )
    return Columns(text, label)


def _headed(columns: Mapping[str, str]) -> Callable[[Sequence[str]], bool]:
    """Tells whether the first line of a file names its columns.

    A line that could be either is taken for names: then they are asked for, and no text is lost unseen.
    """
    given = {str(name) for name in columns.values()}

    def headed(cells: Sequence[str]) -> bool:
        if given:
            return given <= set(cells) or not all(name.isdigit() for name in given)
        names = {cell.strip().casefold() for cell in cells}
        return bool(names & {*TEXT_COLUMNS, *LABEL_COLUMNS}) or all(_NAME_LIKE.fullmatch(name) for name in names)

    return headed


def _checked(columns: Mapping[str, str], names: Sequence[str], where: str) -> dict[str, str]:
    for field, name in columns.items():
        if field not in Columns._fields:
            raise UsageError(f"--columns: {field} is neither text nor label.{nearest(field, Columns._fields)}")
        if str(name) not in names:
            raise UsageError(
                f"{where}: there is no field {str(name)!r} in it (found: {', '.join(names)[:120]})."
                f"{nearest(str(name), names)}"
            )
    return {field: str(name) for field, name in columns.items()}


def _known(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    folded = {name.strip().casefold(): name for name in reversed(names)}
    return next((folded[name] for name in wanted if name in folded), None)


def _labelled(where: str, record: Any, columns: Columns) -> LabelledText:
    if not isinstance(record, Mapping):
        raise BadRecord(f"it is a {type(record).__name__}, and not a record with named fields.")
    if record.get(None):
        raise BadRecord("it has more cells than the file has columns. A cell that holds the separator needs quotes.")
    text = record.get(columns.text)
    if not isinstance(text, str):
        what = "missing" if text is None else f"a {type(text).__name__}, and not a text"
        raise BadRecord(f"its text (field {columns.text}) is {what}.")
    if not text.strip():
        raise BadRecord(f"its text (field {columns.text}) is empty.")
    return LabelledText(where, text, _label(record.get(columns.label), columns.label))


def _label(value: Any, column: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isnan(value):
        return str(int(value)) if value.is_integer() else str(value)  # Parquet and pandas: a column with gaps
    if isinstance(value, (str, int)) and (label := str(value).strip()):
        return label
    if isinstance(value, (list, Mapping)):
        raise BadRecord(f"its label (field {column}) is a {type(value).__name__}: a text has one class here.")
    raise BadRecord(f"its label (field {column}) is missing.")


# ---- classes


def class_names(texts: Iterable[LabelledText]) -> list[str]:
    """The C names of the classes, sorted; whole numbers by their value. A class's id is its place among them.

    Raises:
        GroundupError: there is no text, or one class only.
    """
    counts = Counter(text.label for text in texts)
    if not counts:
        raise GroundupError("there is no labelled text to learn from. Give more data, or look at what was left out.")
    if len(counts) == 1:
        ((label, count),) = counts.items()
        raise GroundupError(
            f"all {count:,} texts have the label {label[:60]!r}: there is nothing to tell apart. Give texts of two "
            "classes at least, or name the column of the label with --columns."
        )
    if all(_INTEGER.fullmatch(label) for label in counts):
        return sorted(counts, key=lambda label: (int(label), label))
    return sorted(counts)


def label_ids(texts: Iterable[LabelledText], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """The class of each text by its id, int64 N.

    Args:
        classes: the names that training has, as of :func:`class_names`.

    Raises:
        GroundupError: a label is none of them; the line names the text.
    """
    ids = {label: number for number, label in enumerate(classes)}
    found: list[int] = []
    for text in texts:
        if text.label not in ids:
            listed = ", ".join(classes[:8]) + (" …" if len(classes) > 8 else "")
            raise GroundupError(
                f"{text.where}: the label {text.label[:60]!r} is none of the {len(classes)} that training has "
                f"({listed}).{nearest(text.label, classes)} Mend it, or give training texts of this class."
            )
        found.append(ids[text.label])
    return np.array(found, np.int64)


# ---- what is held out


class LabelledParts(NamedTuple):
    """What is learnt, what settings are chosen on, what is measured on; each in the order of the file."""

    train: list[LabelledText]
    val: list[LabelledText]
    test: list[LabelledText]


def split_labelled(
    texts: Sequence[LabelledText], test_fraction: float = 0.2, val_fraction: float = 0.0, seed: int = 0
) -> LabelledParts:
    """Hold out a part of each class, the same texts for the same seed whatever order they come in.

    Texts that are the same but for white space stay together, in the stratum of the rarest of their labels; of each
    stratum something stays in training. A class of n texts gives the nearest whole number to its fraction of n, less
    where its repeated texts do not fit.

    Args:
        test_fraction, val_fraction: of the texts of each class; their sum is below 1.
        seed: another seed holds out other texts.

    Raises:
        UsageError: the fractions are none.
        GroundupError: there are too few texts to hold any out.
    """
    shares = {"test": test_fraction, "val": val_fraction}
    if not (min(shares.values()) >= 0 and sum(shares.values()) < 1):
        raise UsageError(
            f"test_fraction = {test_fraction}, val_fraction = {val_fraction}: each is at least 0, both are below 1 "
            "together."
        )
    part_of: dict[int, str] = {}
    for groups in _strata(texts, seed):
        size = sum(map(len, groups))
        free = groups[:-1]  # the last one is learnt
        for part, share in shares.items():
            left, passed_over = round(share * size), []
            for group in free:
                if len(group) > left:
                    passed_over.append(group)
                    continue
                part_of.update(dict.fromkeys(group, part))
                left -= len(group)
            free = passed_over
    parts: dict[str, list[LabelledText]] = {"train": [], "val": [], "test": []}
    for number, text in enumerate(texts):
        parts[part_of.get(number, "train")].append(text)
    for part, share in shares.items():
        if share and not parts[part]:
            raise GroundupError(
                f"{len(texts):,} texts are too few to hold {share:g} of each class out for {part}. Give more, or a "
                f"larger {part}_fraction."
            )
    return LabelledParts(**parts)


def _strata(texts: Sequence[LabelledText], seed: int) -> list[list[list[int]]]:
    """For each label, the groups of equal texts dealt by it, as numbers of texts, ordered by the seed."""
    alike: dict[bytes, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        alike[content_key(text.text)].append(number)
    counts = Counter(text.label for text in texts)
    strata: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    for key, group in alike.items():
        rarest = min((texts[number].label for number in group), key=lambda label: (counts[label], label))
        strata[rarest].append((derive_key(seed, int.from_bytes(key, "big")), group))
    return [[group for _, group in sorted(ranked)] for ranked in strata.values()]


def shared_texts(train: Iterable[LabelledText], held_out: Iterable[LabelledText], near: float = 0.8) -> list[Shared]:
    """Texts that are measured on although they, or nearly they, are learnt: a score on them says little.

    Args:
        near: share of runs of five words from which on two count as the same.
    """
    return shared_with_training(map(_as_conversation, train), map(_as_conversation, held_out), near)


def _as_conversation(text: LabelledText) -> Conversation:
    return Conversation(text.where, [{"role": "text", "content": text.text}])

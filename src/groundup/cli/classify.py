"""``groundup classify MODEL [TEXT …]``: the classes of texts, by a model that was trained to tell them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.cli.arguments import call
from groundup.cli.tables import add_row, figures_table
from groundup.runtime import UsageError, progress
from groundup.runtime.console import console
from groundup.runtime.files import atomic_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from groundup.data import Dropped
    from groundup.posttraining.classifier import Unsorted

TOGETHER = 256  # texts that are held at once
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def classify(
    model: str,
    texts: tuple[str, ...] = (),
    data: str | None = None,
    columns: dict[str, str] | None = None,
    top: int = 1,
    json: bool = False,
    out: Path | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    device: str = "auto",
    precision: str = "float32",
) -> None:
    """Sort texts into the classes that a model has learnt: class, probability and text, a line each.

    Args:
        model: a run that trained a classifier, a checkpoint of it, a folder of transformers' sequence classification,
            or hf:owner/name
        texts: the texts, which may be given right behind the model; the lines of standard input when they are - or
            left out
        data: classify the records of this file, folder or hf:owner/name; where they have labels, the accuracy is told
        columns: of --data, which columns hold what, such as {text: review, label: stars}; found out where it can be
        top: how many of the most probable classes are shown
        json: write a JSON object for each text
        out: write to this file
        limit: classify at most so many
        skip_bad: of --data, leave out records that cannot be used; otherwise the first one ends it
        device: auto, cpu, cuda, cuda:1, mps
        precision: what the model computes in: float32, tf32, bfloat16, float16; auto tries
    """
    if top < 1:
        raise UsageError(f"--top {top}: at least one class is needed.")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least one text is needed.")
    if data is None and (columns or skip_bad):
        raise UsageError(f"--{'columns' if columns else 'skip-bad'} is for the records of --data.")
    if data is not None and texts:
        raise UsageError("give texts or --data, not both.")
    if data is None and not texts and sys.stdin.isatty():
        raise UsageError('groundup classify needs a text: groundup classify MODEL "Win a prize now!"')
    from groundup.posttraining import load_classifier
    from groundup.runtime.device import choose_device, choose_precision

    chosen = choose_precision(precision, choose_device(device))
    classifier = load_classifier(model, device=device, precision=chosen)
    left_out: list[Dropped] = []
    source = _texts(texts) if data is None else _records(data, columns, limit, left_out.append if skip_bad else None)
    tally = Tally(classifier.classes)
    shown = min(top, len(classifier.classes))
    with _lines_to(out) as write:
        for batch in _batches(islice(source, limit)):
            probabilities_NC = classifier.probabilities([one.text for one in batch])
            tally.add(batch, probabilities_NC)
            for one, p_C in zip(batch, probabilities_NC, strict=True):
                best = [
                    (classifier.classes[place], float(p_C[place])) for place in (-p_C).argsort(kind="stable")[:shown]
                ]
                write(_as_json(one, best) if json else _as_line(one, best))
        if not tally.texts:
            raise UsageError(f"{data or 'standard input'}: there is no text in it.")
    to_stderr = json and out is None  # what reads the objects shall find nothing else among them
    for message in (*tally.report(), *_remarks(tally, left_out, out)):
        console(to_stderr).print(message, markup=False)


def _texts(texts: Sequence[str]) -> Iterator[Unsorted]:
    """The texts of the command line, or of standard input; lines of white space are passed over."""
    from groundup.posttraining.classifier import Unsorted

    if texts and list(texts) != ["-"]:
        yield from (Unsorted(f"text {number}", text, None) for number, text in enumerate(texts, 1))
        return
    try:
        for number, line in enumerate(sys.stdin, 1):
            if line.strip():
                yield Unsorted(f"standard input, line {number}", line.rstrip("\r\n"), None)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input: byte {error.start} is not UTF-8 text. Convert it first, with iconv."
        ) from error


def _records(
    data: str, columns: dict[str, str] | None, limit: int | None, skip: Callable[[Dropped], None] | None
) -> Iterator[Unsorted]:
    from groundup.posttraining.classifier import open_unsorted

    return open_unsorted(data, columns, limit, skip)


def _batches(source: Iterable[Unsorted]) -> Iterator[list[Unsorted]]:
    waiting = iter(source)
    while batch := list(islice(waiting, TOGETHER)):
        yield batch


# ---- what is written


@contextmanager
def _lines_to(out: Path | None) -> Iterator[Callable[[str], None]]:
    """Writes lines to standard output, or to a file that is there whole or not at all."""
    if out is None:
        yield print
        return
    with (
        atomic_file(out) as place,
        open(place, "w", encoding="utf-8") as file,
        progress("classify", unit="texts") as bar,
    ):

        def write(line: str) -> None:
            file.write(line + "\n")
            bar.advance()

        yield write


def _as_line(one: Unsorted, best: Sequence[tuple[str, float]]) -> str:
    cells = [cell for name, probability in best for cell in (name, f"{probability:.4f}")]
    return "\t".join([*cells, " ".join(one.text.split())])


def _as_json(one: Unsorted, best: Sequence[tuple[str, float]]) -> str:
    found: dict[str, Any] = {"where": one.where, "text": one.text, "label": best[0][0], "probability": best[0][1]}
    if len(best) > 1:
        found["classes"] = dict(best)
    if one.label is not None:
        found["given"] = one.label
    return dumps(found, ensure_ascii=False)


@dataclass
class Tally:
    """What has been classified, and how many of the labels that were given were found.

    Args:
        classes: C names.
    """

    classes: list[str]
    texts: int = 0
    unknown: int = 0
    example: str = ""
    confusion_CC: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        import numpy as np

        self.confusion_CC = np.zeros((len(self.classes), len(self.classes)), np.int64)
        self._ids = {name: number for number, name in enumerate(self.classes)}

    def add(self, batch: Sequence[Unsorted], probabilities_NC: npt.NDArray[np.float64]) -> None:
        """Count some texts."""
        self.texts += len(batch)
        for one, predicted in zip(batch, probabilities_NC.argmax(axis=1), strict=True):
            if one.label is None:
                continue
            if (label := self._ids.get(one.label)) is None:
                self.unknown, self.example = self.unknown + 1, self.example or f"{one.where}: {one.label[:60]}"
            else:
                self.confusion_CC[label, predicted] += 1

    def report(self) -> Iterator[Any]:
        """Accuracy, and what is confused most; nothing where no text had a label."""
        count = int(self.confusion_CC.sum())
        if not count:
            return
        from groundup.posttraining.class_evaluation import most_confused

        right, most = int(self.confusion_CC.trace()), int(self.confusion_CC.sum(axis=1).max())
        found = f"accuracy {right / count:.2%}: {right:,} of {count:,} labels were found"
        yield f"{found} (always the most frequent one: {most / count:.2%})."
        pairs = most_confused(self.confusion_CC.tolist(), self.classes)
        if pairs:
            table = figures_table("label", "times", "of", left=("taken for",))
            for pair in pairs:
                add_row(table, pair["label"], pair["predicted"], f"{pair['count']:,}", f"{pair['of']:,}")
            yield table


def _remarks(tally: Tally, left_out: Sequence[Dropped], out: Path | None) -> Iterator[str]:
    if tally.unknown:
        yield f"{tally.unknown:,} labels are none of the model's classes and count for nothing ({tally.example})."
    if left_out:
        yield f"left out: {len(left_out):,} bad records, the first {left_out[0].name}: {left_out[0].detail}"
    if out is not None:
        yield f"written: {out} ({tally.texts:,} texts)"


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and classify."""
    words = list(arguments)
    count = next((place for place, word in enumerate(words) if word != "-" and word.startswith("-")), len(words))
    if count > 1:
        words[1:count] = [f"--texts={_as_list(words[1:count])}"]
    call(classify, "classify", words)


def _as_list(texts: Sequence[str]) -> str:
    """Texts as the value of a flag, which is read as YAML: JSON, in which some characters have to be escaped.

    Raises:
        UsageError: a text is not UTF-8.
    """
    for text in texts:
        if (bad := _SURROGATE.search(text)) is not None:
            raise UsageError(f"the text {ascii(text)[:60]} is not UTF-8 text (character {bad.start() + 1}).")
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", dumps(list(texts), ensure_ascii=False))

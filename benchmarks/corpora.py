"""The texts that benchmarks measure on: English, code, many languages, all mixed; cut to the size asked for."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

LONGEST = 20_000  # characters; longer texts are cut at line breaks, as documents of the web are
SEPARATOR = "<|endoftext|>"  # between the texts of a training file: the one that gigatoken knows


def records(file: Path) -> Iterator[str]:
    """The texts of a .jsonl or .jsonl.gz file, or a text file whole."""
    if ".jsonl" not in file.name:
        yield file.read_text(encoding="utf-8")
        return
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line)["text"] for line in lines)


def cut(text: str) -> Iterator[str]:
    """A text in parts of at most ``LONGEST`` characters, cut after line breaks where there are any."""
    start = 0
    while start < len(text):
        end = start + LONGEST
        if end < len(text):
            end = max(text.rfind("\n", start, end) + 1, 0) or end
        yield text[start:end]
        start = end


def size_of(texts: Iterable[str]) -> int:
    """Bytes in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def take(files: Sequence[Path], most: int) -> list[str]:
    """About ``most`` bytes of text, spread evenly over each file, and over files by their size."""
    parts = [[part for text in records(file) for part in cut(text)] for file in files]
    share = min(1.0, most / max(1, sum(map(size_of, parts))))
    return [
        text for texts in parts for number, text in enumerate(texts) if int((number + 1) * share) > int(number * share)
    ]


def interleaved(*corpora: list[str]) -> list[str]:
    """All texts, so that each part of the list holds each corpus in proportion."""
    placed = [((place + 0.5) / len(texts), text) for texts in corpora for place, text in enumerate(texts)]
    return [text for _, text in sorted(placed, key=lambda pair: pair[0])]


def make_corpora(pretrain: Path, most: int) -> dict[str, list[str]]:
    """English, code, multilingual (each about ``most`` bytes, or all there is), and mixed: two thirds of each."""
    english = [file for file in sorted(pretrain.iterdir()) if file.is_file() and file.stem[:4] not in ("code", "READ")]
    multilingual = sorted((pretrain / "multilingual").iterdir())
    files = {"english": english, "code": [pretrain / "code.jsonl.gz"], "multilingual": multilingual}
    corpora = {name: take(of, most) for name, of in files.items()}
    corpora["mixed"] = interleaved(*(take(of, most * 2 // 3) for of in files.values()))
    return corpora


def training_texts(pretrain: Path, most: int) -> list[str]:
    """About ``most`` bytes of everything there is, in the order of the files' paths."""
    files = [file for file in sorted(pretrain.rglob("*")) if file.is_file() and file.suffix != ".md"]
    return take(files, most)


def write_texts(file: Path, texts: Iterable[str]) -> None:
    """One file with all texts, ``SEPARATOR`` between them."""
    file.write_text(SEPARATOR.join(texts), encoding="utf-8", newline="")


def read_texts(file: Path) -> Iterator[str]:
    """The texts of such a file, read a block at a time."""
    left = ""
    with open(file, encoding="utf-8", newline="") as stream:
        while block := stream.read(1 << 20):
            *whole, left = (left + block).split(SEPARATOR)
            yield from whole
    yield left

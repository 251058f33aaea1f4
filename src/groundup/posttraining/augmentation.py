"""More texts of a class out of those there are: a word replaced, left out or moved, or the sentences in another order.

After Wei and Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification Tasks"
(section 2). They help where there are few texts of a class. Only texts to learn from are augmented, and only after the
split: a copy of a text that is measured on is a duplicate of it.

Every change is a function of the text and a seed. Words are what white space parts, or, to be replaced, runs of
letters; a text without white space, such as one in Chinese, stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path

import numpy as np

from groundup.data import derive_key
from groundup.data.decode import decoded, split_stream
from groundup.data.records import whole_records
from groundup.posttraining.labelled import LabelledText
from groundup.runtime import GroundupError, UsageError, os_errors

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")

# They say how other words belong together. What a dictionary lists for them ("I": iodine; "as": arsenic) is not meant.
_FUNCTION_WORDS = """
a about above after again against all also am an and any are as at be because been before being below between both
but by can could did do does doing down during each few for from further had has have having he her here hers
herself him himself his how i if in into is it its itself just may me might more most must my myself no nor not now
of off on once only or other our ours ourselves out over own same shall she should so some such than that the their
theirs them themselves then there these they this those through to too under until up upon very was we were what
when where which while who whom whose why will with would you your yours yourself yourselves
"""
_KEPT = frozenset(_FUNCTION_WORDS.split())
_LETTERS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?…])(\s+)")
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective may stand, in WordNet's files


class Thesaurus:
    """The synonyms of words, from sets of words that mean the same.

    Args:
        synsets: such sets; a word may be in several, and of several words.
    """

    def __init__(self, synsets: Iterable[Sequence[str]]) -> None:
        found: dict[str, set[str]] = {}
        for synset in synsets:
            if len(synset) > 1:
                for word in synset:
                    found.setdefault(word.casefold(), set()).update(synset)
        self._synonyms = {word: others for word, others in found.items() if len(others) > 1}

    def __len__(self) -> int:
        return len(self._synonyms)

    def synonyms(self, word: str) -> list[str]:
        """What may stand for a word, sorted; capital or small letters make no difference."""
        folded = word.casefold()
        return sorted(other for other in self._synonyms.get(folded, ()) if other.casefold() != folded)


def read_thesaurus(path: str | Path) -> Thesaurus:
    """Read a WordNet.

    Args:
        path: WordNet's folder ``dict`` with the files data.noun, data.verb, data.adj and data.adv, or some of them, in
            the format that its manual page wndb(5WN) describes; or a file of records whose field ``members`` lists the
            words of a synset.

    Raises:
        UsageError: there is no such folder or file, or none of those files in it.
        GroundupError: a file is damaged, or no synset in it has two words.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UsageError(f"{path}: no such file or folder. Give the folder dict of a WordNet.")
    if place.is_dir():
        files = [place / f"data.{part}" for part in PARTS_OF_SPEECH if (place / f"data.{part}").is_file()]
        if not files:
            raise UsageError(f"{path}: none of WordNet's files (data.noun, …) is in this folder. Give its folder dict.")
        thesaurus = Thesaurus(synset for file in files for synset in _wndb_synsets(file))
    else:
        thesaurus = Thesaurus(_listed_synsets(place))
    if not thesaurus:
        raise GroundupError(f"{path}: no synset in it has two words, so nothing can be replaced. Give another WordNet.")
    return thesaurus


def _wndb_synsets(path: Path) -> Iterator[list[str]]:
    """Of a line ``offset file type count word id word id … | gloss``, the words; count is in hexadecimal."""
    with os_errors(path, "cannot read"):
        for number, line in enumerate(split_stream(decoded(path), "\n"), 1):
            if not line.strip() or line.startswith("  "):  # the licence
                continue
            parts = line.split(" ")
            try:
                count = int(parts[3], 16)
                words = [_MARKER.sub("", parts[4 + 2 * place]).replace("_", " ") for place in range(count)]
            except (ValueError, IndexError):
                raise GroundupError(
                    f"{path}: line {number} is no synset in WordNet's format. Give an undamaged file."
                ) from None
            yield words


def _listed_synsets(path: Path) -> Iterator[list[str]]:
    for number, record in whole_records(path):
        words = record.get("members") if isinstance(record, dict) else None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise GroundupError(f"{path}#{number}: it has no list of words in a field members. Give a WordNet.")
        yield words


# ---- the changes


def replace_synonyms(text: str, seed: int, thesaurus: Thesaurus, share: float = 0.1) -> str:
    """Replace words by synonyms; function words stay.

    Args:
        share: of the words, one at least; fewer where fewer have a synonym.
    """
    words = list(_LETTERS.finditer(text))
    able = [word for word in words if word[0].casefold() not in _KEPT and thesaurus.synonyms(word[0])]
    draw = _draws(text, seed, 0)
    chosen = draw.permutation(len(able))[: _at_least_one(share, len(words))]
    for place in sorted(chosen, reverse=True):  # from behind: the places before a change stay
        word = able[place]
        synonyms = thesaurus.synonyms(word[0])
        synonym = _written_like(word[0], synonyms[int(draw.integers(len(synonyms)))])
        text = text[: word.start()] + synonym + text[word.end() :]
    return text


def delete_words(text: str, seed: int, share: float = 0.1) -> str:
    """Leave each word out with probability ``share``; of a text that would be empty, one word stays."""
    spaces, words = _parts(text)
    draw = _draws(text, seed, 1)
    stays = draw.random(len(words)) >= share
    if stays.all():
        return text
    if not stays.any():
        return words[int(draw.integers(len(words)))]
    return "".join(space + word for space, word, kept in zip(spaces, words, stays, strict=False) if kept).strip()


def swap_words(text: str, seed: int, share: float = 0.1) -> str:
    """Let two words change places, as many times as ``share`` of the words are, once at least."""
    spaces, words = _parts(text)
    if len(words) < 2:
        return text
    draw = _draws(text, seed, 2)
    for _ in range(_at_least_one(share, len(words))):
        one, other = draw.permutation(len(words))[:2]
        words[one], words[other] = words[other], words[one]
    return "".join(part for pair in zip_longest(spaces, words, fillvalue="") for part in pair)


def shuffle_sentences(text: str, seed: int) -> str:
    """Put the sentences into another order, by chance the same; one ends where white space follows on ``.!?…``."""
    parts = _SENTENCE_END.split(text.strip())
    sentences, spaces = parts[::2], parts[1::2]
    if len(sentences) < 2:
        return text
    order = _draws(text, seed, 3).permutation(len(sentences))
    mixed = (sentences[place] for place in order)
    return "".join(part for pair in zip_longest(mixed, spaces, fillvalue="") for part in pair)


def _parts(text: str) -> tuple[list[str], list[str]]:
    """The white space before each word and after the last, and the words."""
    return re.split(r"\S+", text), text.split()


def _at_least_one(share: float, count: int) -> int:
    return max(1, int(share * count))


def _draws(text: str, seed: int, kind: int) -> np.random.Generator:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.random.default_rng(derive_key(seed, kind, int.from_bytes(digest, "big")))


def _written_like(word: str, synonym: str) -> str:
    """With capital letters where the word it stands for has them."""
    if len(word) > 1 and word.isupper():
        return synonym.upper()
    return synonym[:1].upper() + synonym[1:] if word[:1].isupper() else synonym


# ---- all of them


@dataclass(frozen=True)
class Augmentation:
    """Which copies of a text are learnt beside it.

    The changes take turns: the first copy is changed in the first way that is chosen, the second one in the second. A
    copy that is the same as the text or as a copy before it is left out.

    Args:
        thesaurus: for ``replace``; without one no word is replaced.
        replace: share of the words that synonyms replace; 0 for no such copies.
        delete: probability of a word to be left out; 0 for no such copies.
        swap: swaps, as a share of the words; 0 for no such copies.
        shuffle: whether there are copies with their sentences in another order.
        copies: of each text, at most. Wei and Zou recommend 16 of each where there are 500 texts, 4 from 5,000 on.
        seed: another one changes other words.

    Raises:
        UsageError: a share is none, or no change is chosen.
    """

    thesaurus: Thesaurus | None = None
    replace: float = 0.1
    delete: float = 0.1
    swap: float = 0.1
    shuffle: bool = False
    copies: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("replace", "delete", "swap"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"augmentation.{name} = {getattr(self, name)}: a share, from 0 to 1, is needed.")
        if self.copies < 1:
            raise UsageError(f"augmentation.copies = {self.copies}: at least one is needed.")
        if not self._changes():
            needed = " replace needs a WordNet." if self.replace else ""
            raise UsageError(f"augmentation: no change is chosen.{needed} Set delete, swap or shuffle.")

    def variants(self, text: str) -> list[str]:
        """The copies of a text."""
        changes, found = self._changes(), [text]
        for copy in range(self.copies):
            changed = changes[copy % len(changes)](text, derive_key(self.seed, copy))
            if changed not in found:
                found.append(changed)
        return found[1:]

    def __call__(self, texts: Iterable[LabelledText]) -> Iterator[LabelledText]:
        """Yield each text, and behind it its copies, which have its label."""
        for text in texts:
            yield text
            for number, variant in enumerate(self.variants(text.text), 1):
                yield LabelledText(f"{text.where} (copy {number})", variant, text.label)

    def _changes(self) -> list[Callable[[str, int], str]]:
        changes: list[Callable[[str, int], str]] = []
        thesaurus = self.thesaurus
        if thesaurus is not None and self.replace:
            changes.append(lambda text, seed: replace_synonyms(text, seed, thesaurus, self.replace))
        if self.delete:
            changes.append(lambda text, seed: delete_words(text, seed, self.delete))
        if self.swap:
            changes.append(lambda text, seed: swap_words(text, seed, self.swap))
        if self.shuffle:
            changes.append(shuffle_sentences)
        return changes

"""Texts changed a little: each change does what it says and no more, the same one for the same seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from groundup.posttraining.augmentation import (
    Augmentation,
    Thesaurus,
    delete_words,
    read_thesaurus,
    replace_synonyms,
    shuffle_sentences,
    swap_words,
)
from groundup.posttraining.labelled import LabelledText
from groundup.runtime import GroundupError, UsageError

DOGS = Thesaurus([["dog", "domestic dog", "hound"], ["big", "large"], ["large", "great"], ["as", "arsenic"], ["alone"]])
TEXT = "  The dog runs to\n the river. It is big!  Then it sleeps as a stone does; the end…\n"

# Three lines each of the files of WordNet 3.0: licence, words with underscores, the marker of an adjective.
NOUNS = """  1 This software and database is being provided to you, the LICENSEE, by
02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 003 @ 02083346 n 0000 ~ 01322604 n 0000 #m 0 n 0 | a pet; "he"
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which exists
10114209 18 n 0b a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 dog 1 000 | eleven words
"""
ADJECTIVES = """  29 Princeton University and LICENSEE agrees to preserve same.
00021766 00 s 02 ablaze(p) 0 aflame(ip) 1 000 | lighted up
"""

CHANGES: list[Callable[[str, int], str]] = [
    lambda text, seed: replace_synonyms(text, seed, DOGS), lambda text, seed: delete_words(text, seed, 0.3),
    lambda text, seed: swap_words(text, seed, 0.3), shuffle_sentences,
]  # fmt: skip


def wordnet(folder: Path, nouns: str = NOUNS) -> Path:
    (folder / "data.noun").write_text(nouns)
    (folder / "data.adj").write_text(ADJECTIVES)
    return folder


def test_wordnet_files(tmp_path: Path) -> None:
    found = read_thesaurus(wordnet(tmp_path))
    assert found.synonyms("ablaze") == ["aflame"]
    assert found.synonyms("Aflame") == ["ablaze"]
    assert found.synonyms("domestic dog") == ["Canis familiaris", "dog"]
    assert found.synonyms("dog") == ["Canis familiaris", *"abcd", "domestic dog", *"efghij"]
    assert found.synonyms("entity") == []
    assert found.synonyms("of") == []
    assert len(found) == 15


def test_synsets_as_records(tmp_path: Path) -> None:
    path = tmp_path / "synsets.jsonl"
    path.write_text('{"id": 1, "members": ["dog", "domestic dog"]}\n{"members": ["thing"]}\n')
    assert read_thesaurus(path).synonyms("dog") == ["domestic dog"]
    path.write_text('{"id": 1, "members": ["dog", "domestic dog"]}\n{"member": ["thing"]}\n')
    with pytest.raises(GroundupError, match=r"synsets\.jsonl#2: it has no list of words in a field members"):
        read_thesaurus(path)
    path.write_text('{"members": ["thing"]}\n')
    with pytest.raises(GroundupError, match="no synset in it has two words"):
        read_thesaurus(path)


def test_what_is_no_wordnet(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such file or folder"):
        read_thesaurus(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"none of WordNet's files \(data\.noun, …\) is in this folder"):
        read_thesaurus(tmp_path)
    for damaged in ("02084071 05 n zz dog 0 000 | pet", "02084071 05 n 03 dog 0", "02084071"):
        with pytest.raises(GroundupError, match=r"data\.noun: line 5 is no synset in WordNet's format"):
            read_thesaurus(wordnet(tmp_path, NOUNS + damaged + "\n"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_a_function_of_text_and_seed(change: Callable[[str, int], str]) -> None:
    found = [change(TEXT, seed) for seed in range(20)]
    assert found == [change(TEXT, seed) for seed in range(20)]
    assert len(set(found)) > 2
    for text in ("", " ", "stone", "中文没有空格"):
        assert change(text, 7) == text


def test_synonyms_stand_where_the_words_stood() -> None:
    text = "A Dog, big as a HOUND: the dog's alone."
    seen: Counter[str] = Counter()
    for seed in range(300):
        changed = replace_synonyms(text, seed, DOGS, 0.0)
        (now,) = [
            (old, new)
            for old, pattern in (
                ("Dog", "A {}, big as a HOUND"),
                ("big", "A Dog, {} as a HOUND"),
                ("HOUND", "A Dog, big as a {}"),
            )
            for new in ("Domestic dog", "Hound", "large", "DOG", "DOMESTIC DOG")
            if changed == pattern.format(new) + ": the dog's alone."
        ]
        seen[" > ".join(now)] += 1
    # One of the three that have synonyms, then one of its synonyms; "as" is a function word.
    assert seen.keys() == {"Dog > Domestic dog", "Dog > Hound", "big > large", "HOUND > DOG", "HOUND > DOMESTIC DOG"}
    assert all(
        abs(count - 300 * share) < 30 for count, share in ((seen["big > large"], 1 / 3), (seen["Dog > Hound"], 1 / 6))
    )
    assert replace_synonyms("dog dog dog dog", 1, Thesaurus([["dog", "cat"]]), 0.5).split().count("cat") == 2
    assert replace_synonyms("dog dog dog dog", 1, Thesaurus([["dog", "cat"]]), 1.0) == "cat cat cat cat"


def test_words_are_left_out() -> None:
    words = [f"w{n}" for n in range(1000)]
    kept = delete_words(" ".join(words), 1, 0.3).split()
    assert kept == [word for word in words if word in set(kept)]
    assert 640 < len(kept) < 760
    assert delete_words(TEXT, 1, 0.0) == TEXT
    assert {delete_words("a b c", seed, 1.0) for seed in range(30)} == {"a", "b", "c"}
    assert "river." not in delete_words(TEXT, 1, 1.0) or delete_words(TEXT, 1, 1.0) == "river."


def test_words_change_places() -> None:
    for seed in range(50):
        changed = swap_words(TEXT, seed, 0.0)
        pairs = [(old, new) for old, new in zip(TEXT.split(), changed.split(), strict=True) if old != new]
        assert not pairs or (len(pairs) == 2 and pairs[0] == pairs[1][::-1])
        assert [part for part in changed if part.isspace()] == [part for part in TEXT if part.isspace()]
    assert swap_words("a b", 3) == "b a"
    changed = swap_words(TEXT, 3, 0.9)
    assert sorted(changed.split()) == sorted(TEXT.split())
    assert sum(old != new for old, new in zip(TEXT.split(), changed.split(), strict=True)) > 6


def test_sentences_change_places() -> None:
    found = {shuffle_sentences("One. Two?\n\nThree! 4.5 is", seed) for seed in range(200)}
    assert len(found) == 24
    assert all(sorted(text.split()) == sorted(["One.", "Two?", "Three!", "4.5", "is"]) for text in found)
    assert "Three! One.\n\n4.5 is Two?" in found


def test_copies_have_the_label_and_take_turns() -> None:
    texts = [LabelledText("x#1", TEXT, "a"), LabelledText("x#2", "stone", "b"), LabelledText("x#3", "A dog", "b")]
    both = Augmentation(DOGS, delete=0.0, copies=4, seed=5)
    found = list(both(texts))
    assert found == list(both(texts))
    assert [(text.where, text.text) for text in found if " (copy " not in text.where] == [
        (text.where, text.text) for text in texts
    ]
    labels = {text.where: text.label for text in texts}
    assert all(text.label == labels[text.where.split(" (")[0]] for text in found)
    of_first = [text.text for text in found if text.where.startswith("x#1 (copy")]
    assert len(of_first) == len(set(of_first)) <= 4
    assert TEXT not in of_first
    assert sorted(of_first[1].split()) == sorted(TEXT.split()) != sorted(of_first[0].split())
    assert not [text for text in found if text.where.startswith("x#2 (copy")]
    assert list(Augmentation(DOGS, delete=0.0, seed=6)(texts)) != found
    assert Augmentation(replace=0, delete=0, swap=0, shuffle=True).variants("A. B.") == ["B. A."]


def test_augmentations_that_are_none() -> None:
    with pytest.raises(UsageError, match=r"augmentation\.delete = 1\.5: a share"):
        Augmentation(delete=1.5)
    with pytest.raises(UsageError, match=r"augmentation\.swap = nan: a share"):
        Augmentation(swap=float("nan"))
    with pytest.raises(UsageError, match=r"augmentation\.copies = 0"):
        Augmentation(copies=0)
    with pytest.raises(UsageError, match=r"no change is chosen\. replace needs a WordNet"):
        Augmentation(delete=0, swap=0)


def test_a_real_wordnet(shared_data: Path) -> None:
    found = read_thesaurus(shared_data / "rag" / "wordnet" / "oewn_noun_synsets.jsonl.gz")
    assert len(found) > 40_000
    assert {"auto", "automobile", "motorcar", "machine"} <= set(found.synonyms("Car"))
    changed = replace_synonyms("The car hit the lorry in front of the cinema.", 1, found, 0.2)
    assert changed.startswith("The ")
    assert "in" in changed.split()
    assert changed != "The car hit the lorry in front of the cinema."

"""BLEU, ROUGE and the form of answers: against the packages, naive loops, and by hand."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from groundup.evaluation import generated
from groundup.evaluation.generated import adherence, bleu, common_subsequence, is_json, nearness, repetition, words_of
from groundup.runtime import GroundupError, UsageError


def random_words(seed: int, most: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [str(word) for word in rng.choice(["a", "b1", "fox", "the", "of"], rng.integers(0, most))]


def by_table(one: list[str], other: list[str]) -> int:
    """The textbook's table, Wagner and Fischer 1974."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one, 1):
        for j, with_word in enumerate(other, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if word == with_word else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@pytest.mark.parametrize("most", [3, 17, 97])
def test_the_longest_common_subsequence(most: int) -> None:
    for seed in range(23):
        one, other = random_words(seed, most), random_words(seed + 1000, most)
        assert common_subsequence(one, other) == by_table(one, other)


def test_rouge_by_hand() -> None:
    ours, theirs = words_of("The cat, the CAT sat."), words_of("the cat sat on the mat")
    assert ours == ["the", "cat", "the", "cat", "sat"]
    # Shared: the (2 and 2), cat (2 and 1), sat; then "the cat" (2 and 1), "cat sat"; then the cat sat.
    assert generated.rouge_n(ours, theirs, 1) == pytest.approx(2 * 4 / 11)
    assert generated.rouge_n(ours, theirs, 2) == pytest.approx(2 * 2 / 9)
    assert generated.rouge_l(ours, theirs) == pytest.approx(2 * 3 / 11)
    assert generated.rouge_n([], theirs, 1) == generated.rouge_l(ours, []) == 0.0


def test_words_of_other_scripts_count() -> None:
    assert words_of("Größe_über ÉTÉ — Привет, мир 42") == ["größe", "über", "été", "привет", "мир", "42"]


def test_rouge_is_the_packages(shared_data: Path) -> None:
    scorer_of = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer
    scorer = scorer_of(["rouge1", "rouge2", "rougeL"])
    records = json.loads((shared_data / "sft" / "instruction-data.json").read_text())[:200]
    texts = [record["output"].encode("ascii", "replace").decode() for record in records]
    shared = 0
    for answer, reference in [*pairwise(texts), ("", "a"), ("a", ""), (texts[0] * 9, texts[0])]:
        ours, theirs = words_of(answer), words_of(reference)
        expected = scorer.score(reference, answer)
        shared += expected["rougeL"].fmeasure > 0
        assert generated.rouge_n(ours, theirs, 1) == pytest.approx(expected["rouge1"].fmeasure)
        assert generated.rouge_n(ours, theirs, 2) == pytest.approx(expected["rouge2"].fmeasure)
        assert generated.rouge_l(ours, theirs) == pytest.approx(expected["rougeL"].fmeasure)
    assert shared > 50


def test_all_measures_together() -> None:
    pytest.importorskip("sacrebleu")
    answers, references = ["the  cat sat\n", "a dog runs"], ["the cat sat", "a cat runs away"]
    found = nearness(answers, references)
    assert (found.exact_match, found.answers) == (0.5, 2)
    assert found.rouge1 == pytest.approx((1 + 2 * 2 / 7) / 2)
    assert found.rouge2 == pytest.approx(0.5)
    assert found.rouge_l == pytest.approx((1 + 2 * 2 / 7) / 2)
    assert found.length_ratio == pytest.approx(23 / 26)
    same = nearness(references, references)
    assert (same.rouge1, same.rouge2, same.rouge_l, same.exact_match, same.length_ratio) == (1, 1, 1, 1, 1)
    assert same.bleu == pytest.approx(100)


def test_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    # 5 words of 5, 3 of 4 pairs, 1 of 3 triples, then none of 2, smoothed to 1 of 4: Post 2018's "exp".
    score = bleu(["the cat on mat sat"], ["on mat the cat on sat"])
    ours, theirs = ["the", "cat", "on", "mat", "sat"], ["on", "mat", "the", "cat", "on", "sat"]
    precisions = []
    for n in (1, 2, 3):
        runs = [tuple(ours[i : i + n]) for i in range(6 - n)]
        given = [tuple(theirs[i : i + n]) for i in range(7 - n)]
        precisions.append(sum(run in given for run in runs) / len(runs))
    precisions.append(1 / 2 / 2)
    assert score == pytest.approx(100 * np.exp(1 - 6 / 5) * np.prod(precisions) ** 0.25)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="2 answers and 1 to compare them with"):
        nearness(["a", "b"], ["a"])
    with pytest.raises(GroundupError, match="there are no answers"):
        nearness([], [])
    with pytest.raises(GroundupError, match="there are no answers"):
        adherence([])
    with pytest.raises(UsageError, match="1 answers and 2 reasons"):
        adherence(["a"], finishes=["length", "length"])
    with pytest.raises(UsageError, match=r"pattern '\(' is no regular expression: "):
        adherence(["a"], pattern="(")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UsageError, match=r"sacrebleu: pip install 'groundup\[finetune\]'"):
        bleu(["a"], ["a"])
    without = nearness(["a b"], ["a c"])
    assert (without.bleu, without.rouge1) == (None, 0.5)


def test_an_unknown_way_of_cutting_is_refused() -> None:
    pytest.importorskip("sacrebleu")
    with pytest.raises(UsageError, match=r"BLEU has no tokenizer 'zhh'\. Known: .*13a.*zh"):
        bleu(["a"], ["a"], tokenize="zhh")
    assert bleu(["我喜欢猫和狗"], ["我喜欢猫和狗"], tokenize="zh") == pytest.approx(100)


def test_the_form_of_answers() -> None:
    answers = [' {"a": [1, 2]}\n', "yes", "```json\n{}\n```", "no " * 60]
    found = adherence(answers, as_json=True, pattern="yes|no", finishes=["end_of_text", "stopped", "length", "error"])
    assert (found.valid_json, found.fits_pattern, found.ends_itself) == (0.25, 0.25, 0.5)
    assert found.without_loop == 0.75
    assert found.repetition == pytest.approx((1 - 1 / 57) / 4)
    plain = adherence(answers)
    assert (plain.valid_json, plain.fits_pattern, plain.ends_itself) == (None, None, None)


@pytest.mark.parametrize("text", ["{}", "[1, 2.5e3, null]", '"a"', " 7\n"])
def test_json(text: str) -> None:
    assert is_json(text)


@pytest.mark.parametrize("text", ["", "NaN", '{"a": Infinity}', "{'a': 1}", "{} {}", "[1,]", "[" * 100_000])
def test_no_json(text: str) -> None:
    assert not is_json(text)


def test_repetition() -> None:
    assert repetition("one two three") == 0.0
    assert repetition("a b c d e a b c d") == pytest.approx(1 / 6)
    assert repetition("a b c d e", n=1) == 0.0
    assert repetition("a b a b a", n=2) == pytest.approx(1 - 2 / 4)
    assert repetition("很长的一句话说" * 60) > 0.5, "a loop in writing without spaces"
    assert repetition("a" * 500) > 0.5

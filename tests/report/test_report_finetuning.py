"""Pages, tables and comparisons of fine-tuning runs: their figures are those of the files, whatever is missing."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from test_report_html import Page, read

from groundup.report import MetricsWriter, compare_runs, console_table, write_comparison
from groundup.report.classes import contest, contestants
from groundup.report.confusion import MOST_CLASSES, MOST_PAIRS
from groundup.runtime import write_json

AWKWARD = "</pre><script>alert('x')</script> &amp; \x1b[31m ★ "
SHOWN = "</pre><script>alert('x')</script> &amp; \u241b[31m ★ "

CURVES = ("roc", "reliability", "learning_curve", "pretraining_curve")

SFT: dict[str, Any] = {
    "kind": "sft",
    "rows": [
        {
            "name": "before", "loss": 3.2109, "perplexity": 24.8, "tokens": 1234, "bleu": 1.23, "rouge1": 0.113,
            "rouge2": 0.017, "rouge_l": 0.109, "exact_match": 0.0, "length_ratio": 1.41, "ends_itself": 0.19,
            "without_loop": 0.97, "valid_json": None, "fits_pattern": None, "repetition": 0.31,
        },
        {
            "name": "after", "loss": 2.1303, "perplexity": 8.417, "tokens": 1234, "bleu": 23.71, "rouge1": 0.523,
            "rouge2": 0.317, "rouge_l": 0.487, "exact_match": 0.061, "length_ratio": 1.03, "ends_itself": 0.941,
            "without_loop": 0.97, "valid_json": None, "fits_pattern": None, "repetition": 0.029,
        },
    ],
    "forgetting": {
        "text": "what runs/demo held out", "tokens": 16_381,
        "before": {"loss": 2.91, "perplexity": 18.4, "bits_per_byte": 1.412},
        "after": {"loss": 3.08, "perplexity": 21.8, "bits_per_byte": 1.494},
    },
    "answers": [
        {"where": f"x.jsonl#{n}", "prompt": f"ask {n} {AWKWARD}", "reference": f"given {n}", "before": f"then {n}",
         "after": f"now {n} {AWKWARD}"}
        for n in range(1, 6)
    ],
    "adapter": {"method": "lora", "base": "nf4", "trained": 12_345, "of": 10_000_000},
}  # fmt: skip
SFT_DATA: dict[str, Any] = {
    "task": "sft", "source": "data.jsonl", "records": 1009, "train": 887, "val": 101, "test": 0,
    "lines": ["form      alpaca", "tokens    7,919, of which 3,109 (39.3%) are learnt", "left out  4: 3 bad record"],
    "left_out": {"duplicate": 1, "bad record": 3},
    "left_out_examples": [{"where": "x.jsonl#12", "reason": "bad record", "detail": f"no answer {AWKWARD}"}],
    "shared": [{"held_out": "x.jsonl#5", "train": "x.jsonl#1", "alike": 0.93}], "shared_count": 7,
    "preview": [
        {"text": "<|im_start|>", "learnt": False, "special": True, "note": False},
        {"text": f"user\nhello {AWKWARD}", "learnt": False, "special": False, "note": False},
        {"text": " … 31 tokens … ", "learnt": False, "special": False, "note": True},
        {"text": "good day", "learnt": True, "special": False, "note": False},
        {"text": "<|im_end|>", "learnt": True, "special": True, "note": False},
    ],
    "added_tokens": ["<|im_start|>", "<|im_end|>"],
}  # fmt: skip


def classify_files(count: int, verdict: str = "better than the baseline") -> tuple[dict[str, Any], dict[str, Any]]:
    """What a classifier of so many classes leaves: of the 11 texts of class i, i % 5 + 1 are taken for the next."""
    names = [f"class <i>{number}</i>" for number in range(count)]
    wrong = [number % 5 + 1 for number in range(count)]
    confusion = [[0] * count for _ in range(count)]
    for number in range(count):
        confusion[number][number] = 11 - wrong[number]
        confusion[number][(number + 1) % count] += wrong[number]
    rows = [
        {
            "name": "this model (0.8M parameters)", "accuracy": 0.9873, "low": 0.9787, "high": 0.9949,
            "macro_f1": 0.971, "macro_precision": 0.967, "macro_recall": 0.959, "log_loss": 0.0431, "brier": 0.0217,
            "calibration_error": 0.0131, "roc_area": 0.9967, "seconds": 12.0, "note": f"step-000300 {AWKWARD}",
        },
        {"name": "TF-IDF + logistic regression", "accuracy": 0.9541, "low": 0.941, "high": 0.966, "macro_f1": 0.937,
         "log_loss": 0.151, "seconds": 0.81},
        {"name": "the most frequent class", "accuracy": 0.8661, "low": 0.847, "high": 0.885},
    ]  # fmt: skip
    evaluation = {
        "kind": "classify", "classes": names, "test_texts": 1117, "rows": rows, "verdict": verdict,
        "beside": {"accuracy": 0.9873, "other_accuracy": 0.9541, "only_ours": 43, "only_theirs": 7, "p_value": 2e-7,
                   "low": 0.021, "high": 0.0457},
        "per_class": [
            {"name": name, "precision": 0.83, "recall": 0.79, "f1": 0.9 - number / 1000, "support": 11,
             "baseline_f1": 0.731}
            for number, name in enumerate(names)
        ],
        "confusion": confusion,
        "roc": [
            {"name": "$x_1$ <b>", "area": 0.9967, "false": [0.0, 0.01, 1.0], "true": [0.0, 0.97, 1.0]},
            {"name": "$x_1$ <b>, baseline", "area": 0.9473, "false": [0.0, 0.1, 1.0], "true": [0.0, 0.83, 1.0]},
        ],
        "reliability": [
            {"name": "as it comes", "temperature": 1.0, "expected_error": 0.0313, "edges": [0.0, 0.5, 0.75, 1.0],
             "count": [0, 13, 104], "confidence": [None, 0.61, 0.97], "accuracy": [None, 0.57, 0.99]},
            {"name": "temperature 1.7", "temperature": 1.7, "expected_error": 0.0127, "edges": [0.0, 0.5, 0.75, 1.0],
             "count": [5, 17, 95], "confidence": [0.43, 0.63, math.nan], "accuracy": [0.4, 0.64, math.nan]},
        ],
        "learning_curve": [{"texts": 446, "accuracy": 0.91, "baseline": 0.93},
                           {"texts": 4457, "accuracy": 0.9873, "baseline": 0.9541}],
        "pretraining_curve": [{"tokens": 0, "accuracy": 0.87}, {"tokens": 1_000_000, "accuracy": 0.93},
                              {"tokens": 16_000_000, "accuracy": 0.9873}],
        "errors": [{"where": f"x.tsv#{n}", "text": f"text {n} {AWKWARD}", "label": names[0], "predicted": names[1],
                    "probability": 0.9991 - n / 1000} for n in range(8)],
    }  # fmt: skip
    data = {
        "task": "classify", "source": "x.tsv", "records": 5573, "train": 4010, "val": 446, "test": 1117, "lines": [],
        "left_out": {}, "shared": [], "shared_count": 0, "classes": {name: 11 + n for n, name in enumerate(names)},
    }  # fmt: skip
    return evaluation, data


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A run folder with these files; metrics as its kind has them."""

    def run(name: str, evaluation: Any, data: Any) -> Path:
        path, sorts = tmp_path / name, data.get("task") == "classify"
        with MetricsWriter(path / "metrics.jsonl") as metrics:
            for step in range(1, 41):
                row = {"step": step, "tokens": 512 * step, "seconds": 0.5 * step, "loss": 2 + 3 * math.exp(-step / 9)}
                train = {**row, "learning_rate": 5e-5} | ({"accuracy": 0.5 + step / 100} if sorts else {})
                metrics.write({"kind": "train", **train})
                if step % 10 == 0:
                    held_out = {"accuracy": 0.5 + step / 101} if sorts else {"perplexity": math.exp(row["loss"])}
                    metrics.write({"kind": "eval", **row, **held_out})
        write_json(path / "evaluation.json", evaluation)
        write_json(path / "data.json", data)
        (path / "recipe.yaml").write_text(f"task: {data.get('task')}\ninit_from: runs/demo\n")
        return path

    return run


def text_of(run: Path) -> str:
    from rich.console import Console

    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(console_table(run))
    return console.export_text()


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The body of the first table after a heading, as the text of its cells."""
    table = page[page.index(f'id="{heading}"') :].split("<tbody>")[1].split("</tbody>")[0]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in table.split("</tr>")]
    return [[re.sub("<[^>]*>", "", cell.split('<span class="why"')[0]).strip() for cell in row] for row in cells if row]


# ---- answers


def test_figures_before_and_after_are_those_of_the_file(make: Callable[..., Path]) -> None:
    run = make("sft", SFT, SFT_DATA)
    page = read(run)
    html = (run / "report.html").read_text()
    table = {row[0]: row[1:] for row in rows_of(html, "figures")}
    assert table == {
        "loss": ["3.211", "2.130"], "perplexity": ["24.8", "8.4"], "BLEU": ["1.2", "23.7"],
        "ROUGE-1": ["11.3%", "52.3%"], "ROUGE-2": ["1.7%", "31.7%"], "ROUGE-L": ["10.9%", "48.7%"],
        "the given answer": ["0.0%", "6.1%"], "ends by itself": ["19.0%", "94.1%"],
        "without a loop": ["97.0%", "97.0%"], "repetition": ["31.0%", "2.9%"], "length": ["1.41×", "1.03×"],
    }  # fmt: skip
    assert html.count('<td class="number best">') == 9 + 3  # not those that are equal, nor the length; and what it knew
    knew = {row[0]: row[1:] for row in rows_of(html, "forgetting")}
    assert knew == {"bits per byte": ["1.412", "1.494"], "perplexity": ["18.4", "21.8"], "loss": ["2.910", "3.080"]}
    assert (
        "The loss on held-out answers fell from 3.211 to 2.130 nats per token; on the text that it knew before it "
        "needs 1.494 bits per byte instead of 1.412, 6% more: so much it forgot."
    ) in page.words
    for told in ("what runs/demo held out, 16,381 tokens", "12.3k", "parameters trained of 10M, lora over nf4"):
        assert told in page.words
    assert "Nats per token that is learnt" in page.words
    assert page.tags.count("svg") == 2  # loss, learning rate
    assert ("class", "lead") in page.attributes


def test_answers_stand_beside_the_given_ones_the_first_open(make: Callable[..., Path]) -> None:
    run = make("sft", SFT, SFT_DATA)
    page = read(run)
    html = (run / "report.html").read_text()
    shown, hidden = html[html.index('id="answers"') :].split("<details>")[:2]
    for n in range(1, 6):
        for told in (f"ask {n} {SHOWN}", f"given {n}", f"then {n}", f"now {n} {SHOWN}"):
            assert told in page.words
        assert (f"given {n}<" in shown, f"given {n}<" in hidden) == (n <= 3, n > 3)
    assert "script" not in page.tags


def test_the_example_shows_what_is_learnt_without_colours_too(make: Callable[..., Path]) -> None:
    run = make("sft", SFT, SFT_DATA)
    words = read(run).words
    html = (run / "report.html").read_text()
    example = html[html.index('<pre class="card mask">') :].split("</pre>")[0]
    assert re.findall('<mark class="([^"]*)">([^<]*)</mark>', example) == [
        ("learnt", "good day"),
        ("learnt special", "&lt;|im_end|&gt;"),
    ]
    assert f"<|im_start|>user\nhello {SHOWN} … 31 tokens … good day<|im_end|>" in words
    assert re.search(r"\.learnt \{[^}]*text-decoration: underline", html)


def test_what_was_left_out_and_what_is_shared(make: Callable[..., Path]) -> None:
    run = make("sft", SFT, SFT_DATA)
    read(run)
    words = " ".join(unescape(re.sub("<[^>]*>", " ", (run / "report.html").read_text())).split())
    for told in (
        "7 of 101 held-out examples are in training too",
        "4 records: 3 bad record, 1 duplicate.",
        "x.jsonl#12 bad record no answer",
        "x.jsonl#5 x.jsonl#1 93.0%",
        "to learn from 887",
        "tokens 7,919, of which 3,109 (39.3%) are learnt",
        "<|im_start|> , <|im_end|>",
    ):
        assert told in words


@pytest.mark.parametrize(
    ("before", "after", "told", "warned"),
    [
        (2.0, 2.0001, "stayed at 2.000 nats per token", True),
        (2.0, 2.5, "rose from 2.000 to 2.500 nats per token", True),
        (2.0, None, "is not a finite number", True),
        (2.0, math.nan, "is not a finite number", True),
        (None, 1.5, "is 1.500 nats per token; what it was before is not known", False),
    ],
)
def test_a_loss_that_did_not_fall_is_said_plainly(
    make: Callable[..., Path], before: Any, after: Any, told: str, warned: bool
) -> None:
    rows = [{"name": "before", "loss": before}, {"name": "after", "loss": after}]
    page = read(make("sft", {"kind": "sft", "rows": rows, "forgetting": None}, SFT_DATA))
    assert told in page.words
    assert (("class", "lead warning") in page.attributes) == warned
    assert "What it knew before" not in page.words


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (1.4121, "1.412 bits per byte as it did: it forgot nothing that shows"),
        (1.416, "1.416 bits per byte instead of 1.412, under 1% more: so much it forgot"),
        (1.271, "1.271 bits per byte instead of 1.412, 10% fewer: it forgot nothing"),
        (None, "1.412 until then, are no longer a finite number"),
    ],
)
def test_what_is_forgotten_in_words(make: Callable[..., Path], after: Any, told: str) -> None:
    evaluation = copy.deepcopy(SFT)
    evaluation["forgetting"]["after"]["bits_per_byte"] = after
    assert told in read(make("sft", evaluation, SFT_DATA)).words


# ---- classes


def test_a_classifier_beside_its_baseline(make: Callable[..., Path]) -> None:
    run = make("two", *classify_files(2))
    page = read(run)
    html = (run / "report.html").read_text()
    words = " ".join(page.words.split())
    assert (
        "This model beats its baseline: of 1,117 test texts it gets 98.7% right (95% interval 97.9% to 99.5%); the "
        "baseline, TF-IDF + logistic regression, 95.4%; the most frequent class alone 86.6%."
    ) in words
    assert ("class", "lead") in page.attributes
    assert [row[:2] for row in rows_of(html, "accuracy")] == [
        ["this model (0.8M parameters)", "98.7%"],
        ["TF-IDF + logistic regression", "95.4%"],
        ["the most frequent class", "86.6%"],
    ]
    assert {row[0]: row[1:] for row in rows_of(html, "measures")} == {
        "macro F1": ["97.1%", "93.7%", "–"], "precision": ["96.7%", "–", "–"], "recall": ["95.9%", "–", "–"],
        "ROC area": ["0.997", "–", "–"], "log loss": ["0.043", "0.151", "–"], "Brier score": ["0.022", "–", "–"],
        "calibration error": ["1.3%", "–", "–"],
    }  # fmt: skip
    assert "43 texts are right with this model alone, 7 with the baseline alone (McNemar's test: p < 0.001)." in words
    assert "by +2.1 to +4.6 points" in words
    assert rows_of(html, "classes")[1][1:] == ["83.0%", "79.0%", "89.9%", "73.1%", "11"]
    assert [row[1:] for row in rows_of(html, "confusion")[-2:]] == [["10", "1"], ["2", "9"]]
    shades = re.findall(r"--s: ([\d.]+)", html)
    assert shades == ["0.909", "0.091", "0.182", "0.818"]  # shares of the rows
    assert words.count("taken for class <i>1</i> with") == 8
    assert "99.9%" in words
    assert f"text 7 {' '.join(SHOWN.split())}" in words
    assert "i" not in page.tags
    assert "script" not in page.tags


def test_curves_of_a_classifier(make: Callable[..., Path]) -> None:
    run = make("two", *classify_files(2))
    page = read(run)
    titles = ("ROC", "Reliability", "Learning curve", "What pretraining brings", "Loss", "Accuracy", "Learning rate")
    assert page.tags.count("svg") == len(titles)
    for told in (
        *titles,
        "$x_1$ <b> 0.997 (0.947)",
        "as it comes: 3.1% apart",
        "temperature 1.7: 1.3% apart",
        "4.46k",
        "446",
        "16M",
        "baseline",
        "95.4%",
        "Nats per text",
    ):
        assert told in page.words
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "href")
        assert name != "xlink:href" or (value or "").startswith("#")


@pytest.mark.parametrize(
    ("verdict", "told"),
    [
        ("not better than the baseline", "This model does not beat its baseline: of"),
        ("worse than the baseline", "This model does not beat its baseline, it is worse: of"),
        (
            "as good as the baseline, as far as these texts can tell",
            "This model does not beat its baseline, as far as these texts can tell: of",
        ),
        ("", "This model is right more often than its baseline: of"),
    ],
)
def test_the_verdict_stands_at_the_top(make: Callable[..., Path], verdict: str, told: str) -> None:
    page = read(make("two", *classify_files(2, verdict)))
    assert page.words.split("</style>")[-1].index(told) < page.words.index("Accuracy")
    assert (("class", "lead warning") in page.attributes) == bool(verdict)
    assert told in text_of_title(make, verdict)


def text_of_title(make: Callable[..., Path], verdict: str) -> str:
    """The title of the table in the terminal, as the sentence of the page begins."""
    title = " ".join(str(console_table(make("again", *classify_files(2, verdict))).title).split())
    return title.replace("Right of 1,117 test texts: this", "This") + ": of"


def test_a_model_no_better_than_a_guess(make: Callable[..., Path]) -> None:
    evaluation, data = classify_files(2, "worse than the baseline")
    evaluation["rows"][0]["accuracy"] = 0.85
    page = read(make("guess", evaluation, data))
    assert "is of no use: naming the most frequent class every time is right more often" in page.words
    assert ("class", "lead warning") in page.attributes


def test_no_baseline(make: Callable[..., Path]) -> None:
    evaluation, data = classify_files(2)
    evaluation["rows"] = evaluation["rows"][:1]
    for key in ("beside", "verdict"):
        del evaluation[key]
    for row in evaluation["per_class"]:
        del row["baseline_f1"]
    for row in evaluation["learning_curve"]:
        del row["baseline"]
    page = read(make("alone", evaluation, data))
    assert "This model has been compared with no baseline: of 1,117 test texts it gets 98.7% right" in page.words
    assert ("class", "lead") in page.attributes
    assert "baseline's F1" not in page.words
    assert "Dashed: the baseline" not in page.words


def test_who_is_who() -> None:
    def names(*rows: str) -> list[str | None]:
        found = contest(contestants([{"name": name, "accuracy": 0.5} for name in rows]))
        return [None if one is None else one.name for one in found]

    assert names("the most frequent class", "TF-IDF", "this model (1M)") == [
        "this model (1M)", "TF-IDF", "the most frequent class",
    ]  # fmt: skip
    assert names("mine", "theirs") == ["mine", "theirs", None]
    assert names("the most frequent class") == [None, None, "the most frequent class"]
    assert names() == [None, None, None]


@pytest.mark.parametrize("count", [MOST_CLASSES, MOST_CLASSES + 1, 77])
def test_many_classes_are_listed_by_what_is_confused_most(make: Callable[..., Path], count: int) -> None:
    run = make("many", *classify_files(count))
    page = read(run)
    html = (run / "report.html").read_text()
    rows = rows_of(html, "confusion")
    if count <= MOST_CLASSES:
        assert len([row for row in rows if len(row) == count + 1]) == count
        assert "more</summary>" in html  # of the errors
        return
    assert len(rows) == min(MOST_PAIRS, count)
    assert [int(row[2]) for row in rows] == sorted((n % 5 + 1 for n in range(count)), reverse=True)[:MOST_PAIRS]
    number = 4  # the first class of which five texts are taken for the next
    assert [" ".join(cell.split()) for cell in rows[0]] == [
        f"class &lt;i&gt;{number}&lt;/i&gt;", f"class &lt;i&gt;{number + 1}&lt;/i&gt;", "5", "45.5%",
    ]  # fmt: skip
    assert len(rows_of(html, "classes")) == 10
    assert f"class &lt;i&gt;{count - 1}&lt;/i&gt;" in rows_of(html, "classes")[0][0]  # the weakest
    assert f"{count - 10} more" in page.words
    assert f"Texts of each of {count} classes" in page.words


# ---- whatever is missing


@pytest.mark.parametrize("damage", [None, math.nan, "text", [3], {"rows": 3}, [[1], [2, 3]]])
@pytest.mark.parametrize("kind", ["sft", "classify"])
def test_any_part_may_be_missing_or_of_another_shape(kind: str, damage: Any) -> None:
    evaluation, data = (dict(SFT), SFT_DATA) if kind == "sft" else classify_files(3)
    evaluation |= dict.fromkeys(CURVES) if kind == "classify" else {}  # whole ones take their time to draw
    damaged = [({**evaluation, key: damage}, data) for key in evaluation if key != "kind"]
    damaged += [(evaluation, {**data, key: damage}) for key in data if key != "task"]
    for files in damaged:
        html = render(*files)
        assert html.startswith("<!doctype html>")
        assert "<script" not in html


def render(evaluation: dict[str, Any], data: dict[str, Any]) -> str:
    """The page of these two files, without the curves of training."""
    from groundup.report.html import render as page
    from groundup.report.run_folder import RunFolder

    html = page(RunFolder(Path("run"), "run", evaluation=evaluation, data=data))
    Page(html)
    return html


@pytest.mark.parametrize(
    "inner",
    [
        ("confusion", [[3, 1], [2]]), ("confusion", [[3, None], [2, 1]]), ("classes", ["only one"]),
        ("roc", [{"name": "x"}]), ("roc", [{"false": [0, None], "true": [0, 1]}]),
        ("reliability", [{"name": "x", "confidence": [None], "accuracy": [None], "count": [0]}]),
        ("reliability", [{"confidence": [0.5], "accuracy": [0.5]}]),
        ("learning_curve", [{"texts": 0, "accuracy": 0.5}, {"texts": 7, "accuracy": 0.5}]),
        ("learning_curve", [{"texts": 7, "accuracy": 0.4}, {"texts": 7, "accuracy": 0.5}]),
        ("pretraining_curve", [{"tokens": 0, "accuracy": 0.4}, {"tokens": 0, "accuracy": 0.5}]),
        ("pretraining_curve", [{"tokens": 5, "accuracy": None}, {"accuracy": 0.5}]),
        ("rows", [{"name": "this model", "accuracy": math.nan}]), ("rows", [{"name": ["a"], "accuracy": None}]),
        ("errors", [{}]), ("per_class", [{}]), ("beside", {"p_value": 0.0123, "only_ours": 3}),
    ],
)  # fmt: skip
def test_damaged_parts_of_a_classifier(inner: tuple[str, Any]) -> None:
    evaluation, data = classify_files(2)
    html = render(evaluation | dict.fromkeys(CURVES) | {inner[0]: inner[1]}, data)
    assert ('id="confusion"' in html) == (inner[0] != "confusion")


def test_a_run_that_has_only_begun(make: Callable[..., Path]) -> None:
    sft, classify = make("sft", SFT, SFT_DATA), make("two", *classify_files(2))
    for run in (sft, classify):
        (run / "evaluation.json").unlink()
    words = read(sft).words
    assert "At step 40 the loss on held-out answers was 2.035 nats per token. Before and after have not" in words
    assert "figures and answers, before and after: there is no evaluation.json" in words
    assert console_table(sft).row_count == 0
    words = read(classify).words
    assert "At step 40 89.6% of the held-out texts were sorted right." in words
    assert "how well it sorts, beside a baseline: there is no evaluation.json" in words
    assert "samples: " not in words  # it writes none
    assert console_table(classify).row_count == 0
    for run in (sft, classify):
        (run / "data.json").unlink()  # the recipe still tells what it is
    assert "loss on held-out answers" in read(sft).words
    assert "sorted right" in read(classify).words


def test_equal_files_give_equal_pages(make: Callable[..., Path]) -> None:
    run = make("two", *classify_files(2))
    read(run)
    first = (run / "report.html").read_bytes()
    read(run)
    assert (run / "report.html").read_bytes() == first


# ---- the terminal, and side by side


def test_the_tables_of_a_terminal(make: Callable[..., Path]) -> None:
    text = text_of(make("sft", SFT, SFT_DATA))
    assert re.search(r"loss +│ +3.211 │ +2.130 \* │", text)
    assert re.search(r"bits per byte of what it knew +│ +1.412 \* │ +1.494 │", text)
    evaluation, data = classify_files(2)
    evaluation["rows"][1]["name"] = "TF-IDF [red]"
    text = text_of(make("two", evaluation, data))
    assert re.search(r"this model \(0.8M parameters\) +│ +98.7% │ 97.9% to 99.5% │ +97.1% │ +0.043 │", text)
    assert re.search(r"TF-IDF \[red\] +│ +95.4% │ 94.1% to 96.6% │ +93.7% │ +0.151 │", text)
    assert "this model beats its baseline" in text


def test_fine_tuning_runs_side_by_side(make: Callable[..., Path], tmp_path: Path) -> None:
    other = copy.deepcopy(SFT)
    other["rows"][1] |= {"loss": 1.9, "bleu": None}
    found = compare_runs([make("a", SFT, SFT_DATA), make("b", other, SFT_DATA), make("c", *classify_files(2))])
    told = {row.name: row.cells for row in found.figures}
    assert told["answers, loss: before"] == ["3.211", "3.211", "–"]
    assert told["answers, loss: after"] == ["2.130", "1.900", "–"]
    assert told["answers, BLEU: after"] == ["23.7", "–", "–"]
    assert told["bits per byte of what it knew: after"] == ["1.494", "1.494", "–"]
    assert told["accuracy, test texts"] == ["–", "–", "98.7%"]
    assert told["accuracy of the baseline"] == ["–", "–", "95.4%"]
    assert told["accuracy, on the way: best"] == ["–", "–", "89.6%"]
    best = f"{2 + 3 * math.exp(-40 / 9):.3f}"
    assert told["held-out loss, nats per token: best"] == [best, best, "–"]
    assert told["held-out loss, nats per text: best"] == ["–", "–", best]
    assert all(row.best is None for row in found.figures)
    assert "held-out text" not in told  # nothing to tell it by
    assert [note.split(":")[0] for note in found.notes] == [
        "Whether runs of fine-tuning were measured on the same examples cannot be told from their folders",
        "The runs are of different kinds",
    ]
    page = Page(write_comparison(found, tmp_path / "compare.html").read_text())
    for title in ("Training loss", "Held-out loss", "Training loss of classifiers"):
        assert f"{title} over steps" in page.words
    assert "Accuracy over tokens" in page.words
    assert page.tags.count("svg") == 12


def test_a_fine_tuning_run_beside_its_pretraining(make: Callable[..., Path], finished_run: Path) -> None:
    found = compare_runs([finished_run, make("sft", SFT, SFT_DATA)])
    told = {row.name: row.cells for row in found.figures}
    assert told["bits per byte, all held-out text"] == ["1.520", "–"]
    assert told["answers, loss: after"] == ["–", "2.130"]
    assert told["held-out text"] == ["?", "?"]
    assert json.loads((finished_run / "evaluation.json").read_text())["val_bytes"] == 712_345

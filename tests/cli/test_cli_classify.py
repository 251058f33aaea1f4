"""``groundup classify``: texts from the command line, standard input and files; as lines, as JSON, into a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundup.cli import classify as command
from groundup.model import Classifier, ModelConfig, Transformer, save_model
from groundup.posttraining import TextClassifier, load_classifier, save_classifier
from groundup.posttraining.labelled import load_labelled
from groundup.tokenizer import Tokenizer

Run = Callable[..., Any]
CLASSES = ["ham", "spam", "Übriges"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tok = Tokenizer.train(["the cat sat on the mat and the dog sat on the log " * 9], 270, show_progress=False)
    torch.manual_seed(7)
    sizes = dict(vocab_size=270, context_length=31, n_layer=1, n_head=3, n_embd=18, n_ff=29, init_std=0.8)
    model = Classifier(Transformer(ModelConfig(**sizes)), 3, pooling="mean")  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("classify")
    save_classifier(TextClassifier(model, tok, CLASSES), path / "sorter")
    (path / "plain").mkdir()
    save_model(model.model, path / "plain")
    tok.save(path / "plain")
    return path


@pytest.fixture
def sorter(folder: Path) -> Path:
    return folder / "sorter"


@pytest.fixture
def expected(sorter: Path) -> Callable[..., np.ndarray]:
    return load_classifier(sorter, device="cpu").probabilities


def test_texts_of_the_command_line(run: Run, sorter: Path, expected: Callable[..., np.ndarray]) -> None:
    texts = ["the cat", "the\tdog\n sat", "größer 😀 \x7f\x9f\ufeff\ufffe", '["x"]', "null", "007", 'a "b" \\n']
    said = run("classify", sorter, *texts)
    assert (said.code, said.err) == (0, "")
    lines = [line.split("\t") for line in said.out.rstrip("\n").split("\n")]
    for (label, probability, text), p_C, given in zip(lines, expected(texts), texts, strict=True):
        assert label == CLASSES[p_C.argmax()]
        assert probability == f"{p_C.max():.4f}"
        assert text == " ".join(given.split())
    assert len({line[0] for line in lines}) > 1
    said = run("classify", sorter, "fine", "not \udcff")
    assert (said.code, said.line) == (2, r"the text 'not \udcff' is not UTF-8 text (character 5).")


def test_several_classes_and_objects(run: Run, sorter: Path, expected: Callable[..., np.ndarray]) -> None:
    (p_C,) = expected(["the cat"])
    order = (-p_C).argsort()
    said = run("classify", sorter, "the cat", "--top", 2)
    cells = [cell for place in order[:2] for cell in (CLASSES[place], f"{p_C[place]:.4f}")]
    assert said.out.rstrip("\n").split("\t") == [*cells, "the cat"]
    assert len(run("classify", sorter, "the cat", "--top", 9).out.split("\t")) == 7
    found = json.loads(run("classify", sorter, "the cat", "--top", 3, "--json").out)
    assert found.pop("classes") == pytest.approx({CLASSES[place]: p_C[place] for place in order})
    assert found.pop("probability") == pytest.approx(p_C.max())
    assert found == {"where": "text 1", "text": "the cat", "label": CLASSES[order[0]]}


@pytest.mark.parametrize("words", [[], ["-"]])
def test_lines_of_standard_input(
    run: Run, sorter: Path, expected: Callable[..., np.ndarray], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "TOGETHER", 3)
    texts = [f"the cat {n}ü" for n in range(10)]
    said = run("classify", sorter, *words, "--json", stdin=("\r\n".join(texts) + "\n \n").encode())
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [row["probability"] for row in rows] == pytest.approx(expected(texts).max(axis=1).tolist(), abs=1e-6)
    assert len(run("classify", sorter, *words, "--limit", 4, stdin="\n".join(texts).encode()).out.splitlines()) == 4


def test_input_is_taken_piece_by_piece(sorter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is written before more is read."""
    monkeypatch.setattr(command, "TOGETHER", 4)
    held: list[int] = []
    real = load_classifier(sorter, device="cpu").probabilities

    class Watched:
        classes = CLASSES

        @staticmethod
        def probabilities(texts: list[str]) -> np.ndarray:
            held.append(len(texts))
            return real(texts)

    written: list[str] = []

    def lines() -> Any:
        for number in range(13):
            assert len(written) == number // 4 * 4
            yield f"text {number}\n"

    monkeypatch.setattr("groundup.posttraining.load_classifier", lambda *_, **__: Watched, raising=False)
    monkeypatch.setattr("builtins.print", lambda line: written.append(line))
    monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"isatty": lambda _: False, "__iter__": lambda _: lines()})())
    command.classify(str(sorter))
    assert held == [4, 4, 4, 1]
    assert len(written) == 13


def test_a_file_with_labels(run: Run, sorter: Path, expected: Callable[..., np.ndarray], tmp_path: Path) -> None:
    texts = [f"the cat {n} sat" * (1 + n % 5) for n in range(40)]
    labels = [CLASSES[n % 3] for n in range(40)]
    predicted = [CLASSES[p_C.argmax()] for p_C in expected(texts)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    said = run("classify", sorter, "--data", path)
    right = sum(one == other for one, other in zip(labels, predicted, strict=True))
    lines = said.out.splitlines()
    assert [line.partition("\t")[0] for line in lines[:40]] == predicted
    assert lines[40] == (
        f"accuracy {right / 40:.2%}: {right} of 40 labels were found (always the most frequent one: {14 / 40:.2%})."
    )
    confused = max(
        sum(pair == (one, other) for pair in zip(labels, predicted, strict=True))
        for one in CLASSES for other in CLASSES if one != other
    )  # fmt: skip
    assert lines[41].split() == ["label", "taken", "for", "times", "of"]
    assert lines[42].split()[2] == str(confused)

    said = run("classify", sorter, "--data", path, "--json", "--limit", 7)
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [row["given"] for row in found] == labels[:7]
    assert found[0]["where"] == "x.jsonl#1"
    assert said.err.startswith("accuracy ")

    out = tmp_path / "new" / "out.jsonl"
    said = run("classify", sorter, "--data", path, "--json", "--out", out)
    assert [json.loads(line)["label"] for line in out.read_text().splitlines()] == predicted
    assert said.out.startswith("accuracy ")
    assert said.out.splitlines()[-1] == f"written: {out} (40 texts)"


def test_labels_that_the_model_does_not_know(run: Run, sorter: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\nthe cat,ham\nthe dog,other\nlog,strange\n")
    said = run("classify", sorter, "--data", path)
    assert "of 1 labels were found" in said.out
    assert (
        said.out.splitlines()[-1] == "2 labels are none of the model's classes and count for nothing (x.csv#2: other)."
    )
    path.write_text("text,label\nthe cat,zero\n")
    assert "accuracy" not in run("classify", sorter, "--data", path).out
    path.write_text("words,when\nthe cat,now\n")
    assert run("classify", sorter, "--data", path, "--columns", "{text: words}").out.count("\n") == 1
    said = run("classify", sorter, "--data", path, "--columns", "{text: words, label: when}")
    assert "(x.csv#1: now)" in said.out


def test_bad_records(run: Run, sorter: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "x.jsonl", tmp_path / "out"
    path.write_text('{"text": "the cat"}\n{"text": 7}\n{"text": "the dog"}\n')
    said = run("classify", sorter, "--data", path, "--out", out)
    assert said.code == 1
    assert "x.jsonl#2: its text (field text) is a int" in said.line
    assert not out.exists()
    said = run("classify", sorter, "--data", path, "--skip-bad")
    assert [line.split("\t")[-1] for line in said.out.splitlines()[:2]] == ["the cat", "the dog"]
    assert said.out.splitlines()[2].startswith("left out: 1 bad records, the first x.jsonl#2: its text")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["MODEL", "x", "--top", "0"], 2, "--top 0: at least one class is needed."),
        (["MODEL", "x", "--limit", "0"], 2, "--limit 0: at least one text is needed."),
        (["MODEL", "x", "--data", "y.csv"], 2, "give texts or --data, not both."),
        (["MODEL", "x", "--columns", "{text: a}"], 2, "--columns is for the records of --data."),
        (["MODEL", "--skip-bad"], 2, "--skip-bad is for the records of --data."),
        (["MODEL", "--data", "nowhere.csv"], 2, "nowhere.csv: no such file or folder."),
        (["MODEL"], 2, "standard input: there is no text in it."),
        (["MODEL", "x", "--precision", "int3"], 2, "precision = int3 is unknown."),
        (["MODEL", "x", "--device", "abacus"], 2, "device = abacus is not a device."),
        (["nowhere", "x"], 2, "nowhere: no such folder."),
        (["PLAIN", "x"], 2, "this model has no class scores: it continues texts, and does not sort them. Train one"),
        ([], 2, "classify: the following arguments are required: model."),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(run: Run, folder: Path, words: list[str], code: int, message: str) -> None:
    places = {"MODEL": folder / "sorter", "PLAIN": folder / "plain"}
    said = run("classify", *(places.get(word, word) for word in words))
    assert said.code == code
    assert message in said.line
    assert said.out == ""


def test_input_that_is_no_text(run: Run, sorter: Path) -> None:
    said = run("classify", sorter, stdin=b"ok\n\xff\n")
    assert (said.code, said.out) == (2, "")
    assert "standard input: byte 3 is not UTF-8 text" in said.line


def test_a_terminal_is_asked_for_a_text(sorter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda _: True})())
    with pytest.raises(Exception, match="groundup classify needs a text"):
        command.classify(str(sorter))


def test_real_messages(run: Run, sorter: Path, shared_data: Path, tmp_path: Path) -> None:
    path, out = shared_data / "classification" / "SMSSpamCollection.tsv", tmp_path / "out.tsv"
    said = run("classify", sorter, "--data", path, "--limit", 600, "--out", out)
    texts = load_labelled(str(path), limit=600)
    classifier = load_classifier(sorter, device="cpu")
    predicted = classifier.classify([text.text for text in texts])
    right = sum(text.label == one for text, one in zip(texts, predicted, strict=True))
    assert f"{right} of 600 labels were found" in said.out
    assert [line.partition("\t")[0] for line in out.read_text().splitlines()] == predicted

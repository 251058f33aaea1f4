"""``groundup finetune``: what it says on the way, what it leaves, and how mistakes end."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from small_finetuning import QUIET, some_questions, write_base, write_jsonl

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and a file of examples."""
    folder = tmp_path_factory.mktemp("finetune")
    questions = some_questions(53)
    (folder / "base").mkdir()
    write_base(folder / "base", questions)
    write_jsonl(folder / "data.jsonl", questions)
    return folder


def flags(place: Path, out: Path, **more: Any) -> list[str]:
    """The words that name model, data and folder, and keep everything quick."""
    keys = QUIET | {"init_from": place / "base", "data": place / "data.jsonl", "out": out, "max_steps": 6} | more
    return [f"--{key.replace('_', '-')}={value}" for key, value in keys.items()]


def test_from_examples_to_a_report(run: Run, place: Path, tmp_path: Path) -> None:
    said = run("finetune", *flags(place, tmp_path / "run"))
    assert said.code == 0, said.err
    shown = re.search(r"<\|im_start\|>assistant\n>>>(.+)<\|im_end\|><<<", said.out)
    assert shown is not None
    assert shown[1] in (place / "data.jsonl").read_text()
    assert "<|im_start|>, <|im_end|> were added, and the embeddings grew" in said.out
    for part in ("form      prompt-completion", "packed by best fit", "learning_rate", "before", "after", "Report: "):
        assert part in said.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert shown[1] in page
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["optim"]["optimizer"] == "adamw"
    again = run("finetune", *flags(place, tmp_path / "run"))
    assert "has been trained to its end already" in again.out
    answered = run("generate", tmp_path / "run", "What", "--max-tokens=3")
    assert answered.code == 0, answered.err


def test_without_the_extra_everything_but_bleu_is_measured(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain install has neither sacrebleu nor scikit-learn."""
    for name in ("sacrebleu", "sklearn", "sklearn.feature_extraction.text", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    said = run("finetune", *flags(place, tmp_path / "run"))
    assert said.code == 0, said.err
    assert "BLEU is not measured: it needs the package sacrebleu" in said.err
    said = run("finetune", "--task=classify", "--learning-curve=[0.5]", *flags(place, tmp_path / "classes"))
    assert said.code == 0, said.err
    assert "no baseline: the baseline of classification needs the package scikit-learn" in said.err


def test_texts_into_classes(run: Run, place: Path, tmp_path: Path) -> None:
    said = run("finetune", "--task=classify", "--learning-curve=[]", "--pooling=last", *flags(place, tmp_path / "run"))
    assert said.code == 0, said.err
    assert "TF-IDF" in said.out
    sorted_ = run("classify", tmp_path / "run", "Return the number of bytes.")
    assert sorted_.out.split("\t")[0] in ("class", "function", "method")
    exported = run("export", tmp_path / "run", "--to=hf", f"--out={tmp_path / 'theirs'}")
    assert "3 classes (class, function, method)" in " ".join(exported.out.split())
    assert run("classify", tmp_path / "theirs", "Return the number of bytes.").out == sorted_.out
    refused = run("export", tmp_path / "run", "--to=int8", f"--out={tmp_path / 'int8'}")
    assert refused.line.endswith("a classifier, whose scores only --to hf writes, without --adapter.")


def test_a_recipe_and_what_it_comes_to(run: Run, place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: sft\nadapter:\n  method: lora\n  rank: 4\n")
    said = run("finetune", recipe, "--print-config", "--rank=5")
    found = yaml.safe_load(said.out)
    assert (found["adapter"]["rank"], found["adapter"]["method"], found["context_length"]) == (5, "lora", None)
    for name in ("sft-demo", "classify-spam"):
        assert run("finetune", name, "--print-config").code == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), r"groundup finetune needs a recipe .* sft-demo.* or flags; see --help."),
        (("--data=x.jsonl",), r"groundup finetune needs --init-from: the model to go on from, such as runs/demo."),
        (("--init-from=nowhere", "--data=x"), r"nowhere: no such folder."),
        (("--epocs=3",), r"--epocs is not a known flag. Did you mean epochs\?"),
        (("--task=sort",), r"task"),
        (("sft-dmo",), r"sft-dmo: no such recipe. Did you mean sft-demo\?"),
    ],
)
def test_mistakes_end_in_one_line(run: Run, words: tuple[str, ...], line: str) -> None:
    said = run("finetune", *words)
    assert said.code == 2
    assert re.search(line, said.line), said.line

"""Whole fine-tuning runs: trained, stopped and gone on with, measured, saved, opened again."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import groundup
from groundup.inference import find_model
from groundup.model import load_model
from groundup.posttraining import Finetuning, finetune, load_classifier
from groundup.posttraining.jobs import AnswersJob, ClassesJob
from groundup.runtime import GroundupError, UsageError, read_json
from small_finetuning import Run, plan, write_jsonl

SHORT: dict[str, Any] = {"max_steps": 12, "optim__learning_rate": 0.01}


def losses(run: Finetuning, kind: str = "train") -> list[float]:
    rows = [json.loads(line) for line in run.run.metrics.read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == kind]


def test_answers_are_learnt_measured_and_opened_again(run: Run, tmp_path: Path) -> None:
    done = run(epochs=6, optim__learning_rate=0.01)
    assert done.finished
    found = read_json(done.run.path / "evaluation.json")
    before, after = found["rows"]
    assert (
        after["loss"] < before["loss"] - 1
    )  # nats: an untrained model, that knows the words at least after six epochs
    assert after["perplexity"] == pytest.approx(2.718281828 ** after["loss"])
    assert {"bleu", "rouge1", "rouge_l", "exact_match", "ends_itself", "without_loop"} <= after.keys()
    assert [one["where"] for one in found["answers"]] == [one.where for one in _asked(done)]
    assert min(losses(done, "eval")) == pytest.approx(after["loss"], rel=1e-4)  # the best checkpoint is what counts
    note = read_json(done.run.path / "data.json")
    assert (note["train"], note["val"]) == (len(done.answers.train), len(done.answers.val))
    assert note["added_tokens"] == ["<|im_start|>", "<|im_end|>"]
    lm = groundup.load(done.run.path)
    end = lm.tokenizer.special_tokens["<|im_end|>"]
    assert end in read_json(find_model(done.run.path) / "generation_config.json")["eos_token_id"]
    theirs = AutoModelForCausalLM.from_pretrained(find_model(done.run.path))
    ids = torch.tensor([_asked(done)[0].ids])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    again = finetune(plan(Path(str(done.recipe.init_from)), Path(str(done.recipe.data)), done.run.path))
    assert (again.finished, again.trained) == (True, False)


def _asked(done: Finetuning) -> list[Any]:
    from groundup.posttraining.measure import questions

    return questions(done.answers.conversations, done.tokenizer, done.recipe.measure.answers)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"adapter__method": "lora", "adapter__rank": 3, "adapter__dropout": 0.1},
        {"adapter__method": "dora", "adapter__base": "nf4", "adapter__targets": ["q", "v"]},
        {"task": "classify", "classes__learning_curve": [], "optim__average": 0.9},
        {"task": "classify", "adapter__method": "lora", "classes__learning_curve": []},
        {"examples__neftune": 5.0, "examples__curriculum": "loss", "examples__packing": "padded"},
    ],
    ids=["full", "lora", "dora-nf4", "classes", "classes-lora", "neftune-curriculum"],
)
def test_stopped_and_gone_on_with_it_comes_to_the_same_bits(
    run: Run, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    whole = run(**SHORT, **keys, measured=False)
    job: Any = ClassesJob if keys.get("task") else AnswersJob
    dealt, plain = [0], job.on_device

    def stopping(self: Any, batch: Any) -> Any:
        dealt[0] += 1
        if dealt[0] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(job, "on_device", stopping)
        stopped = run(out=tmp_path / "stopped", **SHORT, **keys)
    assert not stopped.finished
    done = run(out=tmp_path / "stopped", measured=False)
    assert done.finished
    assert losses(done) == losses(whole)
    for file in ("model.safetensors", "adapter_model.safetensors", "classifier.safetensors"):
        ours, theirs = (one.run.path / "checkpoints" / "latest" / file for one in (done, whole))
        assert ours.exists() == theirs.exists()
        if ours.exists():
            one, other = load_file(ours), load_file(theirs)
            assert all(torch.equal(one[name], other[name]) for name in other)


def test_adapters_are_for_peft_and_for_us(run: Run, base: Path, tmp_path: Path) -> None:
    """On a model that has the template's tokens already: nothing but PEFT's files is needed."""
    first = run(**SHORT, measured=False)
    grown = find_model(first.run.path)
    done = run(out=tmp_path / "lora", init_from=str(grown), adapter__method="lora", **SHORT)
    folder = find_model(done.run.path)
    assert not (folder / "model.safetensors").exists()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(grown), folder)
    ids = torch.tensor([_asked(done)[0].ids])
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(groundup.load(done.run.path).model(ids), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(load_model(grown)(ids), expected, atol=1e-2)
    found = read_json(done.run.path / "evaluation.json")
    assert found["rows"][1]["loss"] < found["rows"][0]["loss"]
    assert found["adapter"]["method"] == "lora"


def test_adapters_bring_the_tokens_that_the_base_lacks(run: Run, base: Path) -> None:
    done = run(adapter__method="lora", adapter__base="nf4", **SHORT)
    lm = groundup.load(done.run.path)
    assert lm.model.config.vocab_size == done.tokenizer.vocab_size > load_model(base).config.vocab_size
    found = read_json(done.run.path / "evaluation.json")["rows"]
    assert found[1]["loss"] < found[0]["loss"]
    assert min(losses(done, "eval")) == pytest.approx(found[1]["loss"], rel=1e-3)


def test_classes_are_learnt_and_measured_beside_a_baseline(run: Run, tmp_path: Path) -> None:
    texts = [{"text": f"{word} and {other}", "label": label} for label, words in COLOURS.items()
             for word in words for other in ("sea", "sky", "sun", "hill", "road", "tree", "lake", "wall")]  # fmt: skip
    data = write_jsonl(tmp_path / "texts.jsonl", texts)
    done = run(
        data=data, task="classify", epochs=20, optim__learning_rate=0.01, classes__learning_curve=[0.5],
        classes__copies=1, classes__replace=0.0, val_fraction=0.2,
    )  # fmt: skip
    found = read_json(done.run.path / "evaluation.json")
    ours, baseline, _ = found["rows"]
    assert ours["accuracy"] == 1.0 == baseline["accuracy"]
    assert [row["texts"] for row in found["learning_curve"]] == [24, 48][-2:] or len(found["learning_curve"]) == 2
    classifier = load_classifier(done.run.path)
    assert classifier.classify(["red and sun", "navy and wall"]) == ["warm", "cold"]
    assert not (done.run.path / "curves").exists() or not list((done.run.path / "curves").glob("*/checkpoints"))


COLOURS = {"warm": ["red", "orange", "yellow", "scarlet"], "cold": ["blue", "navy", "teal", "azure"]}


def test_layers_are_frozen_and_rates_fall_with_depth(run: Run, base: Path) -> None:
    done = run(layers__frozen=1, layers__frozen_embeddings=True, layers__decay=0.5, **SHORT, measured=False)
    before, after = load_model(base), groundup.load(done.run.path).model
    moved = {
        name: not torch.equal(one, after.state_dict()[name][: len(one)]) for name, one in before.state_dict().items()
    }
    assert not any(moved[name] for name in moved if name.startswith(("blocks.0.", "embedding.")))
    assert moved["blocks.1.attention.q.weight"]
    assert any("lr=0.5" in rule for rule in done.recipe.optim.rules)
    again = run(max_steps=14, measured=False)
    assert again.recipe.optim.rules == done.recipe.optim.rules  # and not twice


def test_more_epochs_go_on(run: Run) -> None:
    first = run(epochs=1, measured=False)
    steps = first.recipe.max_steps
    more = run(epochs=3, measured=False)
    assert more.trained
    assert more.recipe.max_steps == pytest.approx(3 * steps, abs=2)
    assert len(losses(more)) == more.recipe.max_steps


def test_what_may_not_change_within_a_run(run: Run, data: Path, base: Path, questions: list[dict[str, Any]]) -> None:
    run(**SHORT, measured=False, adapter__method="lora")
    with pytest.raises(UsageError, match=r"the run here has examples.packing = best_fit, the command says padded"):
        run(examples__packing="padded")
    write_jsonl(data, questions[:-1])
    with pytest.raises(GroundupError, match="this data has changed since the run"):
        run(max_steps=14)


def test_a_run_without_held_out_examples_says_so(run: Run) -> None:
    done = run(val_fraction=0.0, **SHORT)
    assert not done.answers.val
    assert read_json(done.run.path / "evaluation.json")["held_out"] is False


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"init_from": None}, r"groundup finetune needs --init-from: the model to go on from"),
        ({"data": ""}, r"--data is empty"),
        ({"context_length": 512}, r"context_length = 512, but the model of init_from = .* was made for 448"),
        ({"batch_size": 4, "micro_batch": 3}, r"batch_size = 4 is no multiple of micro_batch = 3"),
        ({"adapter.base": "nf4"}, r"adapter.base = nf4 needs adapters"),
        ({"layers.frozen": 9}, r"frozen layers = 9 must be from 0 to the model's n_layer, 2"),
        ({"layers.decay": 0.0}, r"layer decay = 0.0 must be above 0"),
        ({"adapter.method": "lora", "adapter.targets": ["qq"]}, r"no linear layer fits the adapter targets qq"),
        ({"examples.template": "chatlm"}, r"unknown chat template 'chatlm'.* Did you mean chatml\?"),
        ({"examples.curriculum": "column"}, r"curriculum = column needs examples.curriculum_column"),
        ({"columns": {"prompt": "question"}}, r"there is no field 'question' in it"),
        ({"val": "missing.jsonl"}, r"missing.jsonl: no such file or folder"),
        ({"epochs": 0.0}, r"epochs = 0.0 must be above 0"),
        ({"task": "classify", "classes.copies": 1, "classes.thesaurus": "nowhere"}, r"nowhere: no such file or folder"),
        ({"task": "classify", "columns": {"label": "kind"}}, r"there is no field 'kind' in it"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe(base: Path, data: Path, tmp_path: Path, keys: dict[str, Any], what: str) -> None:
    with pytest.raises(GroundupError, match=what) as caught:
        finetune(plan(base, keys.pop("data", data), tmp_path / "run", **keys))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


GOOD = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}, I think."} for n in range(1, 30)]
BAD: dict[str, tuple[Any, str]] = {
    "another form": (
        {"messages": [{"role": "user", "content": "a"}]},
        r"it has the form messages, those before it have",
    ),
    "no answer": ({"prompt": "a", "completion": ""}, r"message 2, of the assistant, is empty"),
    "too long": ({"prompt": "a", "completion": "b " * 900}, r"it has \d+ tokens, the context holds 448"),
    "no text": ({"prompt": "a", "completion": 5}, r"its field completion is a int, and not a text"),
    "no record": (["a"], r"it is a list, and not a record with named fields"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_or_left_out_and_counted(base: Path, tmp_path: Path, name: str) -> None:
    record, what = BAD[name]
    data = write_jsonl(tmp_path / "data.jsonl", [*GOOD, record])
    with pytest.raises(GroundupError, match=rf"data.jsonl#30: {what}.*--skip-bad") as caught:
        plan(base, data, tmp_path / "run")
    assert "\n" not in str(caught.value)
    planned = plan(base, data, tmp_path / "run", skip_bad=True)
    assert len(planned.answers.train) + len(planned.answers.val) == len(GOOD)
    note = read_json(tmp_path / "run" / "data.json")
    assert note["left_out"] == {"bad record": 1}
    assert note["left_out_examples"][0]["where"] == "data.jsonl#30"


def test_a_missing_role_is_named(base: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"content": "b"}]
    good = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    data = write_jsonl(tmp_path / "data.jsonl", [good, {"messages": talk}])
    with pytest.raises(GroundupError, match=r"data.jsonl#2: message 2 has no role"):
        plan(base, data, tmp_path / "run")


def test_what_is_in_both_parts_is_found(base: Path, tmp_path: Path) -> None:
    train, val = write_jsonl(tmp_path / "a.jsonl", GOOD), write_jsonl(tmp_path / "b.jsonl", [GOOD[4]])
    plan(base, train, tmp_path / "run", val=str(val))
    note = read_json(tmp_path / "run" / "data.json")
    assert note["shared_count"] == 1
    assert note["shared"][0]["train"] == "a.jsonl#5"


def test_labels_that_training_lacks(base: Path, tmp_path: Path) -> None:
    texts = [{"text": f"{label} text number {n}", "label": label} for label in ("a", "b") for n in range(12)]
    train = write_jsonl(tmp_path / "train.jsonl", texts)
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "a thing", "label": "a"}, {"text": "new", "label": "c"}])
    keys: dict[str, Any] = {"task": "classify", "classes__test": str(test)}
    with pytest.raises(GroundupError, match=r"test.jsonl#2: the label 'c' is none of the 2 that training has"):
        plan(base, train, tmp_path / "run", **keys)
    planned = plan(base, train, tmp_path / "run", **keys, skip_bad=True)
    assert [text.label for text in planned.labelled.test] == ["a"]
    one = write_jsonl(tmp_path / "one.jsonl", texts[:12])
    with pytest.raises(GroundupError, match=r"all 12 texts have the label 'a'"):
        plan(base, one, tmp_path / "run2", **keys)


def test_tools_get_a_template_that_has_a_place_for_them(base: Path, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
    talk = [
        {"role": "user", "content": "a"},
        call,
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "b"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": talk, "tools": tools}] * 2)
    planned = plan(base, data, tmp_path / "run", too_long="cut")
    assert "<tool_call>" in str(planned.tokenizer.chat_template)


def test_an_adapter_is_gone_on_with_in_another_run(run: Run, tmp_path: Path) -> None:
    first = run(adapter__method="lora", adapter__rank=3, **SHORT)
    more = run(out=tmp_path / "more", adapter__method="lora", adapter__resume_from=str(first.run.path), **SHORT)
    before = read_json(more.run.path / "evaluation.json")["rows"]
    assert before[0]["loss"] == pytest.approx(
        read_json(first.run.path / "evaluation.json")["rows"][1]["loss"], rel=1e-3
    )
    assert before[1]["loss"] < before[0]["loss"]
    assert read_json(find_model(more.run.path) / "adapter_config.json")["r"] == 3
    assert more.tokenizer.vocab_size == groundup.load(more.run.path).model.config.vocab_size


def test_texts_longer_than_the_context_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    texts = [{"text": f"{label} text number {n}", "label": label} for label in ("a", "b") for n in range(12)]
    data = write_jsonl(tmp_path / "data.jsonl", [*texts, {"text": "long " * 900, "label": "a"}])
    planned = plan(base, data, tmp_path / "run", task="classify", too_long="drop")
    assert sum(map(len, (planned.labelled.train, planned.labelled.val, planned.labelled.test))) == 24
    assert read_json(tmp_path / "run" / "data.json")["left_out"] == {"longer than the context": 1}


def test_texts_longer_than_the_context_are_learnt_in_pieces(base: Path, tmp_path: Path) -> None:
    """Unless it is their last token that counts, or they are to be cut; a step counts pieces."""
    words = {"a": "good fine ", "b": "bad poor "}
    texts = [{"text": words[label] * (n + 150), "label": label} for label in ("a", "b") for n in range(20)]
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    keys: dict[str, Any] = {"task": "classify", "context_length": 64, "epochs": 2, "batch_size": 8}
    split = plan(base, data, tmp_path / "split", **keys)
    whole = plan(base, data, tmp_path / "last", classes__pooling="last", **keys)
    cut = plan(base, data, tmp_path / "cut", too_long="cut", **keys)
    assert [one.recipe.long_texts for one in (split, whole, cut)] == ["split", "cut", "cut"]
    jobs = [ClassesJob(one) for one in (split, whole, cut)]
    rows, learnt = [len(job.train) for job in jobs], len(split.labelled.train)
    assert rows[0] >= 4 * learnt
    assert rows[1:] == [learnt] * 2
    assert [one.recipe.max_steps for one in (split, whole, cut)] == [round(2 * count / 8) for count in rows]
    assert jobs[0].train.cut == 0
    assert len(jobs[0].val.labels_of_texts) == len(split.labelled.val)
    with pytest.raises(UsageError, match="too_long = split is for task = classify"):
        plan(base, data, tmp_path / "sft", too_long="split")


@pytest.mark.parametrize("by", ["length", "column"])
def test_a_curriculum_begins_with_what_is_least(
    run: Run, tmp_path: Path, questions: list[dict[str, Any]], by: str
) -> None:
    data = write_jsonl(tmp_path / "ranked.jsonl", [one | {"rank": -number} for number, one in enumerate(questions)])
    keys: dict[str, Any] = {} if by == "length" else {"examples__curriculum_column": "rank"}
    done = run(data=data, examples__curriculum=by, examples__packing="padded", **keys, **SHORT, measured=False)
    ranks = read_json(done.run.path / "curriculum.json")["ranks"]
    loader = AnswersJob(done, ranks).loader(len(ranks), None)
    dealt = loader.batch(0)
    if by == "length":
        sizes = [int((row != loader.pad).sum()) for row in dealt.inputs]  # type: ignore[attr-defined]
        assert sizes == sorted(sizes)
        assert len(set(sizes)) > 5
        return
    first = next(one for one in done.answers.train if one.record["rank"] == min(ranks))
    assert dealt.inputs[0, : first.positions].tolist() == first.ids[:-1].tolist()
    bad = write_jsonl(tmp_path / "bad.jsonl", questions)
    with pytest.raises(UsageError, match=r"bad.jsonl#\d+: its field rank is None, and no number to order a curriculum"):
        run(data=bad, out=tmp_path / "bad", examples__curriculum=by, **keys, **SHORT)


def test_it_stops_early_where_held_out_loss_only_rises(run: Run) -> None:
    done = run(
        max_steps=60, save_every=4, early_stop=2, optim__learning_rate=0.3, optim__warmup_steps=20, measured=False
    )
    assert done.finished
    assert len(losses(done)) < 60


def test_an_adapter_for_another_base_is_refused_before_any_work(run: Run, base: Path, tmp_path: Path) -> None:
    first = run(adapter__method="lora", **SHORT, measured=False)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    keys: dict[str, Any] = {"adapter__method": "lora", "adapter__resume_from": str(first.run.path)}
    with pytest.raises(GroundupError, match="this adapter is for") as caught:
        plan(other, Path(str(first.recipe.data)), tmp_path / "more", **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "more").exists()


def test_the_pretraining_curve_is_spread_over_what_there_is(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From no pretraining to the run's own model, which is not trained again."""
    from groundup.posttraining import classifying

    texts = [{"text": f"{label} text number {n}", "label": label} for label in ("a", "b") for n in range(12)]
    data = write_jsonl(tmp_path / "data.jsonl", texts)
    planned = plan(base, data, tmp_path / "run", task="classify", classes__pretraining_curve=3)
    trained: list[tuple[str, Path, bool]] = []

    def trained_on(it: Finetuning, name: str) -> float:
        trained.append((name, it.base, it.untrained))
        return 0.5 + len(trained) / 100

    monkeypatch.setattr(classifying, "_trained_on", trained_on)
    monkeypatch.setattr(classifying, "_checkpoints_of", lambda run, it: [(100 * n, Path(f"c{n}")) for n in range(1, 9)])
    found = classifying._pretraining_curve(planned, 0.9)
    assert [row["tokens"] for row in found] == [0, 100, 300, 500, 800]
    assert [row["accuracy"] for row in found] == [0.51, 0.52, 0.53, 0.54, 0.9]
    assert trained[0] == ("0-tokens", planned.base, True)
    assert trained[1:] == [(f"{n}00-tokens", Path(f"c{n}"), False) for n in (1, 3, 5)]
    monkeypatch.setattr(classifying, "_checkpoints_of", lambda run, it: [(100, Path("c1"))])
    assert classifying._pretraining_curve(planned, 0.9) == []

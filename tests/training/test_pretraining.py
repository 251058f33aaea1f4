"""What a recipe can ask for, each in a small run of the whole way: plan, train, save, go on."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.config import Given
from groundup.model import load_model
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer
from groundup.training import Pretraining, plan_pretraining, pretrain
from groundup.training.loop_parts import LoopSettings
from groundup.training.plan import named_texts
from groundup.training.pretraining import Hooks

SMALL: dict[str, Any] = {
    "max_steps": 8, "save_every": 4, "log_every": 1, "seed": 5, "tokenizer.vocab_size": 300, "batch_tokens": 128,
    "micro_batch": 2, "precision": "float32", "attention": "explicit", "device": "cpu", "track": [], "compile": False,
    "monitor_every": 0.0, "model.n_layer": 2, "model.n_embd": 24, "model.n_head": 2, "model.context_length": 16,
    "model.dropout": 0.0, "optim.learning_rate": 0.01, "optim.warmup_steps": 2,
}  # fmt: skip


@dataclass
class Held:
    loss: float
    bits_per_byte: float = 1.0


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    chooser = random.Random(3)
    found = {}
    for name, said in (
        ("animals", "a cat and a dog sat on the mat by the door"),
        ("sums", "one and two are three or 12"),
    ):
        documents = [" ".join(chooser.choices(said.split(), k=chooser.randint(3, 40))) + "." for _ in range(120)]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return found


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run measures the machine first; here once would be too often."""
    monkeypatch.setattr("groundup.training.plan.matmul_flops", lambda *args, **named: 1e11)


def run(out: Path, data: Path | str, *, losses: list[float] | None = None, **over: Any) -> Pretraining:
    """Plan and train; ``losses`` are what evaluations find, in turn."""
    left = list(losses or [])
    found = Hooks(evaluate=lambda model, it: Held(left.pop(0) if left else 1.0), sample=lambda model, it, step: [])
    values = SMALL | {"data": str(data), "out": str(out)} | over
    planned = plan_pretraining(Given({key: value for key, value in values.items() if value is not None}, {}))
    return pretrain(planned, found)[1]


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "options",
    [
        {"loader.packing": "documents"},
        {"loader.packing": "best_fit"},
        {"loader.packing": "best_fit", "loader.fim_rate": 0.7},
        {"loader.fim_rate": 0.5, "loader.prefetch": 0},
        {"loss.label_smoothing": 0.1, "loss.z_loss": 1e-3, "loss.chunk": 3},
        {"model.n_predict": 1},
        {"model.experts.count": 3, "model.experts.balance_loss": 0.01},
        {"precision": "float16"},
        {"precision": "bfloat16", "checkpointing": "selective"},
        {"checkpointing": "block", "optim.optimizer": "adamw"},
        {"optim.average": 0.9, "optim.adaptive_clip": 0.1, "optim.gradient_noise": 1e-3},
        {"optim.rules": ["embedding lr=0.5", r"blocks\.0\. frozen"], "optim.embedding_gradient_scale": 0.5},
        {"tokenizer.algorithm": "characters", "tokenizer.vocab_size": None},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_option_learns_and_a_stop_in_the_middle_changes_nothing(
    texts: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flat = {"optim.decay_fraction": 0.0}  # a run that is longer than it was must not have fallen before
    assert run(whole, texts["animals"], **flat, **options).finished
    run(broken, texts["animals"], **flat, **options, max_steps=4)
    run(broken, texts["animals"], **flat, **options)
    found = [(row["loss"], row["grad_norm"]) for row in rows(whole)]
    assert [(row["loss"], row["grad_norm"]) for row in rows(broken)] == found
    assert found[-1][0] < found[0][0]
    files = [out / "checkpoints" / "latest" / "model.safetensors" for out in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_average_is_what_is_saved_and_the_raw_weights_go_on(texts: dict[str, Path], tmp_path: Path) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    run(plain, texts["animals"])
    run(averaged, texts["animals"], **{"optim.average": 0.99})
    assert [row["loss"] for row in rows(averaged)] == [row["loss"] for row in rows(plain)]
    weights = [load_model(out / "checkpoints" / "latest").embedding.weight for out in (plain, averaged)]
    assert not torch.equal(*weights)


def test_several_texts_are_mixed_and_the_first_is_held_out(texts: dict[str, Path], tmp_path: Path) -> None:
    data = f"animals={texts['animals']}, sums={texts['sums']}"
    only, mixed = tmp_path / "only", tmp_path / "mixed"
    done = run(mixed, data, **{"loader.mixture": {"animals": 0.5, "sums": 0.5}})
    assert set(done.sets) == {"animals", "sums"}
    assert done.prepared.folder.name == "animals"
    run(only, data, **{"loader.mixture": {"animals": 1.0, "sums": 0.0}})
    assert [row["loss"] for row in rows(only)] != [row["loss"] for row in rows(mixed)]
    switched = tmp_path / "switched"
    run(
        switched, data,
        **{"loader.mixture": {"animals": 1, "sums": 0}, "loader.schedule": [{"at": 0.5, "animals": 0, "sums": 1}],
           "loader.schedule_shape": "steps"},
    )  # fmt: skip
    losses = [[row["loss"] for row in rows(out)] for out in (only, switched)]
    assert losses[0][:4] == losses[1][:4]
    assert losses[0][4] != losses[1][4]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("stdlib", {}),
        ("a=b, c=d/e", {"a": "b", "c": "d/e"}),
        ("web=hf:x/y,code=src", {"web": "hf:x/y", "code": "src"}),
        ("folder/with=sign.txt", {}),
        ("a=b, c", {}),
    ],
)
def test_named_texts(data: str, expected: dict[str, str]) -> None:
    assert named_texts(data) == expected


def test_names_and_weights_that_do_not_fit_are_said(texts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a name is there twice"):
        named_texts("a=b, a=c")
    with pytest.raises(UsageError, match="name them, as in"):
        run(tmp_path / "run", texts["animals"], **{"loader.mixture": {"animals": 1.0}})


def test_it_goes_on_from_a_model_at_a_longer_context(texts: dict[str, Path], tmp_path: Path) -> None:
    first, longer = tmp_path / "first", tmp_path / "longer"
    run(first, texts["animals"])
    shape = {key: None for key in SMALL if key.startswith("model.") or key.startswith("tokenizer.")}
    started = {"init_from": str(first), "model.context_length": 32, "model.rope_theta": 50_000.0}
    done = run(longer, texts["sums"], **shape | started, **{"optim.learning_rate": 1e-9, "save_every": 8})
    assert done.recipe.model.context_length == 32
    assert done.prepared.tokenizer.fingerprint == Tokenizer.load(first / "data" / "tokenizer").fingerprint
    weights = [load_model(out / "checkpoints" / "best").embedding.weight for out in (first, longer)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match=r"model.n_layer = 3, but the model of init_from = .* has 2"):
        run(tmp_path / "other", texts["sums"], **shape | started | {"model.n_layer": 3})


def test_the_best_is_kept_wherever_it_was_found_and_a_stale_run_ends(texts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(
        out, texts["animals"], max_steps=20, save_every=8, eval_every=2, early_stop=3,
        losses=[3.0, 2.0, 2.5, 2.6, 2.7, 2.8],
    )  # fmt: skip
    assert done.finished
    assert [(row["step"], row["loss"]) for row in rows(out, "eval")] == [
        (2, 3.0),
        (4, 2.0),
        (6, 2.5),
        (8, 2.6),
        (10, 2.7),
    ]
    assert os.readlink(out / "checkpoints" / "best") == "step-000004"
    assert os.readlink(out / "checkpoints" / "latest") == "step-000010"
    assert run(out, texts["animals"], max_steps=20, save_every=8, eval_every=2, early_stop=3).trained is False


def test_a_usr1_saves_and_goes_on(texts: dict[str, Path], tmp_path: Path) -> None:
    out, asked = tmp_path / "run", []

    class Asking(float):
        """A held-out loss that sends the signal when it is looked at."""

        def __lt__(self, other: object) -> bool:
            if not asked:
                asked.append(os.kill(os.getpid(), signal.SIGUSR1))
            return True

    assert run(out, texts["animals"], max_steps=9, save_every=8, eval_every=3, keep=9, losses=[Asking(2.0)]).finished
    assert "step-000004" in checkpoints(out) or "step-000003" in checkpoints(out)


def test_checkpoints_at_multiples_are_kept_for_good(texts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, texts["animals"], max_steps=8, save_every=1, keep=1, keep_every=3, losses=[1.0])
    assert checkpoints(out) == ["step-000001", "step-000003", "step-000006", "step-000008"]


def test_float16_looks_for_its_scale_and_does_not_call_that_divergence(texts: dict[str, Path], tmp_path: Path) -> None:
    """Every step overflows until the scale has come down by a factor of 2^12: many more in a row than ``patience``."""
    out = tmp_path / "run"
    run(out, texts["animals"], precision="float16", max_steps=30, patience=3, **{"optim.embedding_gradient_scale": 1e6})
    found = rows(out)
    assert found[-1].get("skipped_steps", 0) < 30
    assert LoopSettings.__dataclass_fields__["patience"].default == 5


def test_another_corpus_in_the_place_of_the_runs_is_noticed(texts: dict[str, Path], tmp_path: Path) -> None:
    from groundup.data import prepare

    corpus, out, own = tmp_path / "corpus", tmp_path / "run", {"tokenizer.vocab_size": None}
    prepare(str(texts["animals"]), corpus, vocab_size=300)
    run(out, corpus, max_steps=4, **own)
    assert not (out / "data").exists()
    run(out, corpus, **own)
    assert len(rows(out)) == 8
    turned = tmp_path / "turned.jsonl"  # the same words, so the same vocabulary
    turned.write_text("\n".join(reversed(texts["animals"].read_text().splitlines())))
    prepare(str(turned), corpus, vocab_size=300)
    with pytest.raises(GroundupError, match=r"is not the one that the run in .* began with"):
        run(out, corpus, max_steps=12, **own)


def test_a_text_shorter_than_a_batch_is_said_and_read_again(
    texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path / "run", texts["animals"], batch_tokens=16 * 2 * 400, max_steps=2, save_every=2)
    assert done.finished
    said = " ".join(capsys.readouterr().err.split())
    tokens = done.prepared.train.n_tokens
    assert tokens < 12_800
    assert f"{tokens:,} tokens of text are fewer than a step reads (batch_tokens = 12,800)" in said


def test_a_profile_and_the_hardware_are_noted_when_asked(texts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, texts["animals"], profile="3:4", monitor_every=0.05, track=["tensorboard"])
    assert (out / "profile" / "step-3-4.json.gz").is_file()
    assert rows(out, "hardware")
    assert any((out / "tensorboard").iterdir())

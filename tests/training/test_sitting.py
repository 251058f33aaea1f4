"""A run that is no pretraining, on the same sitting: texts are sorted into two classes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from groundup.data import Loader, Prefetcher
from groundup.model import Classifier, ModelConfig, Transformer, load_model
from groundup.optim import OptimConfig
from groundup.runtime import GroundupError
from groundup.runtime.files import folder_lock
from groundup.tokenizer import Tokenizer
from groundup.training import Classification, Job, LabelledTexts, Measured, Outcome, RunKeys, train
from groundup.training.parallel import compile_blocks
from groundup.training.run import RunFolder

CONFIG = ModelConfig(vocab_size=31, context_length=13, n_layer=2, n_head=3, n_embd=18, n_ff=29)
STEPS = 24


@dataclass(frozen=True)
class LabelRecipe:
    """All keys that a sitting asks for, and no other."""

    seed: int = 5
    device: str = "cpu"
    precision: Any = "float32"
    attention: Any = "explicit"
    compile: bool | None = False
    checkpointing: Any = "none"
    parallel: Any = "auto"
    rank_timeout: float = 60.0
    minutes: float | None = None
    max_steps: int | None = STEPS
    batch_tokens: int | None = 16 * 13
    micro_batch: int | None = 8
    log_every: int = 1
    save_every: int | None = 7
    eval_every: int | None = None
    early_stop: int = 0
    patience: int = 5
    keep: int = 9
    keep_every: int | None = None
    track: tuple[str, ...] = ()
    profile: str | None = None
    monitor_every: float = 0.0
    watts: float | None = None
    grams_per_kwh: float = 400.0
    resume: bool = True
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=0.02, warmup_steps=2))


class LabelledLoader(Loader):
    """Text i, whose label says whether it holds token 7: a function of the seed and i."""

    def samples(self, first: int, count: int) -> Any:
        ids = np.zeros((count, self.context_length), np.int64)
        lengths, labels = np.zeros(count, np.int64), np.arange(first, first + count) % 2
        for row in range(count):
            chooser = np.random.default_rng([self.seed, first + row])
            ids[row] = chooser.integers(8, CONFIG.vocab_size, self.context_length)
            lengths[row] = chooser.integers(4, self.context_length + 1)
            ids[row, 2] = 7 if labels[row] else ids[row, 2]
        return LabelledTexts(ids, lengths, labels)  # type: ignore[arg-type]

    def epoch_of(self, sample: int) -> int:
        return sample // 89

    def report(self) -> dict[str, Any]:
        return {}


class SortingJob(Job[Classifier]):
    """Learns whether a text holds token 7.

    Args:
        stop_at: the micro-batch at which somebody asks the run to stop.
        alone: checkpoints hold no model, as of adapters, but only what is trained.
        change: number of the call, batch and loss to the loss that is learnt from.
    """

    def __init__(
        self, out: Path, tokenizer: Tokenizer, *, stop_at: int | None = None, alone: bool = False,
        change: Callable[[int, LabelledTexts, Tensor], Tensor] | None = None, dropout: float = 0.1, **keys: Any,
    ) -> None:  # fmt: skip
        recipe: RunKeys = LabelRecipe(**keys)
        super().__init__(
            recipe=recipe, run=RunFolder(out), values={}, tokenizer=tokenizer, device=torch.device("cpu"),
            precision="float32", positions=CONFIG.context_length,
        )  # fmt: skip
        self.stop_at, self.alone, self.change = stop_at, alone, change
        self.config = replace(CONFIG, dropout=dropout)
        self.dealt = 0
        self.asked: list[tuple[int, int | None]] = []

    def build(self, *, fresh: bool) -> Classifier:
        self.fresh = fresh
        return Classifier(Transformer(self.config), 2, pooling="mean")

    def objective(self) -> Any:
        return Classification() if self.change is None else Changed(self.change)

    def loader(self, micro_batch: int, samples: int | None) -> Loader | Prefetcher:
        self.asked.append((micro_batch, samples))
        return LabelledLoader(CONFIG.context_length, micro_batch, self.recipe.seed)

    def on_device(self, batch: Any) -> Any:
        self.dealt += 1
        if self.dealt == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().on_device(batch)

    def metrics(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"wrong": 1 - row["accuracy"]}

    def measure(self, model: Classifier) -> Measured:
        model.eval()
        held_out = super().on_device(LabelledLoader(CONFIG.context_length, 101, 1009).batch(0))
        with torch.inference_mode():
            scores = model(held_out.ids, held_out.lengths)
        right = (scores.argmax(-1) == held_out.labels).float().mean().item()
        return Measured(F.cross_entropy(scores, held_out.labels).item(), {"accuracy": right}, f"held-out {right:.0%}")

    def samples(self, model: Classifier, step: int) -> list[dict[str, Any]]:
        return [{"step": step, "temperature": 0.0, "prompt": "seven", "text": "yes"}]

    def transformer(self, model: Classifier) -> Transformer | None:
        return None if self.alone else model.model

    def beside(self, model: Classifier, own: Mapping[str, Tensor]) -> Callable[[Path], None]:
        told = json.dumps({name: tensor.tolist() for name, tensor in own.items()})

        def write(place: Path) -> None:
            (place / "own.json").write_text(told)

        return write


class Changed:
    """Classification, whose loss is changed by a function of the number of the call and the batch."""

    def __init__(self, change: Callable[[int, LabelledTexts, Tensor], Tensor]) -> None:
        self.change, self.calls = change, 0

    def count(self, batch: LabelledTexts) -> int:
        return len(batch.labels)

    def __call__(self, model: nn.Module, batch: LabelledTexts) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        loss, metrics = Classification()(model, batch)
        return self.change(self.calls, batch, loss), metrics


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def computed(out: Path) -> list[tuple[float, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["accuracy"]) for row in rows(out)]


ALONE: dict[str, Any] = {"alone": True, "optim": OptimConfig(learning_rate=0.02, rules=[r"^model\. frozen"])}


@pytest.mark.parametrize(
    "options", [{}, {"optim": OptimConfig(learning_rate=0.02, average=0.9)}, ALONE], ids=["plain", "average", "alone"]
)
def test_a_stop_in_the_middle_changes_not_one_bit(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model, ended = train(SortingJob(whole, tokenizer, **options))
    assert ended == Outcome(finished=True, trained=True)
    first = SortingJob(broken, tokenizer, stop_at=2 * 9, **options)  # two micro-batches a step
    assert train(first)[1] == Outcome(finished=False, trained=True)
    assert os.readlink(broken / "checkpoints" / "latest") == "step-000009"
    second = SortingJob(broken, tokenizer, **options)
    again, ended = train(second)
    assert ended == Outcome(finished=True, trained=True)
    assert (first.fresh, second.fresh) == (True, False)
    assert second.dealt == 2 * (STEPS - 9)
    assert computed(broken) == computed(whole)
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    ends = [out / "checkpoints" / "latest" for out in (whole, broken)]
    names = [sorted(str(path.relative_to(end)) for path in end.rglob("*.safetensors")) for end in ends]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = (load_file(end / name) for end in ends)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert train(SortingJob(broken, tokenizer, **options))[1] == Outcome(finished=True, trained=False)


def test_accuracy_is_measured_at_milestones_and_the_lowest_loss_is_the_best(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    job = SortingJob(tmp_path, tokenizer)
    train(job)
    assert job.asked == [(8, STEPS * 16)]
    found = rows(tmp_path, "eval")
    assert [row["step"] for row in found] == [7, 14, 21, STEPS]
    assert found[0]["accuracy"] < found[-1]["accuracy"]
    assert found[-1]["accuracy"] > 0.9
    best = min(found, key=lambda row: row["loss"])
    assert os.readlink(tmp_path / "checkpoints" / "best") == f"step-{best['step']:06d}"
    assert all(row["wrong"] == 1 - row["accuracy"] for row in rows(tmp_path))
    assert [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [
        row["step"] for row in found
    ]


def test_a_checkpoint_holds_the_model_for_others_and_beside_it_what_that_lacks(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    plain, averaged, alone = tmp_path / "plain", tmp_path / "averaged", tmp_path / "alone"
    latest = Path("checkpoints", "latest")

    def ours(out: Path) -> dict[str, Tensor]:
        (path,) = (out / latest / "training_state").glob("extra-*")
        return {name: tensor for name, tensor in load_file(path).items() if name.startswith("extra/own/")}

    def told(out: Path) -> Tensor:
        found = json.loads((out / latest / "own.json").read_text())
        assert list(found) == ["score.weight"]
        return torch.tensor(found["score.weight"])

    model, _ = train(SortingJob(plain, tokenizer))
    opened = load_model(plain / latest).state_dict()
    assert all(torch.equal(tensor, opened[name]) for name, tensor in model.model.state_dict().items())
    assert torch.equal(told(plain), model.score.weight)
    assert list(ours(plain)) == ["extra/own/score.weight"]
    assert "own.json" in json.loads((plain / latest / "checksums.json").read_text())

    optim = OptimConfig(learning_rate=0.02, warmup_steps=2, average=0.9)
    raw, _ = train(SortingJob(averaged, tokenizer, optim=optim))
    assert all(torch.equal(tensor, raw.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(load_model(averaged / latest).embedding.weight, raw.model.embedding.weight)
    assert not torch.equal(told(averaged), raw.score.weight)
    assert torch.equal(ours(averaged)["extra/own/score.weight"], raw.score.weight)

    only, _ = train(SortingJob(alone, tokenizer, **ALONE))
    assert not list((alone / latest).glob("model*")) + list((alone / latest).glob("config.json"))
    assert (alone / latest / "tokenizer.json").is_file()
    assert torch.equal(ours(alone)["extra/own/score.weight"], only.score.weight)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train(SortingJob(tmp_path, tokenizer, max_steps=2))
    with pytest.raises(GroundupError, match=r"step-000002: this checkpoint holds other weights than this run trains"):
        train(SortingJob(tmp_path, tokenizer, max_steps=4, alone=True))
    with folder_lock(tmp_path, "working"), pytest.raises(GroundupError, match="another process is working here"):
        train(SortingJob(tmp_path, tokenizer))


def test_memory_that_runs_out_halves_the_micro_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sizes = []

    def small(call: int, batch: LabelledTexts, loss: Tensor) -> Tensor:
        sizes.append(len(batch.labels))
        if call > 5 and len(batch.labels) > 4:
            raise torch.OutOfMemoryError("no more")
        return loss

    # Dropout would be drawn anew for each micro-batch.
    outs = [tmp_path / "roomy", tmp_path / "tight"]
    for out, change in zip(outs, (None, small), strict=True):
        train(SortingJob(out, tokenizer, max_steps=5, change=change, dropout=0.0))
    assert sizes == [8] * 6 + [4] * 12  # two whole steps, one that failed in the middle, and it and two more in halves
    roomy, tight = ([row["loss"] for row in rows(out)] for out in outs)
    assert tight == pytest.approx(roomy, rel=1e-5)
    assert roomy[0] != roomy[-1]


def test_gradients_that_are_not_finite_lead_back_to_the_checkpoint(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(call: int, batch: LabelledTexts, loss: Tensor) -> Tensor:
        return loss * float("nan") if call in (9, 11, 12) else loss

    job = SortingJob(tmp_path, tokenizer, change=spoilt, patience=2, max_steps=8, save_every=4)
    _, ended = train(job)
    assert ended == Outcome(finished=True, trained=True)
    assert job.dealt == 2 * 10  # steps 5 and 6 were made twice
    assert "Back to step 4" in " ".join(capsys.readouterr().err.split())
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))
    assert rows(tmp_path)[-1]["skipped_steps"] == 2


def test_the_blocks_inside_a_classifier_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    model = Transformer(CONFIG)
    compile_blocks(Classifier(model, 2))
    assert compiled == list(model.blocks)

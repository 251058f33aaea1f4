"""Checkpoints: exact, atomic, and robust against damage."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

import groundup.runtime.files as files
from groundup.model import ModelConfig, Transformer
from groundup.optim import OptimConfig, build_optimizers
from groundup.runtime import GroundupError
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizers


@pytest.fixture
def config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(vocab_size=tokenizer.vocab_size, context_length=13, n_layer=2, n_head=3, n_embd=18, n_ff=29)


def step(model: Transformer, optimizers: dict[str, torch.optim.Optimizer], seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    model(ids).square().mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, model: Transformer, tokenizer: Tokenizer, at: int, *, best: bool = False, keep: int = 2) -> Path:
    optimizers = build_optimizers(model, OptimConfig())
    step(model, optimizers, at)
    return Checkpoints(folder, keep).save(model, tokenizer, optimizers, {"step": at}, best=best)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_going_on_from_a_checkpoint_gives_the_same_bits(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, kind: str
) -> None:
    optim = OptimConfig(optimizer=kind)  # type: ignore[arg-type]
    optimizers = build_optimizers(model, optim)
    for seed in range(3):
        step(model, optimizers, seed)
    Checkpoints(tmp_path).save(model, tokenizer, optimizers, {"step": 3, "note": "x"}, best=True)
    for seed in range(3, 6):
        step(model, optimizers, seed)

    other = Transformer(model.config)
    others = build_optimizers(other, optim)
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert restored.state == {"step": 3, "note": "x"}
    other.load_state_dict(restored.weights)
    restore_optimizers(other, others, restored.tensors, restored.folder)
    for seed in range(3, 6):
        step(other, others, seed)
    for (name, one), (_, two) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    ours, theirs = optimizer_tensors(model, optimizers), optimizer_tensors(other, others)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, model, tokenizer, 1)
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors", ".txt"}
    for file in path.rglob("*"):
        if file.is_file():
            assert not file.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")), file


def test_the_newest_and_the_best_are_kept(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    for at, best in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        save(tmp_path, model, tokenizer, at, best=best)
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-000005", "step-000004", "step-000002"]
    assert os.readlink(tmp_path / "latest") == "step-000005"
    assert os.readlink(tmp_path / "best") == "step-000002"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json"]
)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(
    tmp_path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    damage: object,
    name: str,
) -> None:
    save(tmp_path, model, tokenizer, 1)
    newest = save(tmp_path, model, tokenizer, 2)
    damage(newest / name)  # type: ignore[operator]
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert restored.state["step"] == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert name.rsplit("/", 1)[-1] in said
    assert "checkpoint before it" in said


def test_when_every_checkpoint_is_damaged_that_is_one_line(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    for at in (1, 2):
        truncate(save(tmp_path, model, tokenizer, at) / "model.safetensors")
    with pytest.raises(GroundupError, match="none of the 2 checkpoints can be read"):
        Checkpoints(tmp_path).newest()
    assert len(Checkpoints(tmp_path).all()) == 2  # nothing was removed


def test_a_full_disk_leaves_the_checkpoint_before_untouched(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, model, tokenizer, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(GroundupError, match=r"cannot write .*no space left on the disk"):
            save(tmp_path, model, tokenizer, 2)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("step") or path.suffix == ".part"] == [
        "step-000001"
    ]
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert restored.state["step"] == 1


def test_what_a_killed_writer_left_is_removed_and_never_read(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    save(tmp_path, model, tokenizer, 1)
    half = tmp_path / ".step-000002.abcd1234.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-000001"]
    assert half.exists()  # looking on must not disturb a process that is saving
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert restored.state["step"] == 1
    assert not half.exists()


def test_state_of_another_optimizer_is_refused(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    save(tmp_path, model, tokenizer, 1)
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    other = build_optimizers(model, OptimConfig(optimizer="adamw"))
    with pytest.raises(GroundupError, match="muon"):
        restore_optimizers(model, other, restored.tensors, restored.folder)


def test_the_checksums_name_every_file(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, model, tokenizer, 1)
    listed = set(json.loads((path / "checksums.json").read_text()))
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {"checksums.json"}
    assert listed == there

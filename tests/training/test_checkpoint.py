"""Checkpoints: exact, written while training goes on, and robust against damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from groundup.model import Experts, ModelConfig, Transformer, load_model, save_model
from groundup.optim import OptimConfig, build_optimizers
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.files import verify_folder
from groundup.tokenizer import Tokenizer
from groundup.training import checkpoint_state
from groundup.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizers
from tensors import assert_same

Optimizers = dict[str, torch.optim.Optimizer]


@pytest.fixture
def config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(vocab_size=tokenizer.vocab_size, context_length=13, n_layer=2, n_head=3, n_embd=18, n_ff=29)


def step(model: Transformer, optimizers: Optimizers, seed: int) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    model(ids).square().mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


def save(
    folder: Path, model: Transformer, tokenizer: Tokenizer, at: int, *, best: bool = False, keep: int = 2, **more: Any
) -> Path:
    optimizers = build_optimizers(model, OptimConfig())
    step(model, optimizers, at)
    checkpoints = Checkpoints(folder, keep, more.pop("keep_every", None))
    path = checkpoints.save(model, tokenizer, optimizers, {"step": at}, best=best, **more)
    checkpoints.finish()
    return path


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# ---- exact


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_going_on_from_a_checkpoint_gives_the_same_bits(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, kind: str, slow: None
) -> None:
    optim = OptimConfig(optimizer=kind)  # type: ignore[arg-type]
    optimizers = build_optimizers(model, optim)
    for seed in range(3):
        step(model, optimizers, seed)
    checkpoints = Checkpoints(tmp_path)
    state = {"step": 3, "note": ["x"]}
    checkpoints.save(model, tokenizer, optimizers, state, best=True)
    state["note"].append("changed since")  # type: ignore[attr-defined]
    checkpoints.settle()
    for seed in range(3, 6):  # while it is still being written
        step(model, optimizers, seed)
    checkpoints.finish()

    other = Transformer(model.config)
    others = build_optimizers(other, optim)
    step(other, others, 99)  # state that a rollback must forget
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert restored.state == {"step": 3, "note": ["x"]}
    other.load_state_dict(restored.weights)
    restore_optimizers(other, others, restored.tensors, restored.folder)
    for seed in range(3, 6):
        step(other, others, seed)
    assert_same(model.state_dict(), other.state_dict())
    assert_same(optimizer_tensors(model, optimizers), optimizer_tensors(other, others))


MODELS: dict[str, dict[str, Any]] = {
    "ours": {},
    "gpt2": dict(norm="layernorm", positions="learned", feed_forward="gelu", qk_norm=False, bias=True),
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False},
    "experts": {"experts": Experts(count=4, active=2, width=7)},
}


@pytest.mark.parametrize("shard_bytes", [10**9, 9_000])
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_the_one_that_save_model_writes(
    tmp_path: Path, tokenizer: Tokenizer, name: str, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dict(vocab_size=tokenizer.vocab_size, context_length=13, n_layer=2, n_head=3, n_embd=18, n_ff=29)
    model = Transformer(ModelConfig(**(shape | MODELS[name])))
    monkeypatch.setattr(checkpoint_state, "SHARD_BYTES", shard_bytes)
    ours = save(tmp_path / "ours", model, tokenizer, 1)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    end = tokenizer.end_of_text_id
    save_model(model, theirs, bos_id=end, eos_id=end, shard_bytes=shard_bytes)
    names = sorted(path.name for path in theirs.iterdir())
    assert len([one for one in names if one.endswith(".safetensors")]) == 1 or shard_bytes < 10**9
    for one in names:
        if one.endswith(".json"):
            assert json.loads((ours / one).read_text()) == json.loads((theirs / one).read_text()), one
        else:
            assert_same(load_file(theirs / one), load_file(ours / one))
    assert sorted(path.name for path in ours.glob("model*")) == [one for one in names if one.startswith("model")]
    assert_same(model.state_dict(), load_model(ours).state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_averaged_weights_are_exported_and_the_raw_ones_come_back(
    tmp_path: Path, config: ModelConfig, tokenizer: Tokenizer, tied: bool
) -> None:
    model = Transformer(ModelConfig.from_dict(config.to_dict() | {"tie_embeddings": tied}))
    average = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    extra = {f"average/{name}": tensor for name, tensor in average.items()}
    path = save(tmp_path, model, tokenizer, 1, exported=average, extra=extra)
    exported = load_model(path)
    assert_same(average, dict(exported.named_parameters()))
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert_same(model.state_dict(), restored.weights)
    assert_same(extra, restored.extra)
    assert not any(name.startswith(("extra", "model")) for name in restored.tensors)


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    extra = {
        "loss_scale/scale": torch.tensor(65536.0),
        "counts": torch.arange(7),
        "narrow": torch.randn(5, 3).bfloat16(),
        "half": torch.randn(3).half(),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.randint(0, 256, (11,), dtype=torch.uint8),
        "doubles": torch.randn(2, 3, 5, dtype=torch.float64),
        "none": torch.empty(0, 5),
        "turned": torch.randn(5, 3).T,
        "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    save(tmp_path, model, tokenizer, 1, extra=extra)
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert set(restored.extra) == set(extra)
    for name, tensor in extra.items():
        found = restored.extra[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert found.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8)), name


def test_distributed_checkpoint_of_torch_reads_the_state(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    optimizers = build_optimizers(model, OptimConfig(optimizer="adamw"))
    step(model, optimizers, 1)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(model, tokenizer, optimizers, {"step": 1}, best=False)
    checkpoints.finish()
    expected = optimizer_tensors(model, optimizers)
    found = {name: torch.full_like(tensor, -1.0) for name, tensor in expected.items()}
    load(found, storage_reader=HuggingFaceStorageReader(str(path / "training_state")), no_dist=True)
    assert_same(expected, found)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, model, tokenizer, 1)
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors", ".txt"}
    for file in path.rglob("*"):
        if file.is_file():
            assert not file.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")), file


def test_state_of_another_optimizer_is_refused(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    save(tmp_path, model, tokenizer, 1)
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    other = build_optimizers(model, OptimConfig(optimizer="adamw"))
    with pytest.raises(GroundupError, match="muon"):
        restore_optimizers(model, other, restored.tensors, restored.folder)


def test_a_model_with_adapters_is_refused_before_anything_is_written(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    block: Any = model.blocks[0]
    block.attention.q = torch.nn.Sequential(block.attention.q)
    with pytest.raises(UsageError, match="behind an adapter or quantized"):
        Checkpoints(tmp_path / "run").save(model, tokenizer, {}, {"step": 1}, best=False)
    assert not (tmp_path / "run").exists()


# ---- while training goes on


def test_saving_returns_before_it_is_written(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, slow: None
) -> None:
    optimizers = build_optimizers(model, OptimConfig())
    step(model, optimizers, 1)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(model, tokenizer, optimizers, {"step": 1}, best=True)
    assert not path.exists()
    assert checkpoints.all() == []
    second = checkpoints.save(model, tokenizer, optimizers, {"step": 2}, best=False)  # waits for the first
    assert path.exists()
    assert not second.exists()
    restored = checkpoints.newest()  # waits too, and does not take the half for a leftover
    assert restored is not None
    assert restored.state["step"] == 2
    checkpoints.finish()
    assert (tmp_path / "best").resolve() == path
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best", "latest", path.name, second.name]


# ---- which are kept


def test_the_newest_and_the_best_are_kept(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    for at, best in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        save(tmp_path, model, tokenizer, at, best=best)
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-000005", "step-000004", "step-000002"]
    assert os.readlink(tmp_path / "latest") == "step-000005"
    assert os.readlink(tmp_path / "best") == "step-000002"


def test_milestones_are_never_removed(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    for at in range(1, 9):
        save(tmp_path, model, tokenizer, at, keep=1, keep_every=3)
    assert [int(path.name[-6:]) for path in Checkpoints(tmp_path).all()] == [8, 6, 3]


def test_the_same_step_again_takes_the_place_of_the_first(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    for _ in range(2):
        path = save(tmp_path, model, tokenizer, 4)
    assert Checkpoints(tmp_path).all() == [path]
    assert_same(model.state_dict(), load_model(path).state_dict())


def test_an_old_one_goes_only_after_the_new_one_was_read_back(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, model, tokenizer, 1, keep=1)
    from groundup.training import checkpoint

    def lies(place: Path, from_disk: bool = False) -> None:
        """A disk that kept another bit than it was given."""
        flip(place / "model.safetensors")
        verify_folder(place, from_disk)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify_folder", lies)
        with pytest.raises(GroundupError, match=r"/step-000002/model.safetensors: damaged"):
            save(tmp_path, model, tokenizer, 2, keep=1)
    assert Checkpoints(tmp_path).all() == [first]
    assert os.readlink(tmp_path / "latest") == first.name
    assert [int(path.name[-6:]) for path in [save(tmp_path, model, tokenizer, 3, keep=1)]] == [3]
    assert not first.exists()


def test_the_checksums_name_every_file(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, model, tokenizer, 1)
    listed = set(json.loads((path / "checksums.json").read_text()))
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {"checksums.json"}
    assert listed == there


# ---- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


FILES = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "training_state/adamw-exp_avg-00001-of-00001.safetensors",
    "training_state/adamw-exp_avg_sq-00001-of-00001.safetensors",
    "training_state/adamw-step-00001-of-00001.safetensors",
    "training_state/muon-momentum_buffer-00001-of-00001.safetensors",
    "training_state/extra-00001-of-00001.safetensors",
    "training_state/state.json",
    "checksums.json",
]


DAMAGE = [(name, damage) for name in FILES for damage in (flip, truncate, Path.unlink)]


# A folder without a list of checksums is one that another tool wrote.
@pytest.mark.parametrize(("name", "damage"), [one for one in DAMAGE if one != ("checksums.json", Path.unlink)])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(
    tmp_path: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    name: str,
) -> None:
    extra = {"scale": torch.ones(3)}
    save(tmp_path, model, tokenizer, 1, extra=extra)
    expected = snapshot(model.state_dict())
    newest = save(tmp_path, model, tokenizer, 2, best=True, extra=extra)
    damage(newest / name)
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert restored.state["step"] == 1
    assert_same(expected, restored.weights)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "step-000002" in said
    assert "checkpoint before it" in said
    # It is kept, but is not the run's any more.
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-000001"]
    assert (tmp_path / "damaged-step-000002").is_dir()
    assert os.readlink(tmp_path / "latest") == "step-000001"
    assert not (tmp_path / "best").is_symlink()


def test_when_every_checkpoint_is_damaged_that_is_one_line(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    for at in (1, 2):
        truncate(save(tmp_path, model, tokenizer, at) / "model.safetensors")
    with pytest.raises(GroundupError, match="none of the 2 checkpoints can be read"):
        Checkpoints(tmp_path).newest()
    assert len(Checkpoints(tmp_path).all()) == 2  # nothing was removed


def test_what_a_killed_writer_left_is_removed_and_never_read(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    save(tmp_path, model, tokenizer, 1)
    half = tmp_path / ".step-000002.abcd1234.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".latest.abcd1234.part").symlink_to("step-000001")
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-000001"]
    assert half.exists()  # looking on must not disturb a process that is saving
    restored = Checkpoints(tmp_path).newest()
    assert restored is not None
    assert restored.state["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_there_is_nothing_to_go_on_from_in_an_empty_folder(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).newest() is None
    assert Checkpoints(tmp_path / "absent").newest() is None

"""Started alone: four processes save and load checkpoints at several world sizes and hold every tensor against what
was saved. Prints a line ``equal: SAVED -> LOADED`` for each case.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.model import ModelConfig, Transformer, load_model
from groundup.optim import OptimConfig, WeightAverage, build_optimizers
from groundup.optim.sharded import local_part
from groundup.runtime import GroundupError
from groundup.runtime.process_group import World, barrier
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint import Checkpoints, optimizer_tensors, restore_optimizers
from groundup.training.checkpoint_writer import LiveWriter
from groundup.training.objectives import NextToken
from groundup.training.parallel import Stepper, load_full, spread

RANKS = 4
# Rows that four ranks do not share evenly; of six rows the last rank has none.
CONFIG = ModelConfig(vocab_size=263, context_length=13, n_layer=2, n_head=3, n_embd=6, n_ff=29)


class Run:
    """A model spread over the ranks, its optimizers and its averaged weights."""

    def __init__(self, world: World, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Transformer(CONFIG)
        spread(Stepper(self.model, NextToken()), world, "fsdp")
        self.optimizers = build_optimizers(self.model, OptimConfig())
        self.average = WeightAverage(self.model, 0.9)

    def step(self, seed: int) -> None:
        ids = torch.randint(CONFIG.vocab_size, (2, 12), generator=torch.Generator().manual_seed(seed))
        self.model(ids).square().mean().backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        self.average.update(seed)

    def extra(self) -> dict[str, Tensor]:
        return {f"average/{name}": tensor for name, tensor in self.average.tensors.items()}

    def everything(self) -> dict[str, Tensor]:
        """Every tensor, whole; all ranks must ask."""
        tensors: dict[str, Any] = {f"weights/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizers) | self.extra()
        whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
        return {name: tensor.detach().clone() for name, tensor in whole.items()}


def save(run: Run, world: World, folder: Path, tokenizer: Tokenizer) -> None:
    """Two steps, and a checkpoint that is written while a third is made."""
    for seed in range(2):
        run.step(seed)
    checkpoints = Checkpoints(folder, world=world)
    expected = run.everything()
    checkpoints.save(
        run.model, tokenizer, run.optimizers, {"step": 2}, best=True, extra=run.extra(), exported=run.average.tensors
    )
    checkpoints.settle()
    run.step(2)
    checkpoints.finish()
    barrier(world)
    if world.is_main:
        save_file(expected, folder / "expected.safetensors")
        exported = dict(load_model(folder / "step-000002").named_parameters())
        for name, parameter in exported.items():
            assert torch.equal(parameter, expected[f"average/{name}"]), name
    barrier(world)


def check(world: World, folder: Path, label: str) -> None:
    """Load into a fresh run of another seed, compare every tensor, and see that training goes on."""
    run = Run(world, seed=9)
    restored = Checkpoints(folder, world=world).newest()
    assert restored is not None
    assert restored.state == {"step": 2}
    load_full(run.model, restored.weights)
    restore_optimizers(run.model, run.optimizers, restored.tensors, restored.folder)
    for name, tensor in run.average.tensors.items():
        local_part(tensor).copy_(restored.extra.part_like(f"average/{name}", tensor))
    expected, found = load_file(folder / "expected.safetensors"), run.everything()
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    run.step(3)
    if world.is_main:
        print(f"equal: {label}", flush=True)
    barrier(world)


def one_rank_fails(run: Run, world: World, folder: Path, tokenizer: Tokenizer) -> None:
    """What rank 2 cannot write, rank 0 tells; the checkpoint before stays, and the next save is tried."""
    checkpoints = Checkpoints(folder, world=world)
    write = LiveWriter.write

    def full(self: LiveWriter, place: Path) -> dict[str, str]:
        raise GroundupError("cannot write its part: no space left on the disk.")

    if world.rank == 2:
        LiveWriter.write = full  # type: ignore[method-assign]
    checkpoints.save(run.model, tokenizer, run.optimizers, {"step": 3}, best=False)
    checkpoints.settle()
    said = ""
    try:
        checkpoints.finish()
    except GroundupError as error:
        said = str(error)
    assert said == ("rank 2: cannot write its part: no space left on the disk." if world.is_main else "")
    barrier(world)
    assert [path.name for path in checkpoints.all()] == ["step-000002"]
    assert not list(folder.glob(".*.part"))
    barrier(world)
    LiveWriter.write = write  # type: ignore[method-assign]
    checkpoints.save(run.model, tokenizer, run.optimizers, {"step": 4}, best=False)
    checkpoints.finish()
    barrier(world)
    assert [path.name for path in checkpoints.all()] == ["step-000004", "step-000002"]
    if world.is_main:
        print("equal: one rank failed", flush=True)


def all_ranks_hear(run: Run, world: World, folder: Path, tokenizer: Tokenizer) -> None:
    """An error that only rank 0 can see ends the call on every rank: none waits for another."""
    blocked = Checkpoints(folder / "expected.safetensors" / "below a file", world=world)
    blocked.save(run.model, tokenizer, run.optimizers, {"step": 5}, best=False)
    blocked.settle()
    said = []
    for call in (blocked.finish, Checkpoints(folder / "damaged", world=world).newest):
        if world.is_main:
            (folder / "damaged" / "step-000001").mkdir(parents=True, exist_ok=True)
        barrier(world)
        try:
            call()
        except GroundupError as error:
            said.append(str(error))
    assert len(said) == 2
    assert "cannot write" in said[0]
    assert "none of the 1 checkpoints can be read" in said[1]
    if world.is_main:
        print("equal: all ranks hear", flush=True)


def work(rank: int, folder: Path) -> None:
    """One process: in turn a member of a world of 4, of one of 2, and alone."""
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 9], CONFIG.vocab_size, show_progress=False)
    if rank == 0:
        alone = Run(World(), seed=5)
        (folder / "one").mkdir()
        save(alone, World(), folder / "one", tokenizer)
        check(World(), folder / "one", "1 -> 1")
    for size in (4, 2):
        if rank >= size:
            return
        world = World(rank, size, rank)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
        if size == 4:
            run = Run(world, seed=5)
            save(run, world, folder / "four", tokenizer)
            check(world, folder / "four", "4 -> 4")
        else:
            check(world, folder / "four", "4 -> 2")
            check(world, folder / "one", "1 -> 2")
        if size == 4:
            failing = folder / "failing"
            save(Run(world, seed=5), world, failing, tokenizer)
            one_rank_fails(run, world, failing, tokenizer)
            all_ranks_hear(run, world, failing, tokenizer)
        dist.destroy_process_group()
    if rank == 0:
        check(World(), folder / "four", "4 -> 1")


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (Path(sys.argv[1]),), nprocs=RANKS)

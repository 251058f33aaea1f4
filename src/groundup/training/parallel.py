"""How a model is spread over processes: applied from outside, in one fixed order, to a model that knows none of it.

The order is: checkpointing (a field of the model), compiling block by block, then sharding or replicating. Tensor,
pipeline, context and expert parallelism belong before the last step, in :func:`spread`.

``ddp`` gives every process the whole model and averages gradients (Li et al. 2020, "PyTorch Distributed"). ``fsdp``
cuts weights, gradients and optimizer state up among the processes and gathers each block when it is needed (FSDP2 of
PyTorch; Rajbhandari et al. 2020, ZeRO stage 3).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundup.model import Transformer
from groundup.optim.sharded import cut_like, local_part
from groundup.runtime.process_group import World
from groundup.training.objectives import Metrics, Objective
from groundup.training.recipe import RunKeys

Way = Literal["none", "ddp", "fsdp"]


class Stepper(nn.Module):
    """A model and what it is to learn, as one module: its forward pass is the loss of a micro-batch.

    So DDP, which hangs on a module's forward pass, sees all of it, whichever methods of the model the objective calls.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> tuple[Tensor, Metrics]:
        """Loss and metrics of one micro-batch."""
        return self.objective(self.model, batch)


def equip(model: Transformer, recipe: RunKeys) -> Transformer:
    """Give a model the attention backend and the checkpointing that the recipe names; what is ``auto`` stays."""
    if recipe.attention != "auto":
        model.backend = recipe.attention
    if recipe.checkpointing != "auto":
        model.checkpointing = recipe.checkpointing
    return model


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The blocks of the model, or of the one that it is built around."""
    around: Any = next((part for part in model.modules() if hasattr(part, "blocks")), None)
    return () if around is None else around.blocks


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of the model where it stands; blocks of one kind share what was compiled.

    Whole models compile into something a little faster, but take as many times longer as they have blocks.
    """
    for block in _blocks(model):
        block.compile()


def spread(stepper: Stepper, world: World, way: Way) -> nn.Module:
    """Put the stepper's model to work on all processes.

    Under FSDP weights are gathered in float32; autocast narrows them where they are used, as it does on one process.

    Args:
        way: ``none`` in a world of one.
    """
    if world.size == 1 or way == "none":
        return stepper
    device = next(stepper.parameters()).device
    if way == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a name that older versions do not know yet
            return nn.parallel.DistributedDataParallel(
                stepper, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world.size,))
    for block in _blocks(stepper.model):
        fully_shard(block, mesh=mesh)
    # The rest, embedding and head, stays gathered between the two passes: the loss reads the head after the model.
    fully_shard(stepper.model, mesh=mesh, reshard_after_forward=False)
    if hasattr(stepper.model, "stream"):
        # All ways through a Transformer pass here. Registered on its callers too, the inner one's end would shard the
        # head again before the outer one has read it.
        register_fsdp_forward_method(stepper.model, "stream")
    return stepper


@contextmanager
def accumulating(module: nn.Module, more: bool) -> Iterator[None]:
    """While the block runs, gradients stay on their rank if ``more`` micro-batches of the step follow."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with module.no_sync() if more else nullcontext():
            yield
        return
    sharded: Any = getattr(module, "model", module)
    if hasattr(sharded, "set_requires_gradient_sync"):
        sharded.set_requires_gradient_sync(not more)
    yield


def settle_way(request: str, world: World) -> Way:
    """``auto`` is ddp on several processes, and nothing on one."""
    if world.size == 1:
        return "none"
    return "fsdp" if request == "fsdp" else "ddp"


def full_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The whole of every parameter and buffer, on the CPU, gathered one by one; every rank must ask."""
    found = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = whole.detach().cpu()
    return found


@torch.no_grad()
def load_full(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a model whose parameters may be sharded: each rank takes its part."""
    own = dict(model.state_dict())
    for name, tensor in tensors.items():
        target = own[name]
        local_part(target).copy_(cut_like(tensor.to(local_part(target).device), target))

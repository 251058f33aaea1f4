"""Which parameter gets which optimizer and which decay. A further optimizer is one more branch in
:func:`build_optimizers`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn, optim

from groundup.optim.config import OptimConfig
from groundup.optim.muon import Muon


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Sort a model's trainable parameters by what they are.

    Returns:
        Matrices of linear layers that are not tied to an embedding, stacks of them (experts) included; embeddings and
        output heads; vectors (norms, biases).
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {
        id(m.weight)
        for name, m in model.named_modules()
        if name.rsplit(".", 1)[-1] == "head" and isinstance(m, nn.Linear)
    }
    matrices: list[Tensor] = []
    embeddings: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            embeddings.append(parameter)
        elif parameter.ndim >= 2 and not name.endswith(".bias"):
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    return matrices, embeddings, vectors


def build_optimizers(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> dict[str, optim.Optimizer]:
    """The optimizers of a run, by name. Every group's ``lr`` starts at the peak; the loop multiplies it by the
    schedule's factor.

    Matrices are decayed, embeddings, heads and vectors are not (the practice of Brown et al. 2020 for vectors;
    embeddings follow nanochat, whose weight decay acts on the Muon matrices alone).
    """
    matrices, embeddings, vectors = split_parameters(model)
    rest = [{"params": embeddings + vectors, "weight_decay": 0.0}]
    decayed = {"params": matrices, "weight_decay": config.weight_decay}

    def adamw(groups: list[dict[str, object]]) -> optim.AdamW:
        return optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )

    if config.optimizer == "adamw":
        return {"adamw": adamw([decayed, *rest])}
    return {
        "muon": Muon([decayed], lr=config.learning_rate, momentum=config.momentum, dtype=dtype),
        "adamw": adamw([*rest]),
    }

"""Which parameter gets which optimizer, which decay and which learning rate. A further optimizer is one more branch in
:func:`_optimizer`, and its name one more in config.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn, optim

from groundup.optim.config import OptimConfig, OptimizerName, Rule
from groundup.optim.muon import Muon
from groundup.runtime import UsageError

Kind = Literal["matrix", "table", "vector"]


@dataclass(frozen=True)
class Named:
    """A trainable parameter, its name and what it is.

    Args:
        kind: a matrix of a linear layer that is not tied to an embedding, or a stack of them (experts); a table:
            embeddings and output heads; or a vector: norms and biases.
    """

    name: str
    parameter: Tensor
    kind: Kind


def named_kinds(model: nn.Module) -> Iterator[Named]:
    """Every trainable parameter of a model, each once."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables |= {
        id(m.weight)
        for name, m in model.named_modules()
        if name.rsplit(".", 1)[-1] == "head" and isinstance(m, nn.Linear)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            yield Named(name, parameter, "table")
        elif parameter.ndim >= 2 and not name.endswith(".bias"):
            yield Named(name, parameter, "matrix")
        else:
            yield Named(name, parameter, "vector")


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices, tables and vectors of a model; see :class:`Named`."""
    found = list(named_kinds(model))
    matrices, tables, vectors = (
        [one.parameter for one in found if one.kind == kind] for kind in ("matrix", "table", "vector")
    )
    return matrices, tables, vectors


def freeze(model: nn.Module, config: OptimConfig) -> None:
    """Take ``requires_grad`` from the parameters that a rule freezes, before the model is spread over processes.

    As everywhere, the first rule that fits a name decides.
    """
    rules = [Rule.read(text) for text in config.rules]
    for name, parameter in model.named_parameters():
        rule = next((rule for rule in rules if rule.pattern.search(name)), None)
        if rule is not None and rule.frozen:
            parameter.requires_grad_(False)


def build_optimizers(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> dict[str, optim.Optimizer]:
    """The optimizers of a run, by name. Every group's ``lr`` starts at the peak; the loop multiplies it by the
    schedule's factor.

    Matrices are decayed, tables and vectors are not (the practice of Brown et al. 2020 for vectors; embeddings follow
    nanochat, whose weight decay acts on the Muon matrices alone). ``config.rules`` say what is otherwise; parameters
    that a rule freezes lose their ``requires_grad``.

    Args:
        dtype: what Muon orthogonalises in.

    Raises:
        UsageError: a rule fits no parameter, or hands Muon what is no matrix, or nothing is left to train.
    """
    rules = [Rule.read(text) for text in config.rules]
    freeze(model, config)
    names = [name for name, _ in model.named_parameters()]
    used = [rule.frozen and any(rule.pattern.search(name) for name in names) for rule in rules]
    # Groups in the order of their first parameter, so that the state of a run always lies in the same place.
    groups: dict[tuple[OptimizerName, float, float], list[Tensor]] = {}
    for one in [found for kind in ("matrix", "table", "vector") for found in named_kinds(model) if found.kind == kind]:
        number, rule = next(((n, r) for n, r in enumerate(rules) if r.pattern.search(one.name)), (None, None))
        if number is not None and rule is not None:
            used[number] = True
        by_default: OptimizerName = config.optimizer if one.kind == "matrix" else "adamw"
        name = (rule and rule.optimizer) or by_default
        if name == "muon" and one.kind != "matrix":
            raise UsageError(f"optim.rules: muon updates matrices, and {one.name} is a {one.kind}.")
        decay = config.weight_decay if one.kind == "matrix" else 0.0
        decay = decay if rule is None or rule.decay is None else rule.decay
        groups.setdefault((name, 1.0 if rule is None else rule.lr, decay), []).append(one.parameter)
    if False in used:
        raise UsageError(f"optim.rules: {config.rules[used.index(False)]!r} fits no parameter that is left to it.")
    if not groups:
        raise UsageError("optim.rules: every parameter is frozen: nothing is left to train.")
    found: dict[str, optim.Optimizer] = {}
    for name in dict.fromkeys(key[0] for key in groups):
        mine = [
            {"params": parameters, "lr": config.learning_rate * scale, "weight_decay": decay}
            for (of, scale, decay), parameters in groups.items()
            if of == name
        ]
        found[name] = _optimizer(name, mine, config, dtype)
    return found


def _optimizer(
    name: OptimizerName, groups: list[dict[str, object]], config: OptimConfig, dtype: torch.dtype
) -> optim.Optimizer:
    if name == "muon":
        return Muon(groups, lr=config.learning_rate, momentum=config.momentum, dtype=dtype)
    return optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

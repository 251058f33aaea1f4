"""Which layers learn, and how fast: rules for ``optim.rules``, which the optimizers read by parameter name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from groundup.runtime import UsageError

_TABLES = r"(^|\.)(embedding|positions)\."
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def layer_rules(
    model: nn.Module, *, frozen_layers: int = 0, frozen_embeddings: bool = False, decay: float = 1.0
) -> list[str]:
    """Rules that freeze the first layers, and let the others learn the more slowly the deeper they lie.

    The learning rate of what stands above the blocks (norm, head, scores of a classifier) stays, that of the last
    block is multiplied by ``decay``, that of each block below by ``decay`` once more, and that of the embeddings once
    more than that of the first block (Howard and Ruder 2018, section 3.2, where ``decay`` is 1 / 2.6; the form is that
    of ELECTRA, Clark et al. 2020, appendix B). A head that is tied to the embedding is the embedding, and learns, or
    not, like it.

    What has nothing to be trained, such as the embedding beside adapters, gets no rule: the optimizers refuse those
    that fit nothing. So call this after adapters were added.

    Args:
        model: a Transformer, or what holds one.
        frozen_layers: how many blocks, from the first, are not trained.
        frozen_embeddings: whether the embeddings of tokens and positions are not trained.
        decay: between a layer and the one below it; 1 for the same rate everywhere.

    Returns:
        Rules for ``OptimConfig.rules``. The first that fits a name decides, so a person's own ones come before them.

    Raises:
        UsageError: there are not as many blocks, or ``decay`` is not above 0 and at most 1.
    """
    if not 0.0 < decay <= 1.0:
        raise UsageError(f"layer decay = {decay} must be above 0 and at most 1, such as 0.8.")
    names = [name for name, _ in model.named_parameters()]
    n_layer = 1 + max((int(found[1]) for name in names if (found := _BLOCK.search(name))), default=-1)
    if not 0 <= frozen_layers <= n_layer:
        raise UsageError(f"frozen layers = {frozen_layers} must be from 0 to the model's n_layer, {n_layer}.")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def rules() -> Iterator[tuple[str, str]]:
        yield _TABLES, "frozen" if frozen_embeddings else f"lr={decay ** (n_layer + 1)!r}"
        for layer in range(n_layer):
            what = "frozen" if layer < frozen_layers else f"lr={decay ** (n_layer - layer)!r}"
            yield rf"(^|\.)blocks\.{layer}\.", what

    return [
        f"{pattern} {what}"
        for pattern, what in rules()
        if what != "lr=1.0" and any(re.search(pattern, name) for name in trained)
    ]

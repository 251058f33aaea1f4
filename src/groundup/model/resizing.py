"""Rows for further tokens: a model's embedding and head, grown."""

# V vocabulary   U rows in use   N new rows   E embedding

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from groundup.model.transformer import Transformer
from groundup.runtime import UsageError

_NEW_ROWS_TOGETHER = 256


def resize_embeddings(
    model: Transformer, size: int, used: int | None = None, *, noise: float = 1e-5, seed: int = 0
) -> Transformer:
    """Give a model rows for new tokens, in the embedding and in the head, which may be the same.

    New rows are drawn from a normal distribution around the mean of those in use, with their covariance times
    ``noise`` (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). Without noise, N new
    tokens together have at most the probability N / (U + N) at any position, since the exponential of a mean of logits
    is at most the mean of their exponentials; random rows may take nearly all of it. Logits of old tokens stay.

    Args:
        model: changed in place. Its other parameters, and the dtype, the device and the ``requires_grad`` of these,
            stay.
        size: tokens of the grown vocabulary. A model that has more rows (many are padded to a round number) keeps them.
        used: U, how many of the rows had a token before; the others were never trained, and are drawn anew. None for
            all.
        noise: the new rows' covariance, as a part of that of the old ones; 0 for their mean alone.
        seed: of the noise.

    Returns:
        The model itself; its config has the new ``vocab_size``.

    Raises:
        UsageError: ``used`` is none of the model's sizes, or the embedding or head has adapters or is quantized.
    """
    rows, tied = model.config.vocab_size, model.head.weight is model.embedding.weight
    used = rows if used is None else used
    if not 1 <= used <= rows:
        raise UsageError(f"used = {used} must be from 1 to the model's vocab_size, {rows}.")
    if type(model.head) is not nn.Linear or type(model.embedding) is not nn.Embedding:
        raise UsageError(
            "the embedding or the head has adapters or is quantized, and takes no new tokens. Resize the model before "
            "that is done, or merge and remove its adapters."
        )
    size = max(size, rows)
    if size == used:
        return model
    generator = torch.Generator().manual_seed(seed)
    model.embedding.weight = _grown(model.embedding.weight, size, used, noise, generator)
    model.head.weight = model.embedding.weight if tied else _grown(model.head.weight, size, used, noise, generator)
    model.embedding.num_embeddings = model.head.out_features = size
    model.config = replace(model.config, vocab_size=size)
    return model


@torch.no_grad()
def _grown(weight_VE: Tensor, size: int, used: int, noise: float, generator: torch.Generator) -> nn.Parameter:
    """The first ``used`` rows, and new ones."""
    wide = torch.promote_types(weight_VE.dtype, torch.float32)
    old_UE = weight_VE[:used]
    mean_E = old_UE.mean(dim=0, dtype=wide)
    grown = [old_UE]
    for begin in range(used, size, _NEW_ROWS_TOGETHER):  # so that the noise of all rows is not held at once
        new_NE = mean_E.expand(min(_NEW_ROWS_TOGETHER, size - begin), -1)
        if noise:
            # Normal numbers times centred rows have the rows' covariance: no matrix is decomposed.
            normal_NU = torch.randn(len(new_NE), used, generator=generator).to(mean_E)
            away_NE = normal_NU @ old_UE.to(wide) - normal_NU.sum(dim=1, keepdim=True) * mean_E
            new_NE = new_NE + (noise / used) ** 0.5 * away_NE
        grown.append(new_NE.to(weight_VE.dtype))
    return nn.Parameter(torch.cat(grown), requires_grad=weight_VE.requires_grad)

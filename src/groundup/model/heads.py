"""What stands on the residual stream: the loss of a language model, further tokens, labels and values."""

# B batch   T positions   M positions with a target   E embedding   V vocabulary   C classes

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from groundup.model.attention import Step
from groundup.model.config import ModelConfig
from groundup.model.memory import WIDE_TOGETHER, loss_chunk
from groundup.model.norms import make_norm

if TYPE_CHECKING:
    from groundup.model.transformer import Transformer

_ROWS_TOGETHER = 8192  # of the head, whose gradient is computed at once
IGNORED = -100  # a target that counts for nothing, as torch.nn.functional.cross_entropy has it


def language_model_loss(
    features_BTE: Tensor, weight_VE: Tensor, targets_BT: Tensor, *, chunk: int = 0, softcap: float | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0, reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:  # fmt: skip
    """Cross-entropy of the next token, in nats, without ever holding the logits of all positions.

    The head's product, the softmax and their gradients are computed for ``chunk`` positions at a time (as Liger Kernel
    does, Hsu et al. 2024), so that memory grows with chunk x V and not with B T V.

    Args:
        features_BTE: the normed residual stream.
        weight_VE: the head's weight.
        targets_BT: the id that follows each position, or ``IGNORED``.
        chunk: positions whose logits are held at once; 0 chooses (:func:`groundup.model.memory.loss_chunk`).
        softcap: bounds the logits (``config.logit_softcap``).
        label_smoothing: this much of the target's probability is spread over all ids (Szegedy et al. 2016).
        z_loss: weight of the squared logarithm of the softmax's denominator (Chowdhery et al. 2022, section 5).
        reduction: the mean or the sum over positions that have a target.

    Returns:
        A scalar, float32 or wider. With no target at all: 0. Its backward pass can be asked for only once.
    """
    known = targets_BT != IGNORED
    features_ME, targets_M = features_BTE[known], targets_BT[known]
    count = max(1, len(targets_M)) if reduction == "mean" else 1
    if torch.is_autocast_enabled(features_BTE.device.type):
        features_ME = features_ME.to(torch.get_autocast_dtype(features_BTE.device.type))
    total: Tensor = _ChunkedLoss.apply(
        features_ME, weight_VE, targets_M, chunk or loss_chunk(len(weight_VE)), softcap, label_smoothing, z_loss
    )
    return total / count


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss; gradients are computed on the way, since the logits are gone afterwards.

    The head's gradient is as large as the head: it is added up in place, block by block, and handed on without a copy,
    so that there is none for a second backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, features_ME: Tensor, weight_VE: Tensor, targets_M: Tensor, chunk: int, bound: float | None,
        smoothing: float, z_loss: float,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(features_ME.dtype, torch.float32)
        narrow_VE = weight_VE.to(features_ME.dtype)
        total = torch.zeros((), dtype=wide, device=features_ME.device)
        to_features = torch.empty_like(features_ME) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight_VE, dtype=wide) if ctx.needs_input_grad[1] else None
        learns = to_features is not None or to_weight is not None
        for begin in range(0, len(targets_M), chunk):
            x_CE, target_C1 = features_ME[begin : begin + chunk], targets_M[begin : begin + chunk, None]
            logits_CV = x_CE @ narrow_VE.T
            # Narrow logits are widened for a few rows at a time, and their gradient takes their place.
            rows = chunk if logits_CV.is_cuda else max(1, WIDE_TOGETHER // logits_CV.shape[1])
            for logits_RV, target_R1 in zip(logits_CV.split(rows), target_C1.split(rows), strict=True):
                loss, slope_RV = _loss_of_rows(logits_RV.to(wide), target_R1, bound, smoothing, z_loss, learns)
                total += loss
                if slope_RV is not None:
                    logits_RV.copy_(slope_RV)
            if to_features is not None:
                to_features[begin : begin + chunk] = logits_CV @ narrow_VE
            if to_weight is not None:
                split = zip(to_weight.split(_ROWS_TOGETHER), logits_CV.split(_ROWS_TOGETHER, dim=1), strict=True)
                for weight_RE, slope_CR in split:
                    weight_RE += slope_CR.T @ x_CE
            del logits_CV  # before the next ones are made: nothing else here is as large
        ctx.held = to_features, None if to_weight is None else to_weight.to(weight_VE.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if ctx.held is None:
            raise RuntimeError("language_model_loss: its gradients were handed on, and can be had only once.")
        held, ctx.held = ctx.held, None
        found = [None if one is None else one.mul_(grad_outputs[0].to(one.dtype)) for one in held]
        return *found, None, None, None, None, None


def _loss_of_rows(
    logits_RV: Tensor, target_R1: Tensor, bound: float | None, smoothing: float, z_loss: float, learns: bool
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of some positions, and its slope with respect to the logits."""
    if bound is not None:
        logits_RV = bound * torch.tanh(logits_RV / bound)
    slope_RV = logits_RV.softmax(dim=-1)
    # What the softmax divided by, from the largest probability, which is at least 1 / V. (PyTorch's own logsumexp and
    # log_softmax take three times as long as its softmax on a CPU.)
    normaliser_R1 = logits_RV.amax(dim=-1, keepdim=True) - slope_RV.amax(dim=-1, keepdim=True).log()
    loss_R1 = normaliser_R1 - (1 - smoothing) * logits_RV.gather(1, target_R1)
    if smoothing:
        loss_R1 -= smoothing * logits_RV.mean(dim=-1, keepdim=True)
    if z_loss:
        loss_R1 += z_loss * normaliser_R1.square()
    loss = loss_R1.sum()
    if not learns:
        return loss, None
    if z_loss:
        slope_RV *= 1 + 2 * z_loss * normaliser_R1
    slope_RV.scatter_add_(1, target_R1, torch.full_like(normaliser_R1, smoothing - 1))
    if smoothing:
        slope_RV -= smoothing / slope_RV.shape[1]
    if bound is not None:
        slope_RV *= 1 - (logits_RV / bound).square()
    return loss, slope_RV


class FurtherToken(nn.Module):
    """Predicts one token further than what it stands on (multi-token prediction; DeepSeek-V3, eq. 21 to 23).

    The stream of depth k - 1 at a position and the embedding of the token k further on, each normed, are joined to one
    stream, which a block of its own carries on. Embedding and head are the model's.
    """

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.stream_norm, self.token_norm = make_norm(config), make_norm(config)
        self.join = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.block = block
        self.norm = make_norm(config)

    def forward(self, x_BTE: Tensor, token_BTE: Tensor, step: Step) -> Tensor:
        """Streams of T positions and the embeddings of the tokens that are known further on; B T E."""
        joined_BTE = self.join(torch.cat([self.stream_norm(x_BTE), self.token_norm(token_BTE)], dim=-1))
        return self.block(joined_BTE, step)


def further_features(model: Transformer, ids_BT: Tensor, *, documents_BT: Tensor | None = None) -> list[Tensor]:
    """Normed features for the next token and for each of ``config.n_predict`` further ones.

    Returns:
        ``n_predict + 1`` tensors; number k predicts, at position t, token t + 1 + k, and so has T - k positions.
    """
    x_BTE, _ = model.stream(ids_BT, documents_BT=documents_BT)
    found = [model.norm(x_BTE)]
    for depth, module in enumerate(model.further, start=1):
        assert isinstance(module, FurtherToken)
        T = ids_BT.shape[1] - depth
        documents = None if documents_BT is None else documents_BT[:, :T]
        positions_BT, step = model._step(ids_BT[:, :T], None, documents, None)
        tokens_BTE = model.embed(ids_BT[:, depth : depth + T], positions_BT)
        x_BTE = module(x_BTE[:, :T], tokens_BTE, step)
        found.append(module.norm(x_BTE))
    return found


class Classifier(nn.Module):
    """Labels for whole texts, on a model whose head it does not use.

    Args:
        model: the language model.
        n_label: C, how many labels; 1 for a value, such as a reward.
        pooling: what of a text is looked at: its last token, or the mean of all.
    """

    def __init__(self, model: Transformer, n_label: int, *, pooling: Literal["last", "mean"] = "last") -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.score = nn.Linear(model.config.n_embd, n_label, bias=False)
        nn.init.normal_(self.score.weight, std=model.config.init_std)

    def forward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Scores of each text, B C.

        Args:
            ids_BT: token ids, padded on the right.
            lengths_B: how many of each text are its own.
        """
        features_BTE = self.model.features(ids_BT)
        if self.pooling == "last":
            rows = torch.arange(len(ids_BT), device=ids_BT.device)
            return self.score(features_BTE[rows, lengths_B - 1])
        own_BT1 = (torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None])[..., None]
        mean_BE = (features_BTE * own_BT1).sum(dim=1) / lengths_B[:, None]
        return self.score(mean_BE.to(features_BTE.dtype))


class ValueHead(nn.Module):
    """One number per position, such as the value of a state in PPO, from the features that the head reads too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.value = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.value.weight)  # no opinion at first (as in Ziegler et al. 2019)
        nn.init.zeros_(self.value.bias)

    def forward(self, features_BTE: Tensor) -> Tensor:
        """Features to values, B T."""
        return self.value(features_BTE)[..., 0]

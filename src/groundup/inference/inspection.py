"""Looking inside a model while it reads a text: what it expects, where it looks, and when it makes up its mind.

token probabilities   what each token cost in bits, and what was expected in its place
attention             the weights of every head, as the softmax gives them
logit lens            the model's own norm and head applied to the residual stream after each block, as if the model
                      ended there (nostalgebraist 2020, "interpreting GPT: the logit lens")
"""

# T tokens of the text   N of them that are looked into   K likeliest tokens   L layers looked at   H heads
# E embedding   V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from groundup.report.inspection import Inspection
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.view import pieces

if TYPE_CHECKING:
    from groundup.inference.language_model import LanguageModel
    from groundup.model import Transformer

POSITIONS = 128  # that attention and lens look into: their size grows with the square, and with the vocabulary
ROWS = 128  # positions whose logits are held at a time


def inspect_text(
    lm: LanguageModel, text: str, top: int = 5, layers: Iterable[int] | None = None, *, positions: int = POSITIONS,
    name: str = "",
) -> Inspection:  # fmt: skip
    """Read a text and keep what the model expected at each place, where it looked, and what each layer would have said.

    Args:
        lm: the model and its tokenizer.
        text: what is read, in one pass and after the start of a document; special tokens in it are plain text.
        top: how many of the likeliest tokens are kept at each place.
        layers: which layers' attention and lens; all when not given.
        positions: attention and lens look into so many of the first tokens.
        name: what the model is called.

    Raises:
        UsageError: the text is empty or longer than the model's context, a layer does not exist, or ``top`` or
            ``positions`` makes no sense.
        GroundupError: the model's logits are not numbers.
    """
    model, config = lm.model, lm.model.config
    chosen = _layers(layers, config.n_layer)
    if not 1 <= top <= config.vocab_size:
        raise UsageError(f"top = {top} must be from 1 to {config.vocab_size}, the tokens of the vocabulary.")
    if positions < 1:
        raise UsageError(f"positions = {positions} must be at least 1.")
    ids, start = _ids(lm, text)
    first = 0 if start else len(lm.tokenizer.token_bytes(ids[0]))  # which nothing stands before, and is not predicted
    N = min(len(ids), positions)
    found, lens = _expectations(model, ids, chosen, top, N)
    shown = pieces(lm.tokenizer, ids)
    return Inspection(
        model=name,
        ids_T=np.array(ids),
        tokens=tuple(_readable(piece.marked, piece.id) for piece in shown),
        notes=tuple(piece.note for piece in shown),
        start=start,
        n_bytes=len(text.encode("utf-8", "replace")) - first,
        logprob_T=np.concatenate([[np.nan], found.logprob[:-1]]),
        rank_T=np.concatenate([[0], found.rank[:-1]]),
        entropy_T=found.entropy,
        next_ids_TK=found.ids,
        next_probabilities_TK=found.probabilities,
        layers=chosen,
        attention_LHNN=_attention(model, ids[:N], chosen),
        lens_ids_LNK=np.stack([layer.ids for layer in lens]),
        lens_probabilities_LNK=np.stack([layer.probabilities for layer in lens]),
        lens_probability_LN=np.stack([np.exp(layer.logprob) for layer in lens]),
        lens_rank_LN=np.stack([layer.rank for layer in lens]),
        names=_names(lm.tokenizer, [found.ids, *(layer.ids for layer in lens)]),
        left_out=() if len(ids) <= N else (f"attention and lens look into the first {N} of {len(ids):,} tokens",),
    )


def _layers(asked: Iterable[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if asked is None else tuple(sorted(set(asked)))
    wrong = next((layer for layer in chosen if not 0 <= layer < count), None)
    if wrong is not None:
        raise UsageError(f"there is no layer {wrong}: this model has {count}, from 0 to {count - 1}.")
    if not chosen:
        raise UsageError(f"no layer is chosen: this model has {count}, from 0 to {count - 1}.")
    return chosen


def _ids(lm: LanguageModel, text: str) -> tuple[list[int], int]:
    """The tokens of a text after the start of a document, and how many stand before it."""
    if not text:
        raise UsageError("the text is empty: there is nothing to inspect.")
    ids, context = lm.prompt_ids(text), lm.model.config.context_length
    if len(ids) > context:
        raise UsageError(f"the text has {len(ids):,} tokens, the model reads {context:,} at once. Give a shorter one.")
    return ids, len(ids) - len(lm.tokenizer.encode(text))


# ---- what is expected


@dataclass(frozen=True)
class _Expected:
    """What logits say of the token after each position: of the one that follows (NaN and 0 where none does), and which
    would be likeliest.
    """

    logprob: np.ndarray
    rank: np.ndarray
    entropy: np.ndarray
    ids: np.ndarray
    probabilities: np.ndarray


@torch.inference_mode()
def _expectations(
    model: Transformer, ids: Sequence[int], layers: Sequence[int], top: int, count: int
) -> tuple[_Expected, list[_Expected]]:
    """Those of the model at every position, and those of each layer at the first ``count``."""
    ids_1T = torch.tensor([ids], device=model.device)
    following = [*ids[1:], -1]
    with _streams_after(model.blocks, layers, count) as streams:
        features_1TE = model.features(ids_1T)
    whole = _expected(model.logits, features_1TE, following, top)
    # The last layer's lens is the model itself.
    return whole, [_expected(lambda x: model.logits(model.norm(x)), x, following[:count], top) for x in streams]


@contextmanager
def _streams_after(blocks: nn.ModuleList, layers: Sequence[int], count: int) -> Iterator[list[Tensor]]:
    """The residual stream after each of these blocks, 1 N E, once the model has been called."""
    streams: list[Tensor] = []

    def keep(block: nn.Module, arguments: object, x_1TE: Tensor) -> None:
        streams.append(x_1TE[:, :count].clone())

    hooks = [blocks[layer].register_forward_hook(keep) for layer in layers]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()


def _expected(head: Callable[[Tensor], Tensor], x_1TE: Tensor, following: Sequence[int], top: int) -> _Expected:
    parts: list[tuple[Tensor, ...]] = []
    target_T = torch.tensor(following, device=x_1TE.device)
    for x_1RE, target_R in zip(x_1TE.split(ROWS, dim=1), target_T.split(ROWS), strict=True):
        logs_RV = head(x_1RE)[0].float().log_softmax(dim=-1)
        if logs_RV.isnan().any():
            raise GroundupError("the model's logits are not numbers: was its training unstable?")
        logs_R1 = logs_RV.gather(1, target_R.clamp_min(0)[:, None])
        rank_R, entropy_R = (logs_RV > logs_R1).sum(dim=-1) + 1, torch.special.entr(logs_RV.exp()).sum(dim=-1)
        likeliest = logs_RV.topk(top, dim=-1)
        known_R = target_R >= 0
        logs_R = logs_R1[:, 0].masked_fill(~known_R, float("nan"))
        parts.append((logs_R, rank_R * known_R, entropy_R / np.log(2), likeliest.indices, likeliest.values.exp()))
    return _Expected(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


# ---- where it looks


@torch.inference_mode()
def _attention(model: Transformer, ids: Sequence[int], layers: Sequence[int]) -> np.ndarray:
    """The weights of the chosen layers, L H N N.

    The beginning is read by itself: what a position sees does not depend on what follows it.
    """
    weights: list[Tensor] = []
    model.features(torch.tensor([ids], device=model.device), weights=weights)
    return torch.stack([weights[layer][0].float() for layer in layers]).cpu().numpy()


# ---- names


def _readable(marked: Iterable[tuple[str, bool]], number: int) -> str:
    return "".join(run for run, _ in marked) or f"⟨{number}⟩"


def _names(tokenizer: Tokenizer, ids: Iterable[np.ndarray]) -> dict[int, str]:
    """Tokens as one can read them; of ids that the tokenizer has no token for, the number."""
    wanted = [int(number) for number in np.unique(np.concatenate([array.ravel() for array in ids]))]
    known = [number for number in wanted if number < tokenizer.vocab_size]
    names = {piece.id: _readable(piece.marked, piece.id) for piece in pieces(tokenizer, known)}
    return {number: names.get(number, f"⟨{number}⟩") for number in wanted}

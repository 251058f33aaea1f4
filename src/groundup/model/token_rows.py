"""Rows of adapters: for a few tokens, those of an embedding and of a head give way to ones that an adapter has learnt.

So an adapter can bring tokens of its own, such as the marks of a chat template, at the cost of their rows alone: the
others stay frozen, and no optimizer holds anything of them. PEFT calls this trainable tokens.

                         ┌── tokens that an active adapter has rows for ──► those
    ids ──► embedding ───┤
                         └── all others ──────────────────────────────────► the embedding's own, frozen

A head that is tied to its embedding shares the rows as it does the weight.
"""

# V vocabulary   M tokens with rows   E embedding

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.runtime import UsageError

TABLES = ("embedding", "head")  # the modules of a Transformer that have a row for each token


class Rows(nn.Embedding):
    """The rows of one adapter.

    Args:
        places_M: the ids that they are for, ascending.
        weight_ME: what they are at first.
    """

    places_M: Tensor

    def __init__(self, places_M: Tensor, weight_ME: Tensor) -> None:
        super().__init__(weight_ME.shape[0], weight_ME.shape[1], _weight=weight_ME)
        self.register_buffer("places_M", places_M, persistent=False)


class TokenRows(nn.Module):
    """An embedding or a head with rows of adapters.

    Where several active adapters have a row for the same token, their mean counts: unlike what LoRA adds to a weight,
    rows stand for themselves, and have no sum. (PEFT lets one such adapter count at a time.)

    Attributes:
        base: the embedding or head itself, frozen; while merged, with the adapters' rows among its own.
        adapters: all adapters by name.
        active: the names of those that count.
        original: while merged, the tokens whose rows of ``base`` have changed, and these rows as they were.
    """

    def __init__(self, base: nn.Embedding | nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.original: tuple[Tensor, Tensor] | None = None
        self._together: tuple[Any, Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """All rows that count, V E: a copy, unless there are no others than the base's."""
        found = self.counting()
        if found is None:
            return self.base.weight
        places_M, rows_ME = found
        return self.base.weight.index_copy(0, places_M, rows_ME.to(self.base.weight.dtype))

    def rows(self, name: str) -> Rows:
        """Those of one adapter."""
        found = self.adapters[name]
        assert isinstance(found, Rows)
        return found

    def counting(self) -> tuple[Tensor, Tensor] | None:
        """The tokens, ascending, whose rows are not the base's, and these rows; None where there are none, or merged
        ones.
        """
        if self.original is not None or not self.active:
            return None
        all_rows = [self.rows(name) for name in self.active]
        if len(all_rows) == 1:
            return all_rows[0].places_M, all_rows[0].weight
        key = self.active, all_rows[0].weight.device, sum(len(one.places_M) for one in all_rows)
        if self._together is None or self._together[0] != key:  # once, since a GPU would have to be waited for
            with torch.inference_mode(False):  # training may come later
                self._together = key, *torch.cat([one.places_M for one in all_rows]).unique(return_inverse=True)
        _, places_M, slots = self._together
        given = torch.cat([one.weight for one in all_rows])
        shares = given.new_zeros(len(places_M)).index_add(0, slots, torch.ones_like(given[:, 0]))
        total_ME = given.new_zeros(len(places_M), given.shape[1]).index_add(0, slots, given)
        return places_M, total_ME / shares[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Of an embedding ids to vectors, of a head vectors to logits, in the dtype of the base's result."""
        y, found = self.base(x), self.counting()
        if found is None:
            return y
        places_M, rows_ME = found
        if isinstance(self.base, nn.Linear):
            return y.index_copy(-1, places_M, F.linear(x, rows_ME.to(x.dtype)).to(y.dtype))
        slots = torch.searchsorted(places_M, x.contiguous()).clamp_max(len(places_M) - 1)
        return torch.where((places_M[slots] == x)[..., None], F.embedding(slots, rows_ME).to(y.dtype), y)

    @torch.no_grad()
    def merge(self) -> None:
        """Put what counts among the base's rows, which are kept for :meth:`unmerge`."""
        found = self.counting()
        if found is None:
            return
        places_M, rows_ME = found
        self.original = places_M, self.base.weight[places_M].clone()
        self.base.weight.index_copy_(0, places_M, rows_ME.to(self.base.weight.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`, exactly."""
        if self.original is not None:
            self.base.weight.index_copy_(0, *self.original)
            self.original = None


# ---- whole models


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """The embedding and the head of a model, or of the one within it, that have rows of adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TokenRows)}


def add_token_rows(
    model: Any, name: str, places: Sequence[int] | Tensor, tables: Sequence[str] = TABLES, *, trainable: bool = True
) -> None:
    """Give an adapter rows for these tokens, equal to the model's own at first and active. Those it has stay.

    Args:
        model: a Transformer, grown to the tokens (:func:`groundup.model.resize_embeddings`).
        name: of the adapter.
        places: ids.
        tables: of a model whose head is not tied to its embedding, which of them get rows.
        trainable: whether the rows are to be trained.

    Raises:
        UsageError: a table is quantized or has a LoRA adapter.
    """
    tied = _base(model.embedding).weight is _base(model.head).weight
    wanted_M = torch.as_tensor(places, dtype=torch.long).unique()
    for table in TABLES if tied else tables:
        module = getattr(model, table)
        base = _base(module)
        if not isinstance(base, (nn.Embedding, nn.Linear)):
            raise UsageError(
                f"{table}: it is quantized or has an adapter of its own, and gets no rows for new tokens. Leave it out "
                "of the adapter's targets."
            )
        if not isinstance(module, TokenRows):
            module = TokenRows(base).train(module.training)
            setattr(model, table, module)
        base.requires_grad_(False)
        if tied and table == "head":
            module.adapters[name] = model.embedding.adapters[name]
        else:
            module.adapters[name] = _extended(module, name, wanted_M.to(base.weight.device), trainable)
        module.active = tuple(dict.fromkeys([*module.active, name]))
        module._together = None


@torch.no_grad()
def _extended(module: TokenRows, name: str, places_M: Tensor, trainable: bool) -> Rows:
    """The rows that an adapter has, if any, and for the other places copies of the base's."""
    # bf16 cannot hold the small steps of training; the frozen rows may stay in it.
    wide = torch.promote_types(module.base.weight.dtype, torch.float32)
    if name in module.adapters:
        before = module.rows(name)
        places_M = torch.cat([places_M, before.places_M]).unique()
        weight_ME = module.base.weight[places_M].to(wide)
        weight_ME[torch.searchsorted(places_M, before.places_M)] = before.weight.to(wide)
    else:
        weight_ME = module.base.weight[places_M].to(wide, copy=True)
    rows = Rows(places_M, weight_ME).train(module.training)
    rows.requires_grad_(trainable)
    return rows


def _base(module: Any) -> Any:
    return module.base if isinstance(module, TokenRows) else module

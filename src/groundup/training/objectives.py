"""Objectives: model and batch in, loss and metrics out. The loop knows nothing else of what is being learnt.

A further objective is one more class with these two methods; the loop has no branch for any of them.
"""

# B batch   T positions   V vocabulary   C classes

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.data import TokenBatch
from groundup.model.experts import Routing
from groundup.model.heads import IGNORED, further_features, language_model_loss

Metrics = dict[str, Tensor]


class Objective(Protocol):
    """What a model is to learn from one micro-batch."""

    def count(self, batch: Any) -> Tensor | int:
        """How many things (tokens, texts, pairs) the loss of this micro-batch is the mean of.

        A step's gradient is that of the mean over all its micro-batches and ranks: each weighs by its count.
        """
        ...

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """Return a scalar loss, averaged over the micro-batch, and further scalars to log (detached)."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token: -1/M sum log p(target | what comes before it), in nats per token.

    With ``n_predict`` further tokens (multi-token prediction; DeepSeek-V3, eq. 24 and 25) their mean loss is added,
    times ``further_weight``. The losses of a mixture's routers are added too; the cross-entropy alone is then among the
    metrics. Logits are never held for all positions.

    Args:
        label_smoothing: of the target's probability, how much is spread over all tokens (Szegedy et al. 2016).
        z_loss: weight of the squared logarithm of the softmax's denominator (Chowdhery et al. 2022, section 5).
        chunk: positions whose logits are held at once; 0 chooses.
        further_weight: lambda of DeepSeek-V3, eq. 25.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 0
    further_weight: float = 0.3

    def count(self, batch: TokenBatch) -> Tensor:
        """Positions that have a target."""
        found: Tensor = (batch.targets != IGNORED).sum()
        return found

    def __call__(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The loss of a micro-batch.

        Args:
            model: a :class:`groundup.model.Transformer`, or what has its methods.
            batch: of tensors on the model's device.
        """
        config: Any = model.config
        if config.n_predict:
            features = further_features(model, batch.inputs, documents_BT=batch.documents)  # type: ignore[arg-type]
        else:
            features = [model.features(batch.inputs, documents_BT=batch.documents)]  # type: ignore[operator]
        loss, metrics = self._cross_entropy(model, features[0], batch.targets), {}
        total = loss
        if len(features) > 1:
            T = batch.inputs.shape[1]
            further = [
                self._cross_entropy(model, features[depth], self._further(batch, depth, T))
                for depth in range(1, len(features))
            ]
            extra = torch.stack(further).mean()
            total = total + self.further_weight * extra
            metrics["further_tokens"] = extra.detach()
        routings: list[Routing] = getattr(model, "routings", list)()
        if routings:
            total = total + torch.stack([routing.loss for routing in routings]).sum()
        if total is not loss:
            metrics["cross_entropy"] = loss.detach()
        return total, metrics

    def _cross_entropy(self, model: nn.Module, features_BTE: Tensor, targets_BT: Tensor) -> Tensor:
        config: Any = model.config
        head: Any = model.head
        return language_model_loss(
            features_BTE, head.weight, targets_BT, chunk=self.chunk, softcap=config.logit_softcap,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss,
        )  # fmt: skip

    @staticmethod
    def _further(batch: TokenBatch, depth: int, T: int) -> Tensor:
        """Targets ``depth`` tokens further on; none where a document ends in between."""
        targets: Tensor = batch.targets[:, depth:]
        if batch.documents is None:
            return targets
        same = batch.documents[:, depth:] == batch.documents[:, : T - depth]
        return torch.where(same, targets, IGNORED)


class LabelledTexts(NamedTuple):
    """Texts of which each has a label.

    Args:
        ids: token ids B x T, padded on the right.
        lengths: B: how many of each row are its own.
        labels: B: the right class of each.
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of a text's label: -1/B sum log softmax(scores)[label], in nats per text.

    Args:
        label_smoothing: of the label's probability, how much is spread over all classes (Szegedy et al. 2016).
    """

    label_smoothing: float = 0.0

    def count(self, batch: LabelledTexts) -> int:
        """Texts."""
        return len(batch.labels)

    def __call__(self, model: nn.Module, batch: LabelledTexts) -> tuple[Tensor, Metrics]:
        """The loss of a micro-batch, and the share of labels that were right.

        Args:
            model: ids and lengths to scores B C, such as :class:`groundup.model.Classifier`.
        """
        scores_BC = model(batch.ids, batch.lengths).float()
        loss = F.cross_entropy(scores_BC, batch.labels, label_smoothing=self.label_smoothing)
        right = (scores_BC.argmax(dim=-1) == batch.labels).float().mean()
        return loss, {"accuracy": right.detach()}

"""The recipe's ``optim`` section."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from groundup.runtime import UsageError

OptimizerName = Literal["muon", "adamw"]


@dataclass(frozen=True)
class Rule:
    """What is otherwise for parameters whose name fits a pattern.

    Args:
        pattern: looked for anywhere in the name, such as ``blocks.3.attention.query.weight``.
        lr: multiplies the learning rate.
        decay: the weight decay; None leaves it.
        optimizer: which one; None leaves it.
        frozen: whether they are not trained at all.
    """

    pattern: re.Pattern[str]
    lr: float = 1.0
    decay: float | None = None
    optimizer: OptimizerName | None = None
    frozen: bool = False

    @classmethod
    def read(cls, text: str) -> Rule:
        """Read ``PATTERN [lr=X] [decay=X] [optimizer=NAME] [frozen]``.

        Raises:
            UsageError: it is not of this form.
        """
        form = "Write a regular expression, then lr=NUMBER, decay=NUMBER, optimizer=muon|adamw or frozen."
        pattern, *words = text.split() or [""]
        found: dict[str, Any] = {}
        try:
            for word in words:
                name, equals, value = word.partition("=")
                if name in ("lr", "decay") and equals and 0.0 <= float(value) < math.inf:
                    found[name] = float(value)
                elif name == "optimizer" and value in get_args(OptimizerName):
                    found[name] = value
                elif word == "frozen":
                    found["frozen"] = True
                else:
                    raise UsageError(f"optim.rules: {text!r}: what is {word!r}? {form}")
            if not found:
                raise UsageError(f"optim.rules: {text!r} changes nothing. {form}")
            return cls(re.compile(pattern), **found)
        except (re.error, ValueError) as error:
            raise UsageError(f"optim.rules: {text!r}: {error}. {form}") from error


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are updated.

    Args:
        optimizer: muon for the matrices of the blocks (AdamW for the rest), or adamw for everything; a pretraining run
            that is not told takes adamw where a step has so few tokens that Muon would double its time
        learning_rate: peak learning rate of both; Muon's updates are scaled to AdamW's size, so one number serves (Liu
            et al. 2025)
        beta1: AdamW's decay of the mean gradient
        beta2: AdamW's decay of the mean squared gradient
        eps: AdamW's guard against division by zero
        momentum: Muon's decay of the mean gradient
        weight_decay: decoupled decay of the matrices (Loshchilov & Hutter 2019); embeddings and norms are not decayed
        rules: exceptions by parameter name, the first that fits decides: a regular expression, then what differs, such
            as "embedding lr=0.5 decay=0.1" (lr multiplies the learning rate, decay is the weight decay) or "experts
            optimizer=adamw" or "blocks.0. frozen"
        grad_clip: global gradient norm above which gradients are scaled down; 0 for never
        adaptive_clip: largest ratio of a gradient's norm to its weights', row by row (Brock et al. 2021, eq. 3), such
            as 0.01; 0 for no such bound
        embedding_gradient_scale: multiplies the gradients of embeddings; 0.1 steadied GLM-130B (Zeng et al. 2022)
        gradient_noise: eta of Gaussian noise of variance eta / (1 + step)^0.55 added to gradients (Neelakantan et al.
            2015, eq. 1); 0 for none
        average: decay of an exponential moving average of the weights, such as 0.999; what is evaluated, saved and
            used is then the average. 0 for none
        schedule: wsd holds the peak and falls at the end, cosine and linear fall all the way, inverse_sqrt falls with
            the root of the step, constant does not
        warmup_steps: steps over which the learning rate rises from zero
        decay_fraction: of wsd: the last part of the run over which the learning rate falls linearly
        final_learning_rate: fraction of the peak reached at the end
    """

    optimizer: OptimizerName = "muon"
    learning_rate: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    rules: list[str] = field(default_factory=list)
    grad_clip: float = 1.0
    adaptive_clip: float = 0.0
    embedding_gradient_scale: float = 1.0
    gradient_noise: float = 0.0
    average: float = 0.0
    schedule: Literal["wsd", "cosine", "linear", "inverse_sqrt", "constant"] = "wsd"
    warmup_steps: int = 50
    decay_fraction: float = 0.6
    final_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UsageError(f"optim.{name} = {getattr(self, name)} must be above 0.")
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise UsageError(f"optim.decay_fraction = {self.decay_fraction} must lie between 0 and 1.")
        if not 0.0 <= self.final_learning_rate <= 1.0:
            raise UsageError(
                f"optim.final_learning_rate = {self.final_learning_rate} must lie between 0 and 1: it is a fraction."
            )
        for name in ("warmup_steps", "weight_decay", "grad_clip", "adaptive_clip", "gradient_noise"):
            if not getattr(self, name) >= 0:  # so written, NaN is refused too
                raise UsageError(f"optim.{name} = {getattr(self, name)} must not be negative.")
        if not 0.0 < self.embedding_gradient_scale < math.inf:
            raise UsageError(f"optim.embedding_gradient_scale = {self.embedding_gradient_scale} must be above 0.")
        for rule in self.rules:
            Rule.read(rule)
        for name in ("beta1", "beta2", "momentum", "average"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UsageError(f"optim.{name} = {getattr(self, name)} must be at least 0 and below 1.")

    @property
    def falling(self) -> float:
        """The last part of a run over which the learning rate falls."""
        return {"wsd": self.decay_fraction, "constant": 0.0, "inverse_sqrt": 0.0}.get(self.schedule, 1.0)

"""NEFTune: how much noise, for which texts, when, and that it comes again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundup.data import TokenBatch
from groundup.model import ModelConfig, Transformer
from groundup.optim import OptimConfig, build_optimizers
from groundup.posttraining.noise import NoisyEmbeddings, text_lengths
from groundup.runtime import UsageError
from groundup.runtime.interrupt import StopRequest
from groundup.training.loop import Loop
from groundup.training.loop_parts import LoopHooks, LoopSettings, Position
from groundup.training.objectives import Metrics, NextToken


def tiny(**fields: Any) -> Transformer:
    torch.manual_seed(2)
    sizes = dict(vocab_size=61, context_length=47, n_layer=2, n_head=3, n_embd=24, n_ff=40, init_std=0.3)
    return Transformer(ModelConfig.from_dict(sizes | fields))


def batch(documents: Any = None, rows: int = 2, seed: int = 5) -> TokenBatch:
    ids = torch.randint(61, (rows, 14), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(ids[:, :-1], ids[:, 1:], None if documents is None else torch.tensor(documents))


class Table(nn.Module):
    """Wide embeddings, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 1536)


class Embedded:
    """An objective that looks at the embeddings."""

    def count(self, batch: TokenBatch) -> int:
        return 1

    def __call__(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        embedding: Any = model.embedding
        return embedding(batch.inputs), {}


def noise(model: nn.Module, given: TokenBatch, alpha: float = 5.0) -> Tensor:
    """What is added, B T E."""
    shaken, _ = NoisyEmbeddings(Embedded(), alpha)(model, given)
    return shaken - Embedded()(model, given)[0]


PACKED = [[0] * 7 + [1] * 1 + [2] * 5, [0] * 3 + [4] * 10]


def test_lengths_are_those_of_each_text() -> None:
    expected = [[7.0] * 7 + [1.0] + [5.0] * 5, [3.0] * 3 + [10.0] * 10]
    assert text_lengths(batch(PACKED)).tolist() == expected
    assert text_lengths(batch()).tolist() == [[13.0] * 13] * 2


@pytest.mark.parametrize("documents", [None, PACKED])
def test_noise_is_uniform_and_of_the_papers_size(documents: Any) -> None:
    model = Table()
    given = batch(documents)
    torch.manual_seed(11)
    found = noise(model, given, alpha=7.0).detach()
    most = 7.0 / (text_lengths(given)[..., None] * 1536).sqrt()
    assert (found.abs() <= most + 1e-5).all()
    uniform = (found / most).flatten()
    assert len(uniform) == 2 * 13 * 1536
    quantiles = torch.quantile(uniform, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([-0.8, -0.5, 0.0, 0.5, 0.8]), rtol=0, atol=0.03)
    if documents is None:
        assert found[0].norm().item() == pytest.approx(7.0 / math.sqrt(3), rel=0.02)


def test_a_packed_text_is_shaken_as_much_as_alone() -> None:
    model = Table()
    packed = noise(model, batch(PACKED)).detach()[0, :7]
    alone = noise(model, TokenBatch(batch().inputs[:1, :7], None)).detach()
    assert packed.norm().item() == pytest.approx(alone.norm().item(), rel=0.05)


def test_only_in_training_and_only_during_the_call() -> None:
    model, given = tiny(), batch()
    plain, _ = NextToken()(model, given)
    noisy = NoisyEmbeddings(NextToken(), 5.0)
    shaken, metrics = noisy(model, given)
    assert shaken.item() != plain.item()
    assert metrics == {}
    assert NextToken()(model, given)[0].item() == plain.item(), "no hook stays behind"
    assert noisy(model.eval(), given)[0].item() == plain.item()
    assert noisy.count(given) == NextToken().count(given)


def test_no_hook_stays_behind_a_failure() -> None:
    class Fails(Embedded):
        def __call__(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Metrics]:
            raise MemoryError

    model = tiny()
    with pytest.raises(MemoryError):
        NoisyEmbeddings(Fails())(model, batch())
    assert not model.embedding._forward_hooks


def test_further_tokens_are_shaken_too() -> None:
    model, given = tiny(n_predict=2), batch()
    loss, metrics = NoisyEmbeddings(NextToken())(model, given)
    loss.backward()
    assert loss.isfinite()
    assert set(metrics) == {"further_tokens", "cross_entropy"}


def test_gradients_are_those_of_the_shaken_embeddings() -> None:
    model, given = tiny(tie_embeddings=False), batch()
    weights = torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(1))
    shaken, _ = NoisyEmbeddings(Embedded())(model, given)
    (shaken * weights).sum().backward()
    expected = torch.zeros(61, 24).index_add_(0, given.inputs.flatten(), weights.flatten(0, 1))
    assert model.embedding.weight.grad is not None
    torch.testing.assert_close(model.embedding.weight.grad, expected)


def train(
    model: Transformer, steps: int, position: Position | None = None, optimizers: Any = None, alpha: float = 30.0
) -> Any:
    optim = OptimConfig("adamw", learning_rate=0.01, schedule="constant", warmup_steps=0)
    optimizers = optimizers or build_optimizers(model, optim)
    settings = LoopSettings(
        batch_tokens=52, accumulate=2, max_steps=steps, seconds=None, log_every=1000, save_every=1000,
        precision="float32", micro_batch=2, seed=9,
    )  # fmt: skip
    position = position or Position()
    objective = NoisyEmbeddings(NextToken(), alpha)
    batches = lambda index: batch(PACKED, seed=index)  # noqa: E731
    Loop(model, objective, batches, optimizers, optim, settings, LoopHooks(), position=position).run(StopRequest())
    return position, optimizers


def test_a_resumed_run_draws_the_same_noise() -> None:
    whole, halves = tiny(), tiny()
    train(whole, 4)
    position, optimizers = train(halves, 2)
    torch.manual_seed(12345)
    torch.rand(77)
    train(halves, 4, position, optimizers)
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(one, other)
    quiet = tiny()
    train(quiet, 4, alpha=1e-9)
    assert not torch.equal(quiet.embedding.weight, whole.embedding.weight)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_noise_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match=f"embedding noise = {alpha} must be above 0"):
        NoisyEmbeddings(NextToken(), alpha)

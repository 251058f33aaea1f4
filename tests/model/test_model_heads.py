"""Losses without all logits, further tokens, labels and values; and computing again what was not kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from groundup.model import Classifier, ModelConfig, Transformer, ValueHead, language_model_loss
from groundup.model.heads import IGNORED, further_features


def small(**fields: Any) -> Transformer:
    torch.manual_seed(7)
    sizes = dict(vocab_size=61, context_length=19, n_layer=3, n_head=3, n_embd=42, n_ff=53, init_std=0.2)
    return Transformer(ModelConfig.from_dict(sizes | fields))


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.3}, {"label_smoothing": 0.1, "z_loss": 0.2}]
)
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_chunked_loss_is_the_loss(
    chunk: int, options: dict[str, float], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groundup.model.heads._ROWS_TOGETHER", 10)
    torch.manual_seed(3)
    features, weight = torch.randn(2, 9, 13).double(), torch.randn(37, 13).double()
    targets = torch.randint(37, (2, 9))
    targets[0, :4] = IGNORED
    found, expected = [], []
    for place in (found, expected):
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        if place is found:
            loss = language_model_loss(x, w, targets, chunk=chunk, softcap=softcap, **options)
        else:
            logits = x @ w.T if softcap is None else softcap * torch.tanh(x @ w.T / softcap)
            loss = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), label_smoothing=options.get("label_smoothing", 0.0)
            )
            known = targets != IGNORED
            loss = loss + options.get("z_loss", 0.0) * logits[known].logsumexp(-1).square().mean()
        (3 * loss).backward()
        place += [loss.detach(), x.grad, w.grad]
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_sum_and_no_target_at_all() -> None:
    features, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(7, 5)
    targets = torch.randint(7, (2, 3))
    mean, total = (language_model_loss(features, weight, targets, reduction=how) for how in ("mean", "sum"))
    assert total.item() == pytest.approx(6 * mean.item(), rel=1e-5)
    loss = language_model_loss(features, weight, torch.full((2, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert not features.grad.any()


def test_the_chunked_loss_under_autocast_is_near() -> None:
    model = small()
    ids = torch.randint(61, (2, 19))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = language_model_loss(model.features(ids[:, :-1]), model.head.weight, ids[:, 1:], chunk=7)
    plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=0.02)
    loss.backward()
    assert model.embedding.weight.grad is not None


def test_the_heads_gradient_is_not_rounded_under_autocast_and_is_there_once() -> None:
    features, weight = torch.randn(1, 40, 8), torch.randn(37, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = language_model_loss(features, weight, torch.randint(37, (1, 40)), chunk=7)
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_it_never_holds_the_logits_of_all_positions() -> None:
    features, weight = torch.randn(1, 500, 8, requires_grad=True), torch.randn(1009, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        language_model_loss(features, weight, torch.randint(1009, (1, 500)), chunk=16).backward()
    assert largest == 16 * 1009


def test_further_tokens_see_what_is_known_and_no_more() -> None:
    model = small(n_predict=2).double().eval()
    ids = torch.randint(61, (2, 11))
    streams = further_features(model, ids)
    assert [s.shape for s in streams] == [(2, 11, 42), (2, 10, 42), (2, 9, 42)]
    torch.testing.assert_close(streams[0], model.features(ids))
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 61
    for depth, (a, b) in enumerate(zip(streams, further_features(model, other), strict=True)):
        changed = (a - b).abs().amax(dim=(0, 2)) > 0
        # Number k at position t has read tokens 0 .. t + k.
        assert changed.tolist() == [t + depth >= 7 for t in range(11 - depth)]
    assert small(n_predict=2).parameter_count() > small().parameter_count()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_label_does_not_depend_on_padding(pooling: Any) -> None:
    model = Classifier(small(), 5, pooling=pooling).double().eval()
    texts = [torch.randint(61, (length,)) for length in (3, 11, 7)]
    padded = torch.stack([F.pad(text, (0, 13 - len(text)), value=9) for text in texts])
    scores = model(padded, torch.tensor([3, 11, 7]))
    assert scores.shape == (3, 5)
    for text, score in zip(texts, scores, strict=True):
        torch.testing.assert_close(model(text[None], torch.tensor([len(text)]))[0], score, rtol=0, atol=1e-12)


def test_values_start_without_an_opinion() -> None:
    model = small()
    values = ValueHead(model.config)(model.features(torch.randint(61, (2, 11))))
    assert values.shape == (2, 11)
    assert not values.any()


@pytest.mark.parametrize("how", ["block", "selective"])
def test_checkpointing_changes_no_gradient(how: Any) -> None:
    ids = torch.randint(61, (2, 19))
    found = []
    for choice in ("none", how):
        model = small(experts={"count": 3, "active": 2, "pattern": "DE"}, dropout=0.1).double()
        model.checkpointing = choice
        torch.manual_seed(1)
        loss = model(ids).logsumexp(-1).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def kept_numbers(how: Any) -> int:
    model = small(n_layer=6)
    model.checkpointing = how
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(61, (4, 19)))
    return kept


def test_checkpointing_keeps_less() -> None:
    assert kept_numbers("block") < kept_numbers("none") / 3


@pytest.mark.parametrize("scheme", ["depth_scaled", "normal", "mup"])
def test_initial_weights(scheme: str) -> None:
    config = ModelConfig(
        vocab_size=997, n_layer=8, n_head=4, n_embd=256, n_ff=512, initialisation=scheme, tie_embeddings=False
    )  # type: ignore[arg-type]
    torch.manual_seed(2)
    model = Transformer(config)
    inner, down = model.blocks[0].attention.q.weight, model.blocks[0].feed_forward.down.weight
    expected = {
        "depth_scaled": (0.02, 0.02 / 4, 0.02),
        "normal": (0.02, 0.02, 0.02),
        "mup": (1 / 16, 1 / math.sqrt(512), 0.0),
    }[scheme]
    for weight, std in zip((inner, down, model.head.weight), expected, strict=True):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)

"""Quantized layers: codes are the nearest, products are those of the weights that the codes stand for."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model import KVCache, ModelConfig, Transformer
from groundup.model.experts import MixtureOfExperts, _Stack
from groundup.model.quantized import (
    QuantizedLinear,
    QuantizedStack,
    Scheme,
    dequantize,
    nbytes,
    nf4_values,
    quantize,
    quantize_model,
)
from groundup.runtime import UsageError

# As published with QLoRA (bitsandbytes and the paper's appendix E).
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
SCHEMES: dict[str, Scheme] = {
    "int8": Scheme("int8"),
    "int4, 32": Scheme("int4", 32),
    "int4, 128": Scheme("int4", 128),
    "int4, zero point": Scheme("int4", 64, zero_point=True),
    "nf4": Scheme("nf4", 64),
    "nf4, 32": Scheme("nf4", 32),
    "nf4, double": Scheme("nf4", 64, double=True),
}
all_schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def weights(outputs: int = 13, inputs: int = 167, *, seed: int = 3) -> Tensor:
    """Rows of very different size, one of zeros, some off centre; 167 is a multiple of no group."""
    torch.manual_seed(seed)
    made = (
        torch.randn(outputs, inputs) * torch.logspace(-3, 2, outputs)[:, None] + torch.linspace(-1, 1, outputs)[:, None]
    )
    made[4] = 0
    return made


def by_bytes(tensors: dict[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
    """The layout as quantized.py tells it, read one weight after another."""
    rows = len(tensors["codes"])
    found = torch.zeros(rows, inputs)
    for row in range(rows):
        for i in range(inputs):
            if scheme.kind == "int8":
                found[row, i] = tensors["scale"][row, 0] * tensors["codes"][row, i].item()
                continue
            byte = int(tensors["codes"][row, i // 2].item())
            code = byte >> 4 if i % 2 else byte & 15
            scale = tensors["scale"][row, i // scheme.group]
            if scheme.kind == "nf4":
                found[row, i] = scale * torch.tensor(PUBLISHED[code])
            else:
                zero = int(tensors["zero"][row, i // scheme.group].item()) if scheme.zero_point else 8
                found[row, i] = scale * (code - zero)
    return found


def half_steps(weight: Tensor, scheme: Scheme) -> Tensor:
    """The farthest that a weight may be from its code, by the weights alone."""
    if scheme.kind == "int8":
        return weight.abs().amax(1, keepdim=True).expand_as(weight) / 127 / 2
    bounds = torch.zeros_like(weight)
    for begin in range(0, weight.shape[1], scheme.group):
        part = weight[:, begin : begin + scheme.group]
        most = part.abs().amax(1, keepdim=True)
        if scheme.kind == "nf4":
            gaps = torch.tensor(PUBLISHED).diff() / 2
            value = torch.where(most == 0, torch.zeros_like(part), part / most.clamp_min(1e-30))
            place = (torch.tensor(PUBLISHED)[1:-1] <= value[..., None]).sum(-1)
            step = most * gaps[place]
        elif scheme.zero_point:
            step = (part.amax(1, keepdim=True).clamp_min(0) - part.amin(1, keepdim=True).clamp_max(0)) / 15 / 2
        else:
            step = most / 7 / 2
        bounds[:, begin : begin + scheme.group] = step
    return bounds


def test_nf4_is_what_was_published() -> None:
    torch.testing.assert_close(nf4_values(), torch.tensor(PUBLISHED), rtol=0, atol=2e-7)


@all_schemes
def test_every_weight_is_within_half_a_step(scheme: Scheme) -> None:
    weight = weights()
    error = (dequantize(quantize(weight, scheme), scheme, 167) - weight).abs()
    bound = half_steps(weight, scheme)
    if scheme.double:  # the scales are rounded too, by half a step of theirs at most
        scale = quantize(weight, Scheme("nf4", 64))["scale"]
        bound = bound + (scale - scale.mean()).abs().max() / 127 / 2
    assert (error <= bound * (1 + 1e-5) + 1e-9).all()
    assert (error > bound * 0.9).any()  # and the bound says something


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES.values() if not scheme.double], ids=str)
def test_the_layout_is_as_told(scheme: Scheme) -> None:
    weight = weights()
    found = quantize(weight, scheme)
    columns = {"int8": 167}.get(scheme.kind, math.ceil(167 / scheme.group) * scheme.group // 2)
    assert found["codes"].shape == (13, columns)
    assert found["scale"].dtype == torch.float32
    torch.testing.assert_close(dequantize(found, scheme, 167), by_bytes(found, scheme, 167), rtol=1e-6, atol=0)
    if scheme.kind != "int8":  # past the last input
        whole = dequantize(found, scheme, columns * 2)
        assert torch.equal(whole[:, 167:], torch.zeros(13, columns * 2 - 167))


@all_schemes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_compiled_pass_gives_the_bits_of_pytorch(scheme: Scheme, dtype: torch.dtype) -> None:
    for shape in ((13, 167), (3, 5, 64), (701, 512), (1, 1)):  # the third one is shared out among threads
        torch.manual_seed(5)
        found = quantize(torch.randn(shape), scheme)
        with patch("groundup.model.quantized.is_compiling", return_value=True):
            expected = dequantize(found, scheme, shape[-1], dtype)
        assert torch.equal(dequantize(found, scheme, shape[-1], dtype), expected)


def test_double_quantized_scales() -> None:
    weight = weights(97, 300)  # 485 groups: two blocks of scales, the second one short
    once, twice = quantize(weight, Scheme("nf4", 64)), quantize(weight, Scheme("nf4", 64, double=True))
    mean = once["scale"].mean()
    flat = (once["scale"] - mean).flatten()
    assert twice["scale_codes"].dtype == torch.int8
    assert twice["scale_step"].shape == (2,)
    for n, block in enumerate(flat.split(256)):
        step = block.abs().max() / 127
        codes = twice["scale_codes"].flatten()[n * 256 : n * 256 + len(block)]
        assert (codes * step - block).abs().max() <= step / 2 * (1 + 1e-4)
    small = sum(twice[name].nbytes for name in ("scale_codes", "scale_step", "scale_mean"))
    assert small < 0.3 * once["scale"].nbytes


@all_schemes
def test_what_codes_can_say_is_said_exactly(scheme: Scheme) -> None:
    torch.manual_seed(5)
    steps = {"int8": 127, "int4": 7}.get(scheme.kind, 1)
    if scheme.kind == "nf4":
        weight = nf4_values()[torch.randint(16, (11, 96))]
    else:
        weight = torch.randint(-steps, steps + 1, (11, 96)).float()
    weight[:, ::32] = steps  # every group has its largest
    if scheme.zero_point:
        weight = torch.randint(0, 16, (11, 96)).float() - 6
        weight[:, ::32], weight[:, 1::32] = 9, -6
    found = dequantize(quantize(weight * 0.25, scheme), scheme, 96)
    torch.testing.assert_close(found, weight * 0.25, rtol=1e-6, atol=1e-6 if scheme.double else 0)
    assert torch.equal(dequantize(quantize(found, scheme), scheme, 96), found) or scheme.double


@all_schemes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_weights(scheme: Scheme, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(7)
    linear = nn.Linear(167, 13, bias=bias)
    layer = QuantizedLinear.from_linear(linear, scheme)
    x, y_grad = torch.randn(3, 5, 167, dtype=dtype), torch.randn(3, 5, 13, dtype=dtype)
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layer(mine)
    expected = F.linear(plain, layer.dequantize(dtype), None if layer.bias is None else layer.bias.to(dtype))
    found.backward(y_grad)
    expected.backward(y_grad)
    assert found.dtype == dtype
    tight = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, **tight)
    torch.testing.assert_close(mine.grad, plain.grad, **tight)
    assert not list(layer.parameters())


def test_nothing_as_large_as_the_weights_is_kept_for_the_backward_pass() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(160, 150), Scheme("nf4"))
    kept: list[int] = []
    x = torch.randn(3, 160, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert sum(kept) < 1000
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


def test_autocast() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(70, 9), Scheme("int8"))
    x = torch.randn(4, 70, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@all_schemes
def test_casting_rounds_no_scale_and_the_state_goes_there_and_back(scheme: Scheme) -> None:
    layer = QuantizedLinear(weights(), torch.randn(13), scheme)
    before = layer.dequantize(torch.float32)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    other = QuantizedLinear(torch.zeros(13, 167), torch.zeros(13), scheme)
    other.load_state_dict(state)
    assert torch.equal(other.weight, before)
    assert torch.equal(other.bias, state["bias"])


# ---- whole models


def make(**fields: Any) -> Transformer:
    torch.manual_seed(11)
    base = dict(vocab_size=43, context_length=23, n_layer=2, n_head=4, n_kv_head=2, n_embd=72, n_ff=101)
    return Transformer(ModelConfig.from_dict(base | fields)).eval()


def dequantized(model: Transformer, quantized: Transformer) -> Transformer:
    """A plain model of the weights that the quantized one stands for."""
    for name, module in quantized.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedStack)):
            model.get_submodule(name).weight.data.copy_(module.weight)
    return model


@all_schemes
@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
def test_a_model_computes_with_what_its_codes_stand_for(scheme: Scheme, kind: str) -> None:
    fields: dict[str, Any] = {
        "dense": {"tie_embeddings": False},
        "experts": {"experts": {"count": 5, "active": 2, "width": 19, "shared": 1}, "feed_forward": "gelu"},
        "latent": {
            "latent": {"kv_rank": 22, "rope_dim": 6, "nope_dim": 10, "v_dim": 13},
            "n_kv_head": 4,
            "qk_norm": False,
        },
    }[kind]
    model, ids = make(**fields), torch.randint(43, (2, 17))
    scheme_fields = dict(group=scheme.group, zero_point=scheme.zero_point, double=scheme.double)
    assert quantize_model(model, scheme.kind, **scheme_fields) is model
    plain = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, _Stack))]
    assert plain == ["head"]
    with torch.inference_mode():
        expected = dequantized(make(**fields), model)(ids)
        torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(expected, make(**fields)(ids))
        cache = KVCache(model.config, 2, 17)  # latent attention then reads weights instead of calling layers
        steps = torch.cat([model(ids[:, t : t + 1], cache) for t in range(17)], dim=1)
        torch.testing.assert_close(steps, expected, rtol=1e-3, atol=1e-4)


def test_expert_stacks_and_their_gradients() -> None:
    model = make(experts={"count": 5, "active": 2, "width": 19}, ff_bias=True)
    quantize_model(model, "int4", group=32)
    moe, plain = (
        model.blocks[1].feed_forward,
        dequantized(make(experts=model.config.experts.__dict__, ff_bias=True), model),
    )
    assert isinstance(moe, MixtureOfExperts)
    assert isinstance(moe.up, QuantizedStack)
    assert moe.up.weight.shape == (5, 19, 72)
    mine = torch.randn(2, 17, 72, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    moe(mine).square().sum().backward()
    plain.blocks[1].feed_forward(theirs).square().sum().backward()
    assert mine.grad is not None
    assert mine.grad.abs().max() > 0
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_experts_have_scales_of_their_own() -> None:
    stack = torch.stack([weights(seed=1), 1000 * weights(seed=2)])
    for scheme in (Scheme("int8"), Scheme("nf4", 32), Scheme("int4", zero_point=True)):
        both = dequantize(quantize(stack, scheme), scheme, 167)
        alone = [dequantize(quantize(one, scheme), scheme, 167) for one in stack]
        assert torch.equal(both, torch.stack(alone))


@pytest.mark.parametrize(
    ("scheme", "most"),
    [("nf4", 0.6), ("int4", 0.6), ("int8", 1.05)],
)
def test_memory(scheme: Any, most: float) -> None:
    model = make(n_embd=128, n_ff=256, head_dim=32)
    plain, rest = nbytes(model), nbytes(model.embedding) + nbytes(model.norm)
    quantize_model(model, scheme)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    count = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 14
    assert sum(layer.nbytes for layer in layers) <= most * count
    assert plain - nbytes(model) == count * 4 - sum(layer.nbytes for layer in layers)
    assert rest < nbytes(model) < plain
    double = quantize_model(make(n_embd=128, n_ff=256, head_dim=32), "nf4", double=True)
    assert nbytes(double) < nbytes(quantize_model(make(n_embd=128, n_ff=256, head_dim=32), "nf4"))


def test_a_quantized_state_loads_into_another_model() -> None:
    first, second, ids = make(), make(), torch.randint(43, (2, 9))
    quantize_model(first, "int4", zero_point=True)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    quantize_model(second, "int4", zero_point=True)
    second.load_state_dict(first.state_dict())
    with torch.inference_mode():
        assert torch.equal(first(ids), second(ids))


def test_what_cannot_be_quantized_is_told() -> None:
    with pytest.raises(UsageError, match=r"'nf5' is not one of int8, int4, nf4\. Did you mean nf4"):
        quantize_model(make(), "nf5")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="group 48 is not one of 32, 64, 128"):
        quantize_model(make(), "int4", group=48)
    with pytest.raises(UsageError, match="option of int4"):
        Scheme("int8", zero_point=True)
    with pytest.raises(UsageError, match="option of nf4"):
        Scheme("int4", double=True)
    with pytest.raises(UsageError, match="head: tied"):
        quantize_model(make(), "int8", skip=())
    with pytest.raises(UsageError, match="no linear layer left"):
        quantize_model(quantize_model(make(), "int8"), "int8")
    broken = make()
    broken.blocks[0].attention.q.weight.data[1, 2] = math.nan
    with pytest.raises(UsageError, match="not a number"):
        quantize_model(broken, "int8")
    untied = quantize_model(make(tie_embeddings=False), "int8", skip=("attention.*",))
    kinds = {name: isinstance(module, QuantizedLinear) for name, module in untied.named_modules()}
    assert kinds["head"]
    assert kinds["blocks.1.feed_forward.up"]
    assert not kinds["blocks.1.attention.q"]

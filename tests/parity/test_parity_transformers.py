"""What we export is, in transformers, the same function; what transformers writes is the same function here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from groundup.model import ModelConfig, Transformer, load_model, save_model
from groundup.model.weights import family_of

# Sizes are pairwise different and mostly prime, so that swapped axes fail.
SIZES = dict(vocab_size=101, context_length=23, n_layer=3, n_ff=61)
VARIANTS: dict[str, dict[str, Any]] = {
    f"{kind}, {heads}, {'tied' if tied else 'untied'}": dict(
        qk_norm=kind == "qwen3", n_head=6, n_kv_head=n_kv_head, n_embd=84, tie_embeddings=tied
    )
    for kind in ("llama", "qwen3")
    for heads, n_kv_head in (("multi-head", 6), ("grouped-query", 2), ("multi-query", 1))
    for tied in (True, False)
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def random_model(fields: dict[str, Any]) -> Transformer:
    """Weights far from their initial size and norms far from 1, so that every part matters."""
    torch.manual_seed(5)
    model = Transformer(ModelConfig(**SIZES | {"rope_theta": 500.0, "norm_eps": 1e-4, "init_std": 0.15} | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def theirs(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64 throughout: transformers' norms compute in float32 whatever they are given."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: F.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
    return model


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_saved_model_is_the_same_function_in_transformers(fields: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(fields)
    save_model(model, tmp_path)
    other = theirs(tmp_path)
    expected_class = "Qwen3ForCausalLM" if fields["qk_norm"] else "LlamaForCausalLM"
    assert type(other).__name__ == expected_class
    assert sum(p.numel() for p in other.parameters()) == model.parameter_count()
    ids = torch.randint(101, (2, 23))

    logits, other_logits = model(ids), other(ids).logits
    assert logits.std() > 0.5  # that the logits are not all alike
    torch.testing.assert_close(logits, other_logits, rtol=0, atol=1e-5)

    logits, other_logits = model.double()(ids), in_float64(other)(ids).logits
    torch.testing.assert_close(logits, other_logits, rtol=0, atol=1e-12)
    loss = loss_of(logits, ids)
    assert loss.item() == pytest.approx(other(ids, labels=ids).loss.item(), rel=1e-6)  # which they compute in float32
    loss.backward()
    loss_of(other_logits, ids).backward()
    their_gradients = {name: p.grad for name, p in other.named_parameters()}
    family = family_of(model.config)
    assert family is not None
    theirs_of = {link.ours[0].name: link.theirs for link in family.links(model.config)}
    for name, parameter in model.named_parameters():
        gradient = their_gradients.pop(theirs_of[name])
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert not their_gradients


def folder_by_transformers(kind: str, folder: Path, **fields: Any) -> nn.Module:
    sizes = dict(
        vocab_size=101,
        hidden_size=84,
        intermediate_size=61,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=23,
        initializer_range=0.15,
    )
    torch.manual_seed(13)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | fields))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes | {"head_dim": 14} | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_folder_made_by_transformers_is_the_same_function_here(kind: str, tied: bool, tmp_path: Path) -> None:
    other = folder_by_transformers(
        kind,
        tmp_path,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    )
    model = load_model(tmp_path)
    assert (model.config.rope_theta, model.config.norm_eps, model.config.tie_embeddings) == (700.0, 1e-4, tied)
    ids = torch.randint(101, (2, 23))
    torch.testing.assert_close(model(ids), other(ids).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.double()(ids), in_float64(other)(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_defaults_that_transformers_leaves_out_are_its_defaults_here(kind: str, tmp_path: Path) -> None:
    other = folder_by_transformers(kind, tmp_path)
    model = load_model(tmp_path)
    ids = torch.randint(101, (2, 23))
    torch.testing.assert_close(model(ids), other(ids).logits, rtol=0, atol=1e-5)


def test_rope_theta_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    other = folder_by_transformers("llama", tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 700.0})
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_theta": 700.0, "rope_scaling": None}))
    ids = torch.randint(101, (2, 23))
    torch.testing.assert_close(load_model(tmp_path)(ids), other(ids).logits, rtol=0, atol=1e-5)


def test_transformers_writes_our_folder_back_and_it_is_the_same_model(tmp_path: Path) -> None:
    model = random_model(VARIANTS["qwen3, grouped-query, tied"] | {"dropout": 0.125})
    (tmp_path / "ours").mkdir()
    save_model(model, tmp_path / "ours", bos_id=7, eos_id=7)
    theirs(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_positions_far_out_turn_by_the_same_angle(tmp_path: Path) -> None:
    """An inverse frequency one bit off would be 1e-7 x 4000 radians off at position 4000."""
    fields = VARIANTS["llama, grouped-query, tied"] | {"context_length": 4001, "n_layer": 1, "rope_theta": 10_000.0}
    model = random_model(fields)
    assert model.rotary is not None
    save_model(model, tmp_path)
    rotary = theirs(tmp_path).model.rotary_emb
    positions = torch.arange(4001)[None]
    cos, sin = rotary(torch.zeros(1, 1, 1), positions)
    our_cos, our_sin = model.rotary(positions, 4001)
    assert torch.equal(our_cos[:, :, 0], cos)
    assert torch.equal(our_sin[:, :, 0], sin)


def test_greedy_decoding_is_that_of_transformers(tmp_path: Path) -> None:
    from groundup.inference import Engine, SamplingParams
    from groundup.inference.requests import Request

    model = random_model(VARIANTS["qwen3, grouped-query, untied"])
    save_model(model, tmp_path)
    prompt = [3, 1, 4, 1, 5]
    request = Request(prompt, SamplingParams(max_tokens=18, temperature=0.0))
    for _ in Engine(model).run([request]):
        pass
    ids = theirs(tmp_path).generate(torch.tensor([prompt]), max_new_tokens=18, do_sample=False, eos_token_id=None)
    assert request.tokens == ids[0, len(prompt) :].tolist()

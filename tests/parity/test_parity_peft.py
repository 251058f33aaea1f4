"""An adapter that PEFT saved is the same function here, and one that we saved is the same function there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import groundup
from groundup.inference.adapters import find_parts
from groundup.model import Transformer, load_model, resize_embeddings, save_model
from groundup.model.adapter_folder import load_adapter, save_adapter
from groundup.model.adapter_model import absorb, save_adapter_model
from groundup.model.adapters import LoraConfig, adapted_layers, add_adapter, merge, remove, trainable_parameters
from groundup.model.token_rows import add_token_rows, token_rows
from groundup.posttraining.vocabulary import with_template
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

# Sizes are pairwise different, so that swapped axes fail.
SIZES: dict[str, Any] = dict(
    vocab_size=101, hidden_size=84, intermediate_size=61, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=29, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    pad_token_id=None,
)  # fmt: skip
DEEPSEEK = SIZES | dict(
    num_key_value_heads=6, kv_lora_rank=22, q_lora_rank=18, qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=13,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=17, n_shared_experts=2, first_k_dense_replace=1,
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.3}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", SIZES | {"attention_bias": True}, DENSE),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 22, "tie_word_embeddings": True}, ["q_proj", "v_proj", "down_proj"]),
    "gemma2": ("Gemma2", SIZES | {"head_dim": 22, "sliding_window": 5}, DENSE),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 5}, ATTENTION),
    "deepseek-v2": ("DeepseekV2", DEEPSEEK | {"topk_method": "greedy"}, LATENT),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK | {"n_group": 4, "topk_group": 2}, LATENT[1:]),
    "gpt2": (
        "GPT2", dict(vocab_size=101, n_positions=29, n_embd=84, n_layer=2, n_head=6, initializer_range=0.1),
        ["c_attn", "c_proj", "c_fc"],
    ),
    "gpt-neox": (
        "GPTNeoX", SIZES | {"rope_parameters": ROPE}, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "phi3": ("Phi3", SIZES, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
}  # fmt: skip
KINDS: dict[str, dict[str, bool]] = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
}  # fmt: skip
PLAIN = dict(attn_implementation="eager", experts_implementation="eager")  # the others want sizes of whole 16 bytes
all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
    transformers.logging.set_verbosity(verbosity)


def by_transformers(kind: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(43)
    config = getattr(transformers, f"{kind}Config")(**values)
    model_class = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    model = model_class._from_config(config, **PLAIN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif "experts" in name or "gate.weight" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def stir(parameters: Iterator[tuple[str, Tensor]]) -> None:
    """Adapters as after training: no B is 0, no magnitude that of its row."""
    with torch.no_grad():
        for name, parameter in parameters:
            if "lora_B" in name or name.endswith(".B"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif name.rpartition(".")[2] == "magnitude" or "magnitude_vector" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))


def by_peft(base: Any, targets: list[str], **fields: Any) -> Any:
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(base, config)
    stir(model.named_parameters())
    return model.eval()


def assert_same(found: Tensor, expected: Tensor, bare: Tensor) -> None:
    assert (expected - bare).abs().max() > 0.03 * bare.abs().max()  # the adapter matters
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@torch.inference_mode()
@all_kinds
@all_cases
def test_what_peft_saved(case: tuple[str, dict[str, Any], list[str]], kind: dict[str, bool], tmp_path: Path) -> None:
    name, values, targets = case
    base, ids = by_transformers(name, values), torch.randint(101, (2, 29))
    base.save_pretrained(tmp_path / "base")
    bare = base(ids).logits
    other = by_peft(base, targets, fan_in_fan_out=name == "GPT2", **kind)
    other.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(tmp_path / "base").eval(), tmp_path / "adapter")
    assert isinstance(model, Transformer)
    assert_same(model(ids), other(ids).logits, bare)
    merged = other.merge_and_unload()
    assert_same(remove(merge(model))(ids), merged(ids).logits, bare)


@torch.inference_mode()
@all_kinds
@all_cases
def test_what_we_saved(case: tuple[str, dict[str, Any], list[str]], kind: dict[str, bool], tmp_path: Path) -> None:
    name, values, _ = case
    by_transformers(name, values).save_pretrained(tmp_path / "theirs")
    model, ids = load_model(tmp_path / "theirs").eval(), torch.randint(101, (2, 29))
    (tmp_path / "base").mkdir()
    save_model(model, tmp_path / "base", bos_id=1, eos_id=2)
    bare = model(ids)
    ours = {"use_rslora": "rslora", "use_dora": "dora"}
    # PEFT takes any gate_proj, up_proj and down_proj of a model with experts for theirs.
    targets = ("attention.*",) if "experts" in str(values) else ("blocks.*",)
    add_adapter(model, LoraConfig(5, 7.0, targets=targets, **{ours[key]: value for key, value in kind.items()}))
    stir(model.named_parameters())
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLAIN)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(other(ids).logits, model(ids), bare)
    theirs = sum("lora_B" in key for key, _ in other.named_parameters())
    fused = {"GPT2": 1.5, "GPTNeoX": 1.5}.get(name, 1)  # six layers are four; Phi-3 is saved as a Llama
    assert theirs * fused == len(adapted_layers(model))  # none is there that we did not mean


@torch.inference_mode()
def test_a_few_layers_of_many(tmp_path: Path) -> None:
    """Where last names would mean further layers, the config has whole names; ranks and scales may differ."""
    by_transformers("Llama", SIZES).save_pretrained(tmp_path / "base")
    model, ids = load_model(tmp_path / "base").eval(), torch.randint(101, (2, 29))
    bare = model(ids)
    add_adapter(model, LoraConfig(rank=3, targets=("blocks.1.*.q", "blocks.0.*.down", "head")))
    stir(model.named_parameters())
    save_adapter(model, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLAIN)
    other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(other(ids).logits, model(ids), bare)
    assert sum("lora_B" in key for key, _ in other.named_parameters()) == 3


@torch.inference_mode()
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_by_pattern(rslora: bool, tmp_path: Path) -> None:
    base, ids = by_transformers("Llama", SIZES), torch.randint(101, (2, 29))
    base.save_pretrained(tmp_path / "base")
    bare = base(ids).logits
    patterns = dict(rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 9}, alpha_pattern={"v_proj": 31})
    other = by_peft(base, DENSE, use_rslora=rslora, **patterns)
    other.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(tmp_path / "base").eval(), tmp_path / "adapter")
    assert_same(model(ids), other(ids).logits, bare)
    save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(by_transformers("Llama", SIZES), tmp_path / "again").eval()
    assert_same(again(ids).logits, other(ids).logits, bare)


@torch.inference_mode()
def test_a_family_can_be_asked_for(tmp_path: Path) -> None:
    """What we save of a Phi-3 is a Llama; its adapter may be for the folder that it came from all the same."""
    base, ids = by_transformers("Phi3", SIZES), torch.randint(101, (2, 29))
    base.save_pretrained(tmp_path / "base")
    model, bare = load_model(tmp_path / "base").eval(), base(ids).logits
    add_adapter(model, LoraConfig(rank=3))
    stir(model.named_parameters())
    save_adapter(model, tmp_path / "adapter", family="phi3")
    other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(other(ids).logits, model(ids), bare)
    with pytest.raises(UsageError, match=r"family 'gpt2': this model is of llama, .*phi3"):
        save_adapter(model, tmp_path / "adapter", family="gpt2")


# ---- whole models


def greedy(model: Any, ids: Tensor, count: int) -> list[int]:
    """The plain loop: the likeliest token, again and again."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, -count:].tolist()


@torch.inference_mode()
@all_kinds
def test_what_peft_saved_says_the_same(kind: dict[str, bool], tmp_path: Path) -> None:
    """A folder of PEFT's alone is a model: its base is where PEFT found it."""
    tokenizer = Tokenizer.train(["the cat sat on the mat, and the dog. " * 9], 290, show_progress=False)
    values = SIZES | {
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.end_of_text_id,
        "initializer_range": 0.2,
    }
    by_transformers("Llama", values).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLAIN)
    lm = groundup.load(tmp_path / "base", device="cpu")
    prompt, settings = lm.prompt_ids("the cat"), dict(max_tokens=17, temperature=0.0, ignore_end=True)
    bare = greedy(base, torch.tensor([prompt]), 17)
    assert lm.generate("the cat", **settings) == tokenizer.decode(bare)
    other = by_peft(base, DENSE, **kind)
    other.save_pretrained(tmp_path / "adapter")
    expected = greedy(other, torch.tensor([prompt]), 17)
    assert expected != bare
    folder = tmp_path / "adapter"
    for found in (
        groundup.load(folder, device="cpu"),
        groundup.load(folder, device="cpu", merge=False),
        groundup.load(tmp_path / "base", adapters=[folder], device="cpu"),
    ):
        assert found.generate("the cat", **settings) == tokenizer.decode(expected)


@torch.inference_mode()
@all_kinds
def test_peft_opens_what_we_saved_as_a_model(kind: dict[str, bool], tmp_path: Path) -> None:
    """By the folder alone, which names its base."""
    by_transformers("Llama", SIZES).save_pretrained(tmp_path / "base")
    model, ids = load_model(tmp_path / "base").eval(), torch.randint(101, (2, 29))
    bare = model(ids)
    ours = {"use_rslora": "rslora", "use_dora": "dora"}
    add_adapter(model, LoraConfig(5, 7.0, **{ours[key]: value for key, value in kind.items()}))
    stir(model.named_parameters())
    save_adapter_model(model, tmp_path / "adapter", str(tmp_path / "base"))
    other = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert_same(other(ids).logits, model(ids), bare)


@torch.inference_mode()
def test_the_sum_of_two_is_pefts(tmp_path: Path) -> None:
    by_transformers("Llama", SIZES).save_pretrained(tmp_path / "base")
    ids = torch.randint(101, (2, 29))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLAIN).eval()
    bare = base(ids).logits
    for name, targets in (("one", ["q_proj", "up_proj"]), ("two", ["q_proj", "v_proj"])):
        other = by_peft(base, targets)
        other.save_pretrained(tmp_path / name)
        base = other.unload()
    both = peft.PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one")
    both.load_adapter(tmp_path / "two", adapter_name="two")
    both.base_model.set_adapter(["one", "two"])
    found = find_parts(tmp_path / "base", [tmp_path / "one", tmp_path / "two"]).load().eval()
    assert_same(found(ids), both.eval()(ids).logits, bare)


# ---- tokens of an adapter's own


def own_tokens(base: Any, tied: bool, **fields: Any) -> Any:
    """What TRL makes of a chat template whose tokens the model lacks: two rows, of the embedding alone."""
    base.resize_token_embeddings(103)
    return by_peft(base, ["q_proj", "v_proj"], trainable_token_indices={"embed_tokens": [101, 102]}, **fields)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", ["rows", "whole embedding"])
@torch.inference_mode()
def test_tokens_that_peft_saved(tied: bool, saved: str, tmp_path: Path) -> None:
    """PEFT adds the whole embedding and head to the file where it sees that the base has other sizes."""
    values, ids = SIZES | {"tie_word_embeddings": tied}, torch.randint(99, 103, (2, 29))
    by_transformers("Llama", values).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLAIN)
    other = own_tokens(base, tied)
    for name, parameter in other.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.copy_(torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "adapter", save_embedding_layers=saved != "rows")
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("token_adapter.base_layer.weight") for name in kept) == (saved != "rows")
    expected, found = other.eval()(ids).logits, find_parts(tmp_path / "adapter").load().eval()
    known = slice(None) if tied or saved != "rows" else slice(101)  # of an untied head it has learnt no rows
    torch.testing.assert_close(found(ids)[..., known], expected[..., known], rtol=0, atol=1e-4)
    assert found.config.vocab_size == 103
    assert_same(absorb(found)(ids)[..., known], expected[..., known], torch.zeros(()))


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_whole_weights_that_peft_saved(tied: bool, tmp_path: Path) -> None:
    values, ids = SIZES | {"tie_word_embeddings": tied}, torch.randint(101, (2, 29))
    by_transformers("Llama", values).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLAIN)
    bare = base(ids).logits
    more = {"modules_to_save": ["embed_tokens", "norm"], "ensure_weight_tying": tied}
    other = by_peft(base, DENSE, **more if tied else {"modules_to_save": ["embed_tokens", "lm_head"]})
    for name, parameter in other.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(tmp_path / "adapter")
    found = load_adapter(load_model(tmp_path / "base").eval(), tmp_path / "adapter")
    assert_same(found(ids), other.eval()(ids).logits, bare)  # type: ignore[operator]


def test_a_head_that_peft_untied_is_refused(tmp_path: Path) -> None:
    by_transformers("Llama", SIZES | {"tie_word_embeddings": True}).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLAIN)
    other = by_peft(base, DENSE, modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        other.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(GroundupError, match="are different, and this model's head and embedding are one"):
        load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@torch.inference_mode()
def test_tokens_that_we_saved(family: str, tied: bool, tmp_path: Path) -> None:
    """With its tokenizer beside it PEFT gives the base as many tokens by itself; else one line of the user's does."""
    kind, values, _ = CASES[family]
    tokenizer = Tokenizer.train(["the cat sat on the mat, and the dog. " * 9], 290, show_progress=False)
    old = tokenizer.vocab_size
    values = values | {"vocab_size": old, "tie_word_embeddings": tied, "attention_bias": True}
    by_transformers(kind, values).save_pretrained(tmp_path / "base")
    tokenizer, new = with_template(tokenizer, "chatml")
    model = resize_embeddings(load_model(tmp_path / "base").eval(), tokenizer.vocab_size)
    ids = torch.cat([torch.arange(old + len(new) - 27, old + len(new)), torch.tensor([old, 3])])[None]
    bare = model(ids)
    add_adapter(model, LoraConfig(5, 7.0))
    add_token_rows(model, "default", range(old, tokenizer.vocab_size))
    assert trainable_parameters(model).keys() >= {
        f"{name}.adapters.default.weight" for name in ("embedding", "head")[: 2 - tied]
    }
    stir(model.named_parameters())
    for table in token_rows(model).values():
        nn.init.normal_(table.rows("default").weight)
    save_adapter_model(model, tmp_path / "adapter", str(tmp_path / "base"))
    for whose in ("user", "PEFT"):
        if whose == "user":
            base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **PLAIN)
            base.resize_token_embeddings(tokenizer.vocab_size)
            other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        else:
            tokenizer.save(tmp_path / "adapter")
            other = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert_same(other(ids).logits, model(ids), bare)
    assert_same(other.merge_and_unload()(ids).logits, remove(merge(model))(ids), bare)


@all_kinds
def test_gradients(kind: dict[str, bool], tmp_path: Path) -> None:
    base, ids = by_transformers("Llama", SIZES), torch.randint(101, (2, 29))
    base.save_pretrained(tmp_path / "base")
    other: nn.Module = by_peft(base, DENSE, **kind)
    other.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(tmp_path / "base").eval(), tmp_path / "adapter", trainable=True)
    other(ids).logits.square().sum().backward()
    model(ids).square().sum().backward()
    found = dict(other.named_parameters())
    mine = trainable_parameters(model)
    assert len(mine) == 14 * (3 if "use_dora" in kind else 2)
    start = "base_model.model.model.layers.1.self_attn.q_proj"
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
    names |= {"magnitude": "lora_magnitude_vector.default.weight"} if "use_dora" in kind else {}
    for ours, theirs in names.items():
        grad = mine[f"blocks.1.attention.q.adapters.default.{ours}"].grad
        expected = found[f"{start}.{theirs}"].grad
        assert expected is not None
        assert expected.abs().max() > 0
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

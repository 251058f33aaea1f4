"""GGUF files: written and read again, against the library's own arithmetic and against llama.cpp."""

from __future__ import annotations

import math
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundup.model import LoraConfig, ModelConfig, RopeScaling, Transformer, add_adapter, quantize_model
from groundup.model.weights.gguf import load_gguf, read_gguf_config, save_gguf
from groundup.model.weights.llama2c import load_llama2c
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.gguf_file import read_gguf
from groundup.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
TEXT = "the cat sat on the mat; 3 dogs, naïve über 中文 👋🏽. "
SIZES = dict(
    context_length=53, n_layer=3, n_head=6, n_kv_head=2, n_embd=96, head_dim=22, n_ff=160, init_std=0.25,
    rope_theta=5_000.0, norm_eps=3e-5,
)  # fmt: skip
PLAIN = dict(qk_norm=False)
GPT2 = dict(
    norm="layernorm", positions="learned", feed_forward="gelu", bias=True, qk_norm=False, n_kv_head=6, head_dim=16,
    rope_theta=10_000.0,
)  # fmt: skip
YARN = RopeScaling("yarn", 4.0, 13)
LLAMA3 = RopeScaling("llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", PLAIN | dict(tie_embeddings=False)),
    "llama with biases": ("llama", PLAIN | dict(qkv_bias=True, out_bias=True, ff_bias=True)),
    "llama stretched": ("llama", PLAIN | dict(rope_scaling=LLAMA3)),
    "llama linear": ("llama", PLAIN | dict(rope_scaling=RopeScaling("linear", 2.5), tie_embeddings=False)),
    "qwen2": ("qwen2", PLAIN | dict(qkv_bias=True, head_dim=16)),
    "qwen2 yarn": ("qwen2", PLAIN | dict(qkv_bias=True, head_dim=16, context_length=52, rope_scaling=YARN)),
    "qwen3": ("qwen3", dict(tie_embeddings=False)),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied": ("gpt2", GPT2 | dict(tie_embeddings=False)),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT * 4], 293, show_progress=False)


def build(name: str, vocab_size: int, **more: Any) -> Transformer:
    """A model whose every parameter is random, norms and biases too."""
    torch.manual_seed(7)
    model = Transformer(ModelConfig(vocab_size=vocab_size, **{**SIZES, **MODELS[name][1], **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@torch.inference_mode()
def logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0]


# ---- there and back


@pytest.mark.parametrize("name", MODELS)
def test_float32_comes_back_exactly(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(name, tokenizer.vocab_size + 4)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    again = load_gguf(tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "m.gguf").fields["general.architecture"] == MODELS[name][0]
    assert again.config.to_dict() | {"init_std": 0.25} == model.config.to_dict()
    assert read_gguf_config(tmp_path / "m.gguf") == again.config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert load_gguf(tmp_path / "m.gguf", dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16
    told = Tokenizer.load(tmp_path / "m.gguf")
    assert told.encode(TEXT) == tokenizer.encode(TEXT)
    assert told.end_of_text_id == tokenizer.end_of_text_id
    assert told.decode(told.encode(TEXT)) == TEXT
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_rows_of_queries_and_keys_are_in_pairs_for_llama_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("llama", "qwen3"):
        model = build(name, tokenizer.vocab_size)
        save_gguf(model, tokenizer, tmp_path / "m.gguf")
        stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        for letter, heads in (("q", 6), ("k", 2)):
            ours = getattr(model.blocks[1].attention, letter).weight.detach().numpy()
            theirs = stored[f"blk.1.attn_{letter}.weight"]
            for head in range(heads):
                for row in range(22):  # pair p of a head is rows 2p and 2p + 1 there, p and p + 11 here
                    source = row // 2 + 11 * (row % 2) if name == "llama" else row
                    assert np.array_equal(theirs[22 * head + row], ours[22 * head + source])


@pytest.mark.parametrize(
    ("kind", "dtype", "worst"),
    [("f16", "F16", 2**-11), ("q8_0", "Q8_0", 0.6 / 127), ("q4_0", "Q4_0", 1.01 / 8)],
)
def test_fewer_bits_come_back_within_their_rounding(
    kind: Any, dtype: str, worst: float, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = build("llama", tokenizer.vocab_size, head_dim=32)
    path = tmp_path / "m.gguf"
    save_gguf(model, tokenizer, path, kind)
    again, reader = load_gguf(path), gguf.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    head = "Q8_0" if kind == "q4_0" else dtype
    assert (kinds["blk.2.ffn_down.weight"], kinds["token_embd.weight"], kinds["output.weight"]) == (dtype, head, head)
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    before, after = model.state_dict(), again.state_dict()
    plain = {"blk.2.ffn_down.weight": "blocks.2.feed_forward.down.weight", "token_embd.weight": "embedding.weight"}
    for tensor in reader.tensors:
        if tensor.name in plain:  # ours is what the library makes of the same bytes
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(after[plain[tensor.name]].numpy(), theirs)
    for name, tensor in before.items():
        if tensor.ndim == 1:
            assert torch.equal(after[name], tensor)
            continue
        largest = tensor.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
        assert ((after[name] - tensor).abs() <= largest * worst).all()
        assert not torch.equal(after[name], tensor)


def test_q4_0_by_hand(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build("llama", tokenizer.vocab_size)
    row = torch.zeros(96)
    row[:32] = torch.arange(-16, 16) / 16  # the largest is -1: scale 1/8, codes 0 to 15
    row[40] = 7.0
    with torch.no_grad():
        model.blocks[0].attention.v.weight[3] = row
    save_gguf(model, tokenizer, tmp_path / "m.gguf", "q4_0")
    found = load_gguf(tmp_path / "m.gguf").blocks[0].attention.v.weight[3]
    expected = [min(15, math.floor(x * 8 + 8.5)) / 8 - 1 for x in row[:32].tolist()]
    assert found[:32].tolist() == expected
    assert found[40] == 7.0
    assert not found[[32, 39, 41, 95]].any()


def test_rows_that_are_no_whole_blocks_are_written_in_float16(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_gguf(build("llama", tokenizer.vocab_size), tokenizer, tmp_path / "m.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_output.weight"] == "F16"  # 6 heads of 22
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"


@pytest.mark.parametrize("dtype", ["BF16", "Q4_1", "Q5_0", "Q5_1", "F16", "Q8_0"])
def test_other_formats_are_read_as_the_library_reads_them(dtype: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build("qwen3", tokenizer.vocab_size)
    kind, wide = gguf.GGMLQuantizationType[dtype], model.blocks[1].feed_forward.gate.weight.detach().numpy()
    coded = gguf.quants.quantize(wide, kind)
    rewrite(model, tokenizer, tmp_path / "m.gguf", {"blk.1.ffn_gate.weight": (coded, kind)})
    found = load_gguf(tmp_path / "m.gguf").blocks[1].feed_forward.gate.weight.detach().numpy()
    assert np.array_equal(found, gguf.quants.dequantize(coded, kind))


def rewrite(
    model: Transformer,
    tokenizer: Tokenizer,
    path: Path,
    tensors: dict[str, Any],
    change: Callable[..., None] | None = None,
) -> None:
    """Write a file anew through the library, with other tensors or values."""
    save_gguf(model, tokenizer, path)
    reader = gguf.GGUFReader(path)
    fields = {name: (field.contents(), field.types) for name, field in reader.fields.items() if "GGUF." not in name}
    kept: dict[str, Any] = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    kept |= tensors
    del reader
    if change is not None:
        change(fields, kept)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture")[0])
    for name, (value, types) in fields.items():
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, (data, kind) in kept.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llamas_stretching_of_other_values_is_read_as_it_computes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 5.0, 16, low_freq_factor=1.5, high_freq_factor=3.0)
    model = build("llama", tokenizer.vocab_size, rope_scaling=scaling)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    again, ids = load_gguf(tmp_path / "m.gguf"), tokenizer.encode(TEXT)
    assert again.config.rope_scaling.kind == "longrope"
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


# ---- tokenizers


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
def test_what_was_trained_here_is_read_again(pattern: str, tmp_path: Path) -> None:
    names = ("<|endoftext|>", "<|user|>")
    tok = Tokenizer.train([TEXT * 3], 280, pattern=pattern, special_tokens=names, show_progress=False)
    tok = tok.with_chat_template("{{ messages[0].content }}{{ eos_token }}", eos_token="<|endoftext|>")
    save_gguf(build("qwen3", 290), tok, tmp_path / "m.gguf")
    again = Tokenizer.load(tmp_path / "m.gguf")
    assert again.fingerprint == tok.fingerprint
    assert again.special_tokens == tok.special_tokens
    assert again.chat_template == tok.chat_template
    told = read_gguf(tmp_path / "m.gguf").fields
    assert len(told["tokenizer.ggml.tokens"]) == 290
    assert told["tokenizer.ggml.token_type"][-10:] == [5] * 10
    assert told["tokenizer.ggml.add_bos_token"] is False


def test_published_vocabularies_are_read_again(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "tokenizers"
    for name in ("gpt2", "llama2/tokenizer.model"):
        tok = Tokenizer.load(folder / name)
        fields = tok.gguf_fields()
        writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
        for key, value in fields.items():
            add = {list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            add[type(value)](key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        again = Tokenizer.load(tmp_path / "v.gguf")
        for text in (TEXT, "  two  spaces", "Ünïcode\n\n\tתירבע 1234567"):
            assert again.encode(text, add_special=True) == tok.encode(text, add_special=True)
            assert again.decode(again.encode(text)) == text
        assert again.end_of_text_id == tok.end_of_text_id


def test_tokenizers_that_the_format_has_no_place_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def refused(tok: Tokenizer, vocab_size: int = 400) -> str:
        with pytest.raises(UsageError) as caught:
            save_gguf(build("llama", vocab_size), tok, tmp_path / "m.gguf")
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    assert "no name for the way" in refused(Tokenizer.train([TEXT], 260, pattern=r"\w+|\W+", show_progress=False))
    assert "no name for the way" in refused(Tokenizer.train([TEXT], 260, normalization="NFKD", show_progress=False))
    assert "a tokenizer of words has no place" in refused(
        Tokenizer.train([TEXT], algorithm="words", show_progress=False)
    )
    assert f"has {tokenizer.vocab_size} tokens, the model 290: too few" in refused(tokenizer, 290)


# ---- what is not written


def test_models_that_llama_cpp_does_not_have(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, vocab_size = tmp_path / "m.gguf", tokenizer.vocab_size

    def refused(model: Transformer, kind: Any = "f32") -> str:
        with pytest.raises(UsageError) as caught:
            save_gguf(model, tokenizer, path, kind)
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    assert "parts that none of them has" in refused(build("llama", vocab_size, feed_forward="relu2"))
    windows = dict(layer_pattern="S", sliding_window=9)
    assert "llama has no sliding windows" in refused(build("llama", vocab_size, **windows))
    assert "gpt2 has no feed_forward = relu" in refused(build("gpt2", vocab_size, feed_forward="relu"))
    assert "qwen3 has no biases" in refused(build("qwen3", vocab_size, qkv_bias=True, out_bias=True))
    dynamic = dict(rope_scaling=RopeScaling("dynamic", 2.0, 26), context_length=52)
    assert "llama has no rope_scaling = dynamic" in refused(build("llama", vocab_size, **dynamic))
    assert "qwen2 has no heads that are together wider" in refused(build("qwen2", vocab_size, head_dim=22))
    assert "are not written: f32, f16, q8_0, q4_0 are. Did you mean q4_0?" in refused(
        build("llama", vocab_size), "q4_1"
    )
    adapted = build("llama", vocab_size)
    add_adapter(adapted, LoraConfig(rank=2, targets=("q",)))
    assert "only plain weights are written" in refused(adapted)
    assert "only plain weights" in refused(quantize_model(build("llama", vocab_size), "int8"))  # type: ignore[arg-type]
    broken = build("llama", vocab_size)
    with torch.no_grad():
        broken.blocks[1].attention.out.weight[2, 5] = 1e6
    save_gguf(broken, tokenizer, path)
    path.unlink()
    assert "blk.1.attn_output.weight: a weight is too large for f16" in refused(broken, "f16")
    with torch.no_grad():
        broken.blocks[1].attention.out.weight[2, 5] = math.nan
    for kind in ("f32", "f16", "q8_0", "q4_0"):
        assert "blk.1.attn_output.weight: a weight is not finite" in refused(broken, kind)


def test_an_older_file_stays_where_writing_fails(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = build("llama", tokenizer.vocab_size), tmp_path / "m.gguf"
    save_gguf(model, tokenizer, path)
    before = path.read_bytes()
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    with pytest.raises(UsageError):
        save_gguf(model, tokenizer, path)
    assert path.read_bytes() == before
    with pytest.raises(GroundupError, match="cannot write"):
        save_gguf(build("llama", tokenizer.vocab_size), tokenizer, path / "under a file.gguf")


def test_without_the_library(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GroundupError, match=r"need the package gguf: pip install 'groundup\[tokenizer\]'"):
        save_gguf(build("llama", tokenizer.vocab_size), tokenizer, tmp_path / "m.gguf")


# ---- damaged files


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """A function of a file's bytes that says why it cannot be read, in one line and without much memory."""

    def read(content: bytes) -> str:
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(GroundupError) as caught:
            load_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
        tracemalloc.stop()
        assert str(caught.value).startswith(f"{path}: ") or str(caught.value).startswith("cannot read")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read


@pytest.fixture
def whole(tokenizer: Tokenizer, tmp_path: Path) -> bytes:
    save_gguf(build("llama", tokenizer.vocab_size), tokenizer, tmp_path / "whole.gguf", "q8_0")
    return (tmp_path / "whole.gguf").read_bytes()


def test_a_file_cut_short_anywhere(whole: bytes, refused: Callable[..., str], tmp_path: Path) -> None:
    begin = begin_of_tensors(whole, tmp_path)
    for length in [*range(0, 200, 7), *range(200, begin - 32, 211), begin - 32]:
        assert "not a whole GGUF file" in refused(whole[:length])
    for length in (begin, begin + 1, (begin + len(whole)) // 2, len(whole) - 33):
        message = refused(whole[:length])
        assert "cut short" in message or "should begin" in message


def begin_of_tensors(whole: bytes, tmp_path: Path) -> int:
    (tmp_path / "x.gguf").write_bytes(whole)
    return min(tensor.data_offset for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors)


def test_another_kind_or_version(whole: bytes, refused: Callable[..., str]) -> None:
    assert "does not begin with the letters GGUF" in refused(b"GGML" + whole[4:])
    assert "its version is 1;" in refused(whole[:4] + struct.pack("<I", 1) + whole[8:])
    assert f"its version is {3 << 24}; little-endian" in refused(whole[:4] + struct.pack(">I", 3) + whole[8:])


def test_absurd_sizes(whole: bytes, refused: Callable[..., str]) -> None:
    def with_number(at: int, value: int, form: str = "<Q") -> bytes:
        changed = bytearray(whole)
        struct.pack_into(form, changed, at, value)
        return bytes(changed)

    tokens = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    types = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
    norm = whole.index(b"output_norm.weight") + len("output_norm.weight")
    for value in (1 << 63, (1 << 64) - 1, 1 << 33):
        for at in (8, 16, 24, tokens + 8, types + 8, tokens + 16):  # counts, lengths of a text and of lists
            assert "bytes should follow" in refused(with_number(at, value))
        assert "output_norm.weight" in refused(with_number(norm + 4, value))
        assert "output_norm.weight should begin at byte" in refused(with_number(norm + 16, value))
    assert "output_norm.weight has 77 axes" in refused(with_number(norm, 77, "<I"))
    assert "is of format 99, not known here" in refused(with_number(norm + 12, 99, "<I"))
    assert "is of format Q8_1, which groundup does not read" in refused(with_number(norm + 12, 9, "<I"))
    assert "no whole blocks of Q6_K" in refused(with_number(norm + 12, 14, "<I"))
    assert "a list of kind 9" in refused(with_number(types + 4, 9, "<I"))
    assert "a value of kind 77" in refused(with_number(types, 77, "<I"))
    for name in ("embedding_length", "block_count", "feed_forward_length", "attention.head_count_kv"):
        at = whole.index(f"llama.{name}".encode()) + len(f"llama.{name}") + 4
        for value in (0, (1 << 32) - 1, 1 << 23, 5):
            assert refused(with_number(at, value, "<I"))


def test_a_list_without_end_does_not_stop_a_tokenizer(whole: bytes, tmp_path: Path) -> None:
    types = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
    changed = bytearray(whole)
    struct.pack_into("<IQ", changed, types + 4, 0, 1 << 60)
    (tmp_path / "bad.gguf").write_bytes(changed)
    with pytest.raises(GroundupError, match="not a whole GGUF file"):
        Tokenizer.load(tmp_path / "bad.gguf")


def test_what_is_missing_or_does_not_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model, path = build("llama", tokenizer.vocab_size), tmp_path / "m.gguf"

    def refused(change: Callable[..., None]) -> str:
        rewrite(model, tokenizer, path, {}, change)
        with pytest.raises(GroundupError) as caught:
            load_gguf(path)
        return str(caught.value)

    def told(name: str, value: Any) -> Callable[..., None]:
        return lambda fields, tensors: fields.update({name: (value, fields.get(name, (0, [4]))[1])})

    def without(name: str) -> Callable[..., None]:
        return lambda fields, tensors: (fields.pop(name, None), tensors.pop(name, None))

    def other(name: str, tensor: str) -> Callable[..., None]:
        return lambda fields, tensors: tensors.update({name: tensors[tensor]})

    assert "'lama' is not one that groundup reads" in refused(told("general.architecture", "lama"))
    assert "Did you mean llama? It reads llama, qwen2, qwen3, gpt2." in refused(told("general.architecture", "lama"))
    for name in ("embedding_length", "attention.layer_norm_rms_epsilon"):
        assert f"llama.{name} is missing" in refused(without(f"llama.{name}"))
    assert "uses rope_type = circular, which groundup" in refused(
        lambda fields, _: fields.update(
            {"llama.rope.scaling.type": ("circular", [8]), "llama.rope.scaling.factor": (2.0, [6])}
        )
    )
    assert "the tensor blk.1.ffn_up.weight is missing" in refused(without("blk.1.ffn_up.weight"))
    assert "no token_embd.weight in it" in refused(without("token_embd.weight"))
    assert "blk.9.attn_gate.weight has no place" in refused(other("blk.9.attn_gate.weight", "blk.0.attn_q.weight"))
    assert "blk.0.attn_q.weight has shape [44, 96], its head asks for [132, 96]" in refused(
        other("blk.0.attn_q.weight", "blk.0.attn_k.weight")
    )
    assert "a mixture of experts" in refused(told("llama.expert_count", 8))
    assert "block_count has an impossible value (99999999)" in refused(told("llama.block_count", 99_999_999))
    assert "blk.6.attn_norm.weight is missing" in refused(told("llama.block_count", 7))
    assert "rope.dimension_count = 8, where 22 was expected" in refused(told("llama.rope.dimension_count", 8))
    assert "n_head = 5" in refused(told("llama.attention.head_count", 5))


def said(read: Callable[[Path], Any], path: Path) -> str:
    """Why a file is refused; empty where it is not."""
    try:
        read(path)
    except GroundupError as error:
        return str(error)
    return ""


def test_bits_that_flipped_end_in_one_line_or_in_a_model(whole: bytes, tmp_path: Path) -> None:
    chance, path = np.random.default_rng(3), tmp_path / "bad.gguf"
    for place in chance.integers(0, 6000, 120):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(chance.integers(0, 8))
        path.write_bytes(changed)
        for read in (load_gguf, Tokenizer.load):
            assert "\n" not in said(read, path)


# ---- llama.cpp


class LlamaCpp:
    """llama.cpp on a file, with a cache in float32."""

    def __init__(self, path: Path, context: int) -> None:
        llama_cpp = pytest.importorskip("llama_cpp")
        self.model = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
            type_k=0, type_v=0,
        )  # fmt: skip

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(np.array(self.model.scores[: len(ids)]))

    def greedy(self, ids: list[int], count: int) -> list[int]:
        self.model.reset()
        found: list[int] = []
        for _ in range(count):
            self.model.eval(found[-1:] or ids)
            found.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
        return found


def greedy(model: Transformer, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = build(name, tokenizer.vocab_size)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    other = LlamaCpp(tmp_path / "m.gguf", 52)
    prompt = tokenizer.encode(TEXT)
    assert other.model.tokenize(TEXT.encode(), add_bos=False, special=False) == prompt
    ours = logits(model, prompt[:40])
    tolerance = 2e-2 if "gpt2" in name else 2e-3  # their GELU is looked up in a table of float16
    torch.testing.assert_close(other.logits(prompt[:40]), ours, rtol=0, atol=tolerance * float(ours.std()))
    assert other.greedy(prompt[:11], 30) == greedy(model, prompt[:11], 30)


def test_stories_are_told_as_by_llama_cpp(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "weights" / "stories260K"
    model, tok = load_llama2c(folder / "stories260K.bin"), Tokenizer.load(folder / "tok512.bin")
    save_gguf(model, tok, tmp_path / "m.gguf")
    again = Tokenizer.load(tmp_path / "m.gguf")
    prompt = "Once upon a time, Zoë saw 7 cats"
    assert again.encode(prompt, add_special=True) == tok.encode(prompt, add_special=True)
    other = LlamaCpp(tmp_path / "m.gguf", 128)
    ids = tok.encode(prompt, add_special=True)
    assert other.model.tokenize(prompt.encode(), add_bos=True) == ids
    assert other.greedy(ids, 90) == greedy(load_gguf(tmp_path / "m.gguf"), ids, 90)
    for kind in ("f16", "q8_0", "q4_0"):
        save_gguf(model, tok, tmp_path / "m.gguf", kind)
        ours, theirs = logits(load_gguf(tmp_path / "m.gguf"), ids), LlamaCpp(tmp_path / "m.gguf", 64).logits(ids)
        # They round what is multiplied with blocks to eight bits, too.
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02 if kind == "f16" else 0.6)
        assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() > 0.8

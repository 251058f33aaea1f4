"""llama2.c's model files: every version against a forward pass written out as run.c has it, and against damage."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundup.model.weights.llama2c import load_llama2c, read_llama2c_config
from groundup.runtime import GroundupError

SIZES = dict(dim=24, hidden_dim=40, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=29, seq_len=19)
GROUP = 8
Weights = dict[str, np.ndarray]


def random_weights(sizes: dict[str, int], *, tied: bool) -> Weights:
    """Tensors of each kind with the layers in front, by llama2.c's names and in its order of rotary pairs."""
    numbers = np.random.default_rng(5)
    dim, hidden, layers = sizes["dim"], sizes["hidden_dim"], sizes["n_layers"]
    kv = dim // sizes["n_heads"] * sizes["n_kv_heads"]
    shapes = dict(
        emb=(sizes["vocab_size"], dim), att=(layers, dim), wq=(layers, dim, dim), wk=(layers, kv, dim),
        wv=(layers, kv, dim), wo=(layers, dim, dim), ffn=(layers, dim), w1=(layers, hidden, dim),
        w2=(layers, dim, hidden), w3=(layers, hidden, dim), final=(dim,), cls=(sizes["vocab_size"], dim),
    )  # fmt: skip
    weights = {name: numbers.normal(0, 0.3, shape).astype("<f4") for name, shape in shapes.items()}
    if tied:
        weights["cls"] = weights["emb"]
    return weights


def packed(tensor: np.ndarray) -> bytes:
    """Q8_0: the int8 numbers, then a scale for each group."""
    groups = tensor.reshape(-1, GROUP)
    scales = (np.abs(groups).max(1) / 127).astype("<f4")
    return np.round(groups / scales[:, None]).astype("i1").tobytes() + scales.tobytes()


def written(version: int, weights: Weights, sizes: dict[str, int], *, tied: bool) -> bytes:
    header = list(sizes.values())
    head = [] if tied else [weights["cls"]]
    if version == 0:
        header[5] *= 1 if tied else -1
        waves = np.full(sizes["seq_len"] * sizes["dim"] // sizes["n_heads"], 77.0, "<f4")
        order = ("emb", "att", "wq", "wk", "wv", "wo", "ffn", "w1", "w2", "w3", "final")
        return b"".join([struct.pack("<7i", *header), *(weights[n].tobytes() for n in order), waves.tobytes()]
                        + [one.tobytes() for one in head])  # fmt: skip
    start = struct.pack("<Ii7iB", 0x616B3432, version, *header, tied)
    start += struct.pack("<i", GROUP) if version == 2 else b""
    norms = b"".join(weights[name].tobytes() for name in ("att", "ffn", "final"))
    kinds = [weights[name] for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")]
    matrices = [weights["emb"], *(layer for kind in kinds for layer in kind), *head]
    write = packed if version == 2 else np.ndarray.tobytes
    return start.ljust(256, b"\0") + norms + b"".join(write(one) for one in matrices)


def forward(w: Weights, sizes: dict[str, int], ids: list[int]) -> np.ndarray:
    """The logits after each token, as run.c computes them: position by position, rotary pairs side by side."""
    dim, heads, kv_heads = sizes["dim"], sizes["n_heads"], sizes["n_kv_heads"]
    width = dim // heads

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * (x / np.sqrt((x * x).mean() + 1e-5))

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        out = x.copy()
        for i in range(0, len(x), 2):
            angle = position * 10000.0 ** (-(i % width) / width)
            c, s = np.cos(angle), np.sin(angle)
            out[i], out[i + 1] = x[i] * c - x[i + 1] * s, x[i] * s + x[i + 1] * c
        return out

    keys: list[list[np.ndarray]] = [[] for _ in range(sizes["n_layers"])]
    values: list[list[np.ndarray]] = [[] for _ in range(sizes["n_layers"])]
    logits = []
    for position, token in enumerate(ids):
        x = w["emb"][token].astype(np.float64)
        for layer in range(sizes["n_layers"]):
            h = norm(x, w["att"][layer])
            q = turn(w["wq"][layer] @ h, position)
            keys[layer].append(turn(w["wk"][layer] @ h, position))
            values[layer].append(w["wv"][layer] @ h)
            mixed = []
            for head in range(heads):
                group = slice(width * (head * kv_heads // heads), width * (head * kv_heads // heads + 1))
                scores = np.array([q[head * width : (head + 1) * width] @ k[group] for k in keys[layer]])
                scores = np.exp(scores / np.sqrt(width))
                mixed.append(sum(p * v[group] for p, v in zip(scores / scores.sum(), values[layer], strict=True)))
            x = x + w["wo"][layer] @ np.concatenate(mixed)
            h = norm(x, w["ffn"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        logits.append(w["cls"] @ norm(x, w["final"]))
    return np.array(logits)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, Weights]]:
    def write(version: int = 0, *, tied: bool = True, **sizes: int) -> tuple[Path, Weights]:
        weights = random_weights(SIZES | sizes, tied=tied)
        (tmp_path / "model.bin").write_bytes(written(version, weights, SIZES | sizes, tied=tied))
        return tmp_path / "model.bin", weights

    return write


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
@torch.inference_mode()
def test_logits_are_those_of_the_program_that_the_file_is_for(make: Any, version: int, tied: bool) -> None:
    file, weights = make(version, tied=tied)
    if version == 2:  # what the file holds is rounded; the program multiplies it out
        for name, tensor in weights.items():
            if name not in ("att", "ffn", "final"):
                groups = tensor.reshape(-1, GROUP)
                scales = np.abs(groups).max(1, keepdims=True) / np.float32(127)
                weights[name] = (np.round(groups / scales) * scales).reshape(tensor.shape)
    model = load_llama2c(file)
    ids = [3, 28, 0, 11, 11, 7, 19]
    expected = forward(weights, SIZES, ids)
    torch.testing.assert_close(model(torch.tensor([ids]))[0].double(), torch.tensor(expected), rtol=0, atol=2e-5)
    assert (model.head.weight is model.embedding.weight) == tied
    assert model.config == read_llama2c_config(file)
    assert model.config.context_length == 19


def test_one_key_head_and_as_many_as_queries(make: Any) -> None:
    for kv_heads in (1, 4):
        file, weights = make(1, n_kv_heads=kv_heads)
        with torch.inference_mode():
            logits = load_llama2c(file)(torch.tensor([[5, 6, 7]]))[0]
        expected = forward(weights, SIZES | {"n_kv_heads": kv_heads}, [5, 6, 7])
        torch.testing.assert_close(logits.double(), torch.tensor(expected), rtol=0, atol=2e-5)


def test_the_weights_become_what_was_asked_for(make: Any) -> None:
    file, weights = make(2)
    model = load_llama2c(file, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load_llama2c(file).parameters()} == {torch.float32}
    norm = torch.tensor(weights["final"]).bfloat16()
    assert torch.equal(model.norm.weight, norm)


def test_reading_takes_one_tensor_of_memory_besides_the_model(make: Any) -> None:
    sizes = dict(dim=128, hidden_dim=512, n_layers=11, n_heads=4, n_kv_heads=2, vocab_size=31)
    for version, most in ((0, 1.5), (2, 2.5)):  # int8 multiplied out stands beside its scales for a moment
        file, weights = make(version, **sizes)
        load_llama2c(file)  # whatever is imported on first use
        tracemalloc.start()  # which counts NumPy's memory, and not torch's
        load_llama2c(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        overhead = 800_000  # the modules themselves
        assert peak < most * weights["w1"][0].nbytes + overhead < weights["w1"].nbytes


# ---- what is wrong with a file


def fails(file: Path) -> str:
    with pytest.raises(GroundupError) as caught:
        load_llama2c(file)
    assert str(caught.value).startswith(str(file)) or "cannot read" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(GroundupError):
        read_llama2c_config(file)
    return str(caught.value)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_file_of_any_other_length_is_refused(make: Any, version: int) -> None:
    file, _ = make(version)
    whole = file.read_bytes()
    for length in (0, 3, 27, 28, 255, 256, 257, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        file.write_bytes(whole[:length])
        message = fails(file)
        assert "cut short" in message or "too few" in message
    for more in (b"\0", bytes(1000)):
        file.write_bytes(whole + more)
        assert "has something behind its end" in fails(file)
        assert f"asks for {len(whole):,} bytes, it has {len(whole) + len(more):,}" in fails(file)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_absurd_sizes_are_refused_before_any_memory_is_asked_for(make: Any, version: int) -> None:
    file, _ = make(version)
    whole = file.read_bytes()
    start = 8 if version else 0
    for place, name in enumerate(SIZES):
        for value in (0, -(2**31), 2**31 - 1, 2**31 - 8):
            damaged = bytearray(whole)
            struct.pack_into("<i", damaged, start + 4 * place, value)
            file.write_bytes(damaged)
            message = fails(file)
            if value == 0:
                assert f"damaged ({name} = 0)" in message
    file.write_bytes(whole[:start] + struct.pack("<7i", *[2**31 - 2] * 7) + whole[start + 28 :])
    fails(file)


def test_heads_that_do_not_fit(make: Any, tmp_path: Path) -> None:
    for sizes, words in (
        (dict(n_heads=5), "dim = 24 is not an even width for each of n_heads = 5"),
        (dict(n_heads=8), "dim = 24 is not an even width for each of n_heads = 8"),
        (dict(n_kv_heads=3), "n_kv_heads = 3 does not divide n_heads = 4"),
    ):
        header = struct.pack("<7i", *(SIZES | sizes).values())
        (tmp_path / "m.bin").write_bytes(header + bytes(1000))
        assert words in fails(tmp_path / "m.bin")


def test_other_kinds_of_files(make: Any, tmp_path: Path) -> None:
    file, _ = make(1)
    whole = bytearray(file.read_bytes())
    for version in (3, -1):
        struct.pack_into("<i", whole, 4, version)
        file.write_bytes(whole)
        assert f"version {version} of llama2.c's format is not known; 0, 1 and 2 are" in fails(file)
    whole[0] ^= 1  # another magic number: read as version 0, whose sizes make no sense
    file.write_bytes(whole)
    assert "not a model of llama2.c" in fails(file)
    torch.save({"a": torch.zeros(100)}, file)
    assert "pickled weights, which can run code when opened: never read" in fails(file)
    assert "no such file" in fails(tmp_path / "nothing.bin")


def test_groups_and_scales(make: Any) -> None:
    file, _ = make(2)
    whole = file.read_bytes()
    for group, words in ((0, "group size = 0"), (-8, "group size = -8"), (7, "groups of 7 do not fill every matrix")):
        file.write_bytes(whole[:37] + struct.pack("<i", group) + whole[41:])
        assert words in fails(file)
    norms = 4 * (2 * SIZES["n_layers"] + 1) * SIZES["dim"]
    scales = 256 + norms + SIZES["vocab_size"] * SIZES["dim"]
    for wrong in (float("nan"), float("inf"), -0.5):
        damaged = bytearray(whole)
        struct.pack_into("<f", damaged, scales, wrong)
        file.write_bytes(damaged)
        with pytest.raises(GroundupError, match=r"the scales of embedding are no numbers"):
            load_llama2c(file)

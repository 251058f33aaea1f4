"""Every token is scored once, with the context promised, and the sum is the known one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.evaluation import bits_per_byte, model_scorer
from groundup.evaluation.bits_per_byte import sliding_windows
from groundup.runtime import GroundupError, UsageError

START = 0
sizes = st.tuples(st.integers(1, 120), st.integers(1, 40)).flatmap(
    lambda nt: st.tuples(st.just(nt[0]), st.just(nt[1]), st.integers(1, nt[1]))
)


def measure(score: Any, tokens: Any, bytes_per_token: Any, context_length: int, **options: Any) -> Any:
    return bits_per_byte(score, tokens, bytes_per_token, context_length, start_id=START, show_progress=False, **options)


@given(sizes)
def test_windows_count_each_token_once_with_enough_context(size: tuple[int, int, int]) -> None:
    n, context_length, stride = size
    counted = []
    for window in sliding_windows(n, context_length, stride):
        assert 0 <= window.start <= window.first_new < window.end <= n
        assert window.end - window.start == min(context_length, n)
        for target in range(window.first_new, window.end):
            tokens_before = target - window.start + 1  # the input of the window's first target counts
            assert tokens_before > min(context_length - stride, target)
            counted.append(target)
    assert counted == list(range(n))


@given(sizes, st.integers(1, 5))
def test_each_loss_is_counted_once_and_inputs_precede_targets(size: tuple[int, int, int], batch_size: int) -> None:
    """Distinct ids mark positions: the loss of id i is a number that only its own sum can give."""
    n, context_length, stride = size
    tokens = np.arange(1, n + 1, dtype=np.uint16)  # token i follows token i - 1, and START = 0 precedes all

    def score(inputs_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
        assert inputs_BT.dtype == np.int64
        assert len(inputs_BT) <= batch_size
        np.testing.assert_array_equal(inputs_BT, targets_BT - 1)
        return np.sqrt(targets_BT)  # square roots of different numbers do not add up to each other's sums

    result = measure(score, tokens, np.ones(n + 1, np.int64), context_length, stride=stride, batch_size=batch_size)
    assert result.n_tokens == result.n_bytes == n
    assert result.loss == pytest.approx(np.sqrt(tokens.astype(float)).sum() / n, rel=1e-12)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2), rel=1e-12)


def test_a_uniform_model_needs_log2_of_the_vocabulary() -> None:
    tokens = np.random.default_rng(1).integers(1, 37, size=1009)

    def score(inputs_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
        return np.full(targets_BT.shape, math.log(37), dtype=np.float32)

    result = measure(score, tokens, np.ones(37, np.int64), 31)
    assert result.bits_per_byte == pytest.approx(math.log2(37), rel=1e-6)
    assert result.loss == pytest.approx(math.log(37), rel=1e-6)
    assert result.seconds > 0


@pytest.mark.parametrize(("context_length", "stride"), [(2, 1), (7, 3), (64, 64), (5000, None)])
def test_a_bigram_model_gives_the_same_however_the_text_is_cut(context_length: int, stride: int | None) -> None:
    rng = np.random.default_rng(2)
    table_VV = np.log(rng.dirichlet(np.ones(11), size=11))
    tokens, lengths = rng.integers(0, 11, size=997), np.array([0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55])
    by_hand = -sum(table_VV[a, b] for a, b in zip([START, *tokens[:-1]], tokens, strict=True))

    def score(inputs_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
        return -table_VV[inputs_BT, targets_BT]

    result = measure(score, tokens, lengths, context_length, stride=stride)
    assert result.n_bytes == lengths[tokens].sum()
    assert result.bits_per_byte == pytest.approx(by_hand / math.log(2) / lengths[tokens].sum(), rel=1e-12)
    assert result.loss == pytest.approx(by_hand / 997, rel=1e-12)


def test_max_tokens_cuts_tokens_and_bytes_alike() -> None:
    tokens, lengths = np.array([1, 2, 3, 2, 1, 3]), np.array([0, 2, 3, 7])

    def score(inputs_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
        return np.ones(targets_BT.shape)

    result = measure(score, tokens, lengths, 4, max_tokens=3)
    assert (result.n_tokens, result.n_bytes) == (3, 12)
    assert result.bits_per_byte == pytest.approx(3 / math.log(2) / 12)


def test_a_memory_map_is_read_as_it_is(tmp_path: Path) -> None:
    np.arange(1, 50, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    result = measure(lambda inputs, targets: np.ones(targets.shape), tokens, np.ones(50, np.uint8), 16)
    assert result.n_bytes == 49


def test_a_loss_that_is_not_finite_is_not_hidden() -> None:
    result = measure(lambda inputs, targets: np.full(targets.shape, np.nan), np.array([1, 1]), np.ones(2, int), 2)
    assert math.isnan(result.bits_per_byte)


def test_mistakes_are_told() -> None:
    def score(inputs_BT: np.ndarray, targets_BT: np.ndarray) -> np.ndarray:
        raise AssertionError("nothing may be scored")

    ones = np.ones(8, np.int64)
    with pytest.raises(UsageError, match="stride = 5 must be from 1 to the context length, 4"):
        measure(score, np.array([1]), ones, 4, stride=5)
    with pytest.raises(GroundupError, match="empty"):
        measure(score, np.array([], dtype=np.uint16), ones, 4)
    with pytest.raises(GroundupError, match="token id 8 is outside the vocabulary of 8"):
        measure(score, np.array([1, 8]), ones, 4)
    with pytest.raises(GroundupError, match="only special tokens"):
        measure(score, np.array([0, 0]), np.array([0, 1]), 4)


def test_model_scorer_is_the_cross_entropy_and_leaves_the_model_as_it_was() -> None:
    torch = pytest.importorskip("torch")

    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(13, 13)
            self.modes: list[bool] = []

        def forward(self, ids_BT: Any) -> Any:
            self.modes.append(self.training)
            assert not torch.is_grad_enabled()
            return self.table(ids_BT)

    model = Bigram().train()
    rng = np.random.default_rng(3)
    inputs_BT, targets_BT = rng.integers(0, 13, size=(3, 5)), rng.integers(0, 13, size=(3, 5))
    losses_BT = model_scorer(model, "cpu")(inputs_BT, targets_BT)
    logits = model.table.weight.detach().numpy().astype(np.float64)
    expected = np.log(np.exp(logits).sum(1))[inputs_BT] - logits[inputs_BT, targets_BT]
    np.testing.assert_allclose(losses_BT, expected, rtol=1e-5)
    assert losses_BT.dtype == np.float32
    assert model.modes == [False]
    assert model.training
    half = model_scorer(model, "cpu", "bfloat16")(inputs_BT, targets_BT)
    assert half.dtype == np.float32

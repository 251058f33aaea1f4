"""Positions: how attention learns where a token stands."""

# B batch   T query positions   S key positions   H heads   D head dimension   R rotated dimensions

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from groundup.model.config import ModelConfig, RopeScaling, yarn_mscale

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, float32, each B or 1, T, 1, R."""


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, eq. 15): cosines and sines of position times frequency.

    Dimension pairs are (i, i + R/2), the convention of the Hugging Face Llama weights, not the interleaved one of the
    paper; the two differ by a fixed permutation of the head dimension.

    Args:
        dim: R, dimensions that are rotated.
        theta: base of the frequencies.
        scaling: how they are stretched.
        context_length: what the model may read.
    """

    def __init__(self, dim: int, theta: float, scaling: RopeScaling, context_length: int) -> None:
        super().__init__()
        self.dim, self.theta, self.scaling = dim, theta, scaling
        self.original_length = scaling.original_length or max(1, round(context_length / scaling.factor))
        self.amplitude = attention_factor(scaling, self.original_length)

    @property
    def grows(self) -> bool:
        """Whether the frequencies hang on the length of the text: then keys of a shorter one are not those of a longer
        one.
        """
        return self.scaling.kind in ("dynamic", "longrope")

    def frequencies(self, length: int, device: torch.device) -> Tensor:
        """Angle per position of each pair of dimensions, for a text of ``length`` positions; float32, R/2."""
        scaling, original = self.scaling, self.original_length
        theta = self.theta
        if scaling.kind == "dynamic" and self.dim > 2:  # a lone pair turns by 1 per position whatever theta is
            grown = scaling.factor * max(length, original) / original - (scaling.factor - 1)
            theta = theta * grown ** (self.dim / (self.dim - 2))
        exponents_R2 = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        # Written as transformers writes it: theta**-x differs in the last bit, which grows with the position.
        frequencies_R2 = 1.0 / theta**exponents_R2
        if scaling.kind == "linear":
            return frequencies_R2 / scaling.factor
        if scaling.kind == "llama3":
            return _llama3(frequencies_R2, scaling, original)
        if scaling.kind == "yarn":
            return _yarn(frequencies_R2, scaling, original, theta)
        if scaling.kind == "longrope":
            divisors = scaling.long_factor if length > original else scaling.short_factor
            return 1.0 / (torch.tensor(divisors, dtype=torch.float32, device=device) * theta**exponents_R2)
        return frequencies_R2

    def forward(self, positions_BT: Tensor, length: int) -> Rotation:
        """Cosines and sines for positions, B or 1 by T, of texts of at most ``length`` positions."""
        frequencies_R2 = self.frequencies(length, positions_BT.device)
        angles_BT1R2 = positions_BT[:, :, None, None].float() * frequencies_R2
        angles_BT1R = torch.cat([angles_BT1R2, angles_BT1R2], dim=-1)
        return angles_BT1R.cos() * self.amplitude, angles_BT1R.sin() * self.amplitude


def _llama3(frequencies_R2: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    """Long wavelengths are divided by the factor, short ones left alone, those between blended (Llama 3.1)."""
    turns = original * frequencies_R2 / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies_R2 / scaling.factor + kept * frequencies_R2


def _yarn(frequencies_R2: Tensor, scaling: RopeScaling, original: int, theta: float) -> Tensor:
    """The same idea with a ramp over dimensions instead of wavelengths (Peng et al. 2023, section 3.2)."""
    dim = 2 * len(frequencies_R2)

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = torch.arange(dim // 2, dtype=torch.float32, device=frequencies_R2.device)
    stretched = ((ramp - low) / (high - low or 0.001)).clamp(0.0, 1.0)
    return frequencies_R2 / scaling.factor * stretched + frequencies_R2 * (1 - stretched)


def attention_factor(scaling: RopeScaling, original_length: int) -> float:
    """What cosines and sines are multiplied with: 1, but for yarn and longrope."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        if scaling.mscale and scaling.mscale_all_dim:
            return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        return yarn_mscale(scaling.factor)
    if scaling.kind == "longrope" and scaling.factor > 1.0:
        return math.sqrt(1 + math.log(scaling.factor) / math.log(original_length))
    return 1.0


def make_rotary(config: ModelConfig, *, local: bool = False) -> Rotary | None:
    """The rotary positions of a config's layers: of those with a window (``local``), or of the others."""
    if config.positions != "rope":
        return None
    if local and config.rope_local_theta is not None:
        return Rotary(config.rotary_dim, config.rope_local_theta, RopeScaling(), config.context_length)
    return Rotary(config.rotary_dim, config.rope_theta, config.rope_scaling, config.context_length)


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of the first R dimensions by its position's angle; same shape and dtype as ``x_BTHD``."""
    rotated = cos.shape[-1]
    x_BTHR, rest = x_BTHD[..., :rotated], x_BTHD[..., rotated:]
    half = rotated // 2
    turned = torch.cat([-x_BTHR[..., half:], x_BTHR[..., :half]], dim=-1)
    x_BTHR = x_BTHR * cos.to(x_BTHD.dtype) + turned * sin.to(x_BTHD.dtype)
    return x_BTHR if rest.shape[-1] == 0 else torch.cat([x_BTHR, rest], dim=-1)


def sinusoidal(positions_BT: Tensor, width: int) -> Tensor:
    """Sines and cosines of geometrically growing wavelengths (Vaswani et al. 2017, section 3.5); float32, B T width."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions_BT.device) / width
    angles = positions_BT[..., None].float() / 10_000.0**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width]


def alibi_slopes(n_head: int) -> Tensor:
    """How much each head's scores fall per position of distance (Press et al. 2022, section 3); float32, H.

    Powers of two of heads take ``2^(-8 i / n)``; other numbers take those of the power below, and every other one of
    the power above, as the authors' code does.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (number + 1) / count) for number in range(count)]

    below = 2 ** math.floor(math.log2(n_head))
    slopes = geometric(below) + geometric(2 * below)[::2][: n_head - below]
    return torch.tensor(slopes, dtype=torch.float32)

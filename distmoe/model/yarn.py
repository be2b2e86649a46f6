"""RoPE over more positions than a model was trained with first (YaRN, arXiv 2309.00071).

Frequencies that turn fewer than beta_slow times over the original positions are divided by the
factor, those that turn more than beta_fast times stay, and between them is a ramp. With
m(s) = 1 + 0.1 s ln factor, cos and sin are multiplied by m(mscale) / m(mscale_all_dim), and scores
by m(mscale_all_dim)^2: the paper has s = 1 and 0, DeepSeek both alike.
"""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from distmoe.config import YarnConfig


def scaled_frequencies(freq_R: Tensor, *, theta: float, yarn: YarnConfig) -> Tensor:
    """Of all pairs of a head, those of RoPE given."""
    if yarn.factor == 1:
        return freq_R
    pairs = len(freq_R)

    def pair_that_turns(times: float) -> float:
        return pairs * log(yarn.original_positions / (times * 2 * pi)) / log(theta)

    # The end is that of a head's values, not of its pairs, as in DeepSeek's code.
    low = max(floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(ceil(pair_that_turns(yarn.beta_slow)), 2 * pairs - 1)
    pair_R = torch.arange(pairs, device=freq_R.device, dtype=freq_R.dtype)
    ramp_R = ((pair_R - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq_R / yarn.factor * ramp_R + freq_R * (1 - ramp_R)


def table_scale(yarn: YarnConfig) -> float:
    """Factor on cos and sin."""
    return _magnitude(yarn, yarn.mscale) / _magnitude(yarn, yarn.mscale_all_dim)


def score_scale(yarn: YarnConfig) -> float:
    """Factor on the scores of attention."""
    return _magnitude(yarn, yarn.mscale_all_dim) ** 2


def _magnitude(yarn: YarnConfig, strength: float) -> float:
    return 1 + 0.1 * strength * log(yarn.factor)

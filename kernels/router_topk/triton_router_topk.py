"""Scores, keys and top-k of whole rows, read once; and the gradient of the scores."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores_of(logits, expert, E: tl.constexpr, ACTIVATION: tl.constexpr):
    """fp32 scores of whole rows."""
    if ACTIVATION == "softmax":
        logits = tl.where((expert < E)[None, :], logits, -float("inf"))
        # Of a row without a number the largest is -inf, and the difference is NaN as in PyTorch.
        exponential = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        score = exponential / tl.sum(exponential, axis=1)[:, None]
    elif ACTIVATION == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        score = logits
    return score


@triton.jit(do_not_specialize=["T"])
def router_topk_kernel(
    logits_ptr, bias_ptr, score_ptr, key_ptr, chosen_ptr, T,
    E: tl.constexpr, E_POW2: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr, SCALE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """K rounds: the largest key of a row, the lowest of its experts, taken out for the next."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.arange(0, E_POW2)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    place = token.to(tl.int64)[:, None] * E + expert[None, :]
    logits = tl.load(logits_ptr + place, mask=inside, other=0.0)
    score = scores_of(logits, expert, E, ACTIVATION)
    tl.store(score_ptr + place, score, mask=inside)
    is_number = score == score
    bounded = tl.minimum(tl.maximum(tl.where(is_number, score, 0.0), 0.0), 1.0)
    key = tl.floor(bounded * SCALE).to(tl.int32)
    if BIASED:
        key += tl.load(bias_ptr + expert, mask=expert < E, other=0)[None, :]
    # Two remainders keep the product small, and E keeps the difference from being negative.
    turn = (expert[None, :] + E - (token % E * K % E)[:, None]) % E
    key = tl.where(is_number, key, E - 1 - turn)
    tl.store(key_ptr + place, key, mask=inside)
    # Below every key.
    taken: tl.constexpr = -1073741824
    left = tl.where((expert < E)[None, :], key, taken)
    column = expert[None, :] + tl.zeros_like(left)
    for _ in range(K):
        largest = tl.max(left, axis=1)
        first = tl.min(tl.where(left == largest[:, None], column, E_POW2), axis=1)
        left = tl.where(column == first[:, None], taken, left)
    chosen = (left == taken) & inside
    tl.store(chosen_ptr + place, chosen.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["T"])
def router_topk_backward_kernel(
    dscore_ptr, score_ptr, dlogits_ptr, T,
    E: tl.constexpr, E_POW2: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Softmax: score * (dscore - <dscore, score>); sigmoid: dscore * score * (1 - score)."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.arange(0, E_POW2)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    place = token.to(tl.int64)[:, None] * E + expert[None, :]
    dscore = tl.load(dscore_ptr + place, mask=inside, other=0.0)
    score = tl.load(score_ptr + place, mask=inside, other=0.0)
    if ACTIVATION == "softmax":
        dlogits = score * (dscore - tl.sum(dscore * score, axis=1)[:, None])
    else:
        dlogits = dscore * score * (1.0 - score)
    tl.store(dlogits_ptr + place, dlogits, mask=inside)

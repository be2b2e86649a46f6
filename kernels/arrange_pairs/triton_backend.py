"""Launches of the arrangement: one program finds where segments go, many move the pairs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from distmoe.kernels.arrange_pairs import ArrangedPairs, Messages
from distmoe.kernels.arrange_pairs.triton_arrange_pairs import move_kernel, segment_kernel

# Segments, and pairs, that a program looks at together.
BLOCK_SEGMENTS, BLOCK_PAIRS = 1024, 256


def arrange(messages: Messages, place_A: Tensor) -> ArrangedPairs:
    """See `arrange_pairs`."""
    from_Pe, message_X2 = messages.from_Pe, messages.message_X2
    (P, e), C, W = from_Pe.shape, messages.runs, messages.width
    A, L = len(place_A), messages.num_pairs
    scratch = message_X2.new_empty(P * e + 1 + 2 * P * W + P * e * W)
    sizes = message_X2.new_empty(A + A * e + P * C, dtype=torch.int64)
    offsets_e1 = message_X2.new_empty(e + 1)
    segment_kernel[(1,)](
        message_X2, from_Pe, place_A, scratch, offsets_e1, sizes,
        *from_Pe.stride(), messages.rank, P, e, C, A, max(messages.pairs_P).bit_length(),
        **segment_config(W),
    )  # fmt: skip
    row_L, place_L = message_X2.new_empty(L), sizes.new_empty(L)
    score_L = message_X2.new_empty(L, dtype=torch.float32)
    if L:
        move_kernel[(triton.cdiv(L, BLOCK_PAIRS),)](
            message_X2, scratch, row_L, score_L.view(torch.int32), place_L,
            P, e, C, L, (P * e).bit_length(), W=W, BLOCK=BLOCK_PAIRS, num_warps=4,
        )  # fmt: skip
    rows_A, counts_AE, relayed_PC = torch.split(sizes, [A, A * e, P * C])
    return ArrangedPairs(
        row_L=row_L,
        score_L=score_L,
        offsets_e1=offsets_e1,
        place_L=place_L,
        rows_A=rows_A,
        counts_Ae=counts_AE.view(A, e),
        relayed_PC=relayed_PC.view(P, C),
    )


def segment_config(width: int) -> dict[str, int]:
    """For runs of a source as a power of two."""
    padded = triton.next_power_of_2(width)
    return {"W": width, "W_POW2": padded, "BLOCK": max(BLOCK_SEGMENTS, padded), "num_warps": 8}

"""Causal attention over whole sequences, or inside of the documents of a packed sequence.

    y_q = sum over k of softmax_k(q . k / sqrt(D)) v_k,   start_q <= k <= q

with start_q the position at which q's document begins, 0 where documents are not told apart. Rotary
positions need not restart: a score depends on the distance of q and k only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, A, S, D], k and v [B, A / any factor, S, D] -> y [B, A, S, D]."""


def attend_causally(q_BASD: Tensor, k_BASD: Tensor, v_BASD: Tensor) -> Tensor:
    """Attention of every position to itself and all before it."""
    return F.scaled_dot_product_attention(q_BASD, k_BASD, v_BASD, is_causal=True, enable_gqa=True)


def attention_over(start_BS: Tensor | None) -> Attend:
    """The attention of one batch, for all layers: over whole sequences, or inside of documents.

    On CUDA inside of documents by FlexAttention, which skips blocks of other documents and stores
    no mask of S x S.
    """
    if start_BS is None:
        return attend_causally
    if start_BS.device.type == "cuda":
        return _with_block_mask(start_BS, _compiled_flex_attention())
    return _with_dense_mask(start_BS)


def _with_dense_mask(start_BS: Tensor) -> Attend:
    position_S = torch.arange(start_BS.shape[1], device=start_BS.device)
    after_start_BSS = position_S >= start_BS[:, :, None]
    mask_B1SS = (after_start_BSS & (position_S <= position_S[:, None]))[:, None]

    def attend(q_BASD: Tensor, k_BASD: Tensor, v_BASD: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q_BASD, k_BASD, v_BASD, attn_mask=mask_B1SS, enable_gqa=True
        )

    return attend


def _with_block_mask(start_BS: Tensor, flex_attention: Any) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start_BS[b, q] <= k) & (k <= q)

    B, S = start_BS.shape
    block_mask = create_block_mask(visible, B, None, S, S, device=start_BS.device)

    def attend(q_BASD: Tensor, k_BASD: Tensor, v_BASD: Tensor) -> Tensor:
        y_BASD: Tensor = flex_attention(
            q_BASD, k_BASD, v_BASD, block_mask=block_mask, enable_gqa=True
        )
        return y_BASD

    return attend


@cache
def _compiled_flex_attention() -> Any:
    # Imported when needed: it brings torch's compiler with it. Not compiled, it would form all
    # scores.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)

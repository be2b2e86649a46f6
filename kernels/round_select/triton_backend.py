"""Launches of the selection kernels: a transposition, then one program per expert."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from distmoe.kernels.round_select import KEY_LIMIT, NOTHING
from distmoe.kernels.round_select.triton_merge import merge_kernel
from distmoe.kernels.round_select.triton_round_select import (
    flip_kernel,
    gather_best_kernel,
    priority_kernel,
    sort_kernel,
    take_kernel,
)

BLOCK_TOKENS, BLOCK_EXPERTS = 64, 32
# Tokens of a column that a program keeps in registers, 32 in each thread; `best` has no room for
# that in a program of 1024 threads.
WHOLE_COLUMN_OF_TAKE = 32768
WHOLE_COLUMN_OF_BEST = 16384
# Tokens that a program counts at a time where the column does not fit.
PART = 16384
# Priorities lie within KEY_LIMIT of 0 on either side.
BITS = KEY_LIMIT.bit_length()
# Candidates that a program of `merge` keeps in registers, and the bits from NOTHING to KEY_LIMIT.
MERGED = 4096
MERGE_BITS = (KEY_LIMIT - NOTHING).bit_length()
CONSTANTS = {"NOTHING": NOTHING, "KEY_LIMIT": KEY_LIMIT, "BITS": BITS}


class TritonRoundSelect:
    """CUDA, ROCm and the interpreter. No sort of a column, no atomics, no host sync."""

    def priorities(self, key_TE: Tensor, chosen_TE: Tensor, adds_E: Tensor) -> Tensor:
        num_tokens, num_experts = key_TE.shape
        priority_ET = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=key_TE.device)
        if key_TE.numel():
            priority_kernel[_grid(num_tokens, num_experts)](
                key_TE.contiguous(), _bytes(chosen_TE), _bytes(adds_E), priority_ET, num_tokens,
                E=num_experts, NOTHING=NOTHING, BT=BLOCK_TOKENS, BE=BLOCK_EXPERTS, num_warps=4,
            )  # fmt: skip
        return priority_ET

    def best(self, priority_ET: Tensor, num: int) -> Tensor:
        num_experts, num_tokens = priority_ET.shape
        best_EC = priority_ET.new_full((num_experts, num), NOTHING)
        if num and num_tokens:
            gather_best_kernel[(num_experts,)](
                priority_ET,
                best_EC,
                num_tokens,
                num,
                **CONSTANTS,
                **column_config(num_tokens, WHOLE_COLUMN_OF_BEST),
            )
            sort_kernel[(num_experts,)](
                best_EC, num, NOTHING=NOTHING, BLOCK=triton.next_power_of_2(num), num_warps=1
            )
        return best_EC

    def take(
        self,
        chosen_TE: Tensor,
        priority_ET: Tensor,
        amount_E: Tensor,
        adds_E: Tensor,
        *,
        most: int,
    ) -> Tensor:
        num_experts, num_tokens = priority_ET.shape
        if not priority_ET.numel():
            return chosen_TE
        taken_ET = torch.empty(num_experts, num_tokens, dtype=torch.uint8, device=chosen_TE.device)
        take_kernel[(num_experts,)](
            priority_ET, amount_E.int(), _bytes(adds_E), taken_ET, num_tokens,
            **CONSTANTS, **column_config(num_tokens, WHOLE_COLUMN_OF_TAKE),
        )  # fmt: skip
        selected_TE = torch.empty_like(chosen_TE, memory_format=torch.contiguous_format)
        flip_kernel[_grid(num_tokens, num_experts)](
            _bytes(chosen_TE), taken_ET, selected_TE.view(torch.uint8), num_tokens,
            E=num_experts, BT=BLOCK_TOKENS, BE=BLOCK_EXPERTS, num_warps=4,
        )  # fmt: skip
        return selected_TE

    def merge(self, best_PEC: Tensor, adds_E: Tensor, amount_E: Tensor) -> Tensor:
        num_ranks, num_experts, num = best_PEC.shape
        accepted_PE = amount_E.new_empty(num_ranks, num_experts)
        merge_kernel[(num_experts,)](
            best_PEC.contiguous(), _bytes(adds_E), amount_E, accepted_PE, num_ranks, num_experts,
            NOTHING=NOTHING, BITS=MERGE_BITS, **merge_config(num_ranks, num),
        )  # fmt: skip
        return accepted_PE


def merge_config(num_ranks: int, num: int) -> dict[str, int | bool]:
    """BP ranks are counted at a time; all their candidates stay in registers if these are not
    more."""
    padded = triton.next_power_of_2(num)
    ranks = min(triton.next_power_of_2(num_ranks), max(MERGED // padded, 1))
    return {
        "C": num,
        "C_POW2": padded,
        "BP": ranks,
        "WHOLE": num_ranks <= ranks,
        "num_warps": min(max(ranks * padded // 256, 1), 16),
    }


def column_config(num_tokens: int, most: int) -> dict[str, int | bool]:
    """BLOCK tokens are counted at a time; the whole column stays in registers if it has at most
    ``most`` tokens. SCAN tokens are scanned at a time, 2 in a thread."""
    block = max(triton.next_power_of_2(num_tokens), 128)
    if block > most:
        block = min(PART, most)
    num_warps = min(max(block // 1024, 4), 32)
    return {
        "BLOCK": block,
        "WHOLE": num_tokens <= block,
        "SCAN": min(block, 64 * num_warps),
        "num_warps": num_warps,
    }


def _grid(num_tokens: int, num_experts: int) -> tuple[int, int]:
    return triton.cdiv(num_tokens, BLOCK_TOKENS), triton.cdiv(num_experts, BLOCK_EXPERTS)


def _bytes(flags: Tensor) -> Tensor:
    return flags.contiguous().view(torch.uint8)

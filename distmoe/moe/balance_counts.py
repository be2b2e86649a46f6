"""Over which tokens the load-balance loss counts the load of the experts.

``global``: all ranks and the micro-batches of the step so far (arXiv 2501.11873), which approaches
the load of the whole batch. ``micro_batch``: all ranks. ``ep``: the ranks that share the experts.
``rank``: the tokens of this rank. ``sequence``: each sequence by itself (DeepSeek-V3's
complementary loss, arXiv 2412.19437).

The first two need a sum over all ranks, which is posted at once and waited for where the loss is
made, so that no row waits for a rank of another ep group; ``sequence`` one over the ranks that have
parts of the same sequences. The others send nothing: ``ep`` has its counts from rounding, and every
group, or rank, has the same weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmoe.comm.group_sum import GroupSum
from distmoe.routing.round_tokens import Rounded


@dataclass(frozen=True)
class BalanceCounts:
    """The sizes of `load_balance_loss`: ``freq_E``, of ``freq_tokens`` tokens, and the tokens of
    all ranks."""

    freq_E: Tensor
    freq_tokens: int | Tensor
    all_tokens: float | Tensor


def own_counts(chosen_TE: Tensor) -> Tensor:
    """[E + 1] int64: top-k pairs per expert, and tokens, of this rank."""
    # Filled on the device: a copy from the host would wait for it.
    freq_E = chosen_TE.sum(0)
    return torch.cat([freq_E, freq_E.new_full((1,), len(chosen_TE))])


@dataclass(frozen=True)
class OwnCounts:
    """`own_counts` of one forward, and of the step so far with this forward; and the top-k choice
    itself, of tokens that are ``num_sequences`` equal runs."""

    forward_E1: Tensor
    so_far_E1: Tensor
    chosen_TE: Tensor
    num_sequences: int


def balance_counts(
    scope: str,
    own: OwnCounts,
    rounded: Rounded,
    *,
    sums: GroupSum | None,
    sequence_sums: GroupSum | None,
    ep: int,
) -> Callable[[], BalanceCounts]:
    """Begin to count one forward; collective over ``sums`` (None: this rank alone) or
    ``sequence_sums`` (None: sequences are whole) where the scope says so. The result waits for the
    counts; again is free. ``ep``: ranks that share the experts.
    """
    num_ranks = 1 if sums is None else sums.size
    if scope == "sequence" and sequence_sums is not None:
        counts = _of_this_rank(own.chosen_TE, own.num_sequences, num_ranks)
        of_parts = sequence_sums.post("balance counts", counts.freq_E)
        whole = counts.freq_tokens * sequence_sums.size
        return lambda: replace(counts, freq_E=of_parts.wait(), freq_tokens=whole)
    if scope in ("rank", "sequence"):
        num_runs = own.num_sequences if scope == "sequence" else 1
        counts = _of_this_rank(own.chosen_TE, num_runs, num_ranks)
        return lambda: counts
    if scope == "ep":
        tokens = rounded.num_tokens * num_ranks / ep
        counts = BalanceCounts(rounded.freq_E, rounded.num_tokens, tokens)
        return lambda: counts
    so_far_E1 = own.so_far_E1 if scope == "global" else own.forward_E1
    own_E2 = torch.cat([so_far_E1, own.forward_E1[-1:]])
    if sums is None:
        return lambda: _of_sum(own_E2)
    pending = sums.post("balance counts", own_E2)
    return lambda: _of_sum(pending.wait())


def _of_sum(counts_E2: Tensor) -> BalanceCounts:
    return BalanceCounts(counts_E2[:-2], counts_E2[-2], counts_E2[-1])


def _of_this_rank(chosen_TE: Tensor, num_runs: int, num_ranks: int) -> BalanceCounts:
    """``num_runs`` equal runs of tokens, each by itself."""
    num_tokens, num_experts = chosen_TE.shape
    run = num_tokens // max(num_runs, 1)
    freq_BE = chosen_TE.view(num_runs, run, num_experts).sum(1)
    return BalanceCounts(freq_BE, run, num_tokens * num_ranks)

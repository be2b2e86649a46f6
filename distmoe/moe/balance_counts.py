"""Over which tokens the load-balance loss counts the load of the experts.

``global``: all ranks and the micro-batches of the step so far (arXiv 2501.11873), which approaches
the load of the whole batch. ``micro_batch``: all ranks. ``ep``: the ranks that share the experts.
``rank``: the tokens of this rank. ``sequence``: each sequence by itself (DeepSeek-V3's
complementary loss, arXiv 2412.19437). The last two send nothing: every rank has the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.routing.round_tokens import Rounded


@dataclass(frozen=True)
class BalanceCounts:
    """The sizes of `load_balance_loss`: ``freq_E``, of ``freq_tokens`` tokens, and the tokens of
    all ranks."""

    freq_E: Tensor
    freq_tokens: int | Tensor
    all_tokens: int | Tensor


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
    scope: str, own: OwnCounts, rounded: Rounded, *, group: dist.ProcessGroup | None
) -> BalanceCounts:
    """The counts of one forward; collective over ``group`` (None: this rank alone) where the scope
    says so."""
    if scope in ("rank", "sequence"):
        num_ranks = dist.get_world_size(group) if group is not None else 1
        num_runs = own.num_sequences if scope == "sequence" else 1
        return _of_this_rank(own.chosen_TE, num_runs, num_ranks)
    if scope == "global":
        counts = _over_ranks(torch.cat([own.so_far_E1, own.forward_E1[-1:]]), group)
        return BalanceCounts(counts[:-2], counts[-2], counts[-1])
    if scope == "ep":
        tokens = _over_ranks(own.forward_E1[-1:], group)
        return BalanceCounts(rounded.freq_E, rounded.num_tokens, tokens[0])
    counts = _over_ranks(own.forward_E1, group)
    return BalanceCounts(counts[:-1], counts[-1], counts[-1])


def _of_this_rank(chosen_TE: Tensor, num_runs: int, num_ranks: int) -> BalanceCounts:
    """``num_runs`` equal runs of tokens, each by itself."""
    num_tokens, num_experts = chosen_TE.shape
    run = num_tokens // max(num_runs, 1)
    freq_BE = chosen_TE.view(num_runs, run, num_experts).sum(1)
    # A rank without tokens has loss 0, not 0 / 0.
    return BalanceCounts(freq_BE, max(run, 1), max(num_tokens, 1) * num_ranks)


def _over_ranks(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return counts
    summed = counts.clone()
    dist.all_reduce(summed, group=group)
    return summed

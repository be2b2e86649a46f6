"""Rows and pairs that one MoE layer holds on a rank, under uniform routing times a skew."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from distmoe.config import Config
from distmoe.moe.schedule import auto_schedule
from distmoe.planner.row_volumes import RankLayout, RowVolumes
from distmoe.registry import ROUNDING_RULES


@dataclass(frozen=True)
class ExchangeRows:
    """Of the rank that computes most. ``pairs``: computed here, L. ``received``: rows of x, R, its
    own among them. ``outgoing``: rows that its own tokens have on all ranks, U; ``sent``: those of
    them that leave. ``relayed``: rows of other nodes that it passes on inside its node, and
    ``parts`` what it sends, and gets back, for them. All 0 but ``pairs`` with one rank, where
    nothing travels and the rows are the tokens."""

    pairs: int
    received: int = 0
    outgoing: int = 0
    sent: int = 0
    relayed: int = 0
    parts: int = 0


def exchange_rows(config: Config, *, num_tokens: int, skew: float) -> ExchangeRows:
    """``num_tokens``: T of every rank. ``skew``: pairs of the busiest rank over the mean."""
    moe, P = config.moe, config.parallel.ep
    if P == 1:
        # The number of pairs is known on the device only: arrays have the most there can be.
        rule = ROUNDING_RULES.load(moe.rounding.rule)
        added = rule.most_added(moe.num_experts, moe.rounding.tile)
        most = num_tokens * moe.num_experts
        return ExchangeRows(pairs=min(num_tokens * moe.top_k + added, most))
    layout = RankLayout.of_group(P, config.parallel.ranks_per_node)
    volumes = RowVolumes.expected(
        layout, num_tokens=num_tokens, num_experts=moe.num_experts, top_k=moe.top_k
    )
    level = _level(config, layout)
    per_rank = volumes.sent_rows(level)
    relayed = parts = 0.0
    outgoing, sent = per_rank * P, per_rank * (P - 1)
    if level == "node":
        relayed = volumes.node_rows * (layout.num_nodes - 1)
        parts = per_rank * layout.far_ranks
        outgoing = per_rank * layout.per_node + relayed
        sent = per_rank * (layout.per_node - 1) + relayed
    return ExchangeRows(
        pairs=ceil(num_tokens * moe.top_k * skew),
        received=ceil(per_rank * P * skew),
        outgoing=ceil(outgoing),
        sent=ceil(sent),
        relayed=ceil(relayed),
        parts=ceil(parts),
    )


def _level(config: Config, layout: RankLayout) -> str:
    """moe.dispatch.level, or what auto is without a profile; GPUs do not relay."""
    return auto_schedule(
        config.moe.dispatch.level,
        config.moe.dispatch.order,
        config.moe.dispatch.steps,
        num_ranks=layout.num_ranks,
        ranks_per_node=layout.per_node,
        relays=config.run.device == "cpu",
    ).level

"""Groups of experts between which the choice of a token is limited: given as such, or the nodes.

A group is a run of experts. Of nodes there are as many as the ep axis spans; the experts of a rank
follow those of the rank before it, so the experts of a node are a run, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from distmoe.config.moe_schema import MoEConfig


@dataclass(frozen=True)
class ExpertGroups:
    """``count`` equal runs of experts, of which a token may use ``per_token``."""

    count: int
    per_token: int


def expert_groups(moe: MoEConfig, *, ep: int, ranks_per_node: int) -> ExpertGroups | None:
    """The limit of a layer whose experts are spread over ``ep`` ranks; None: there is none."""
    count, per_token = max(moe.expert_groups, 1), moe.groups_per_token
    if moe.nodes_per_token and ranks_per_node:
        count, per_token = max(ep // ranks_per_node, 1), moe.nodes_per_token
    return ExpertGroups(count, per_token) if count > per_token > 0 else None


def expert_group_problems(moe: MoEConfig, *, ep: int, ranks_per_node: int) -> Iterator[str]:
    """What is wrong with the limit, a line each, naming key, value and what is allowed."""
    grouped = moe.expert_groups > 1
    if grouped and moe.nodes_per_token:
        yield (
            f"moe.nodes_per_token is {moe.nodes_per_token}; it must be 0 with moe.expert_groups "
            f"({moe.expert_groups}): one of both limits the choice"
        )
        return
    problems = list(_group_problems(moe) if grouped else _node_problems(moe, ep, ranks_per_node))
    if not grouped and moe.groups_per_token:
        problems.append(
            f"moe.groups_per_token is {moe.groups_per_token}; it must be 0 without "
            "moe.expert_groups"
        )
    yield from problems
    limit = expert_groups(moe, ep=ep, ranks_per_node=ranks_per_node)
    if not problems and limit is not None:
        yield from _choice_problems(moe, limit)


def _group_problems(moe: MoEConfig) -> Iterator[str]:
    if moe.num_experts % moe.expert_groups:
        yield (
            f"moe.expert_groups is {moe.expert_groups}; it must be 0, 1 or divide "
            f"moe.num_experts ({moe.num_experts})"
        )
    if not 1 <= moe.groups_per_token <= moe.expert_groups:
        yield (
            f"moe.groups_per_token is {moe.groups_per_token}; it must be in "
            f"1..moe.expert_groups ({moe.expert_groups})"
        )


def _node_problems(moe: MoEConfig, ep: int, ranks_per_node: int) -> Iterator[str]:
    if not moe.nodes_per_token or ep == 1:
        return
    if not ranks_per_node:
        yield (
            "parallel.ranks_per_node is 0; it must be at least 1 with moe.nodes_per_token "
            f"({moe.nodes_per_token}) where no launcher reports it"
        )
    elif ep % ranks_per_node and ranks_per_node % ep:
        yield (
            f"parallel.ranks_per_node is {ranks_per_node}; it must divide parallel.ep ({ep}), or "
            f"be a multiple of it, with moe.nodes_per_token ({moe.nodes_per_token})"
        )


def _choice_problems(moe: MoEConfig, limit: ExpertGroups) -> Iterator[str]:
    kind = "group" if moe.expert_groups > 1 else "node"
    size = moe.num_experts // limit.count
    if moe.top_k > limit.per_token * size:
        yield (
            f"moe.top_k is {moe.top_k}; it must be at most {limit.per_token * size}, "
            f"moe.{kind}s_per_token ({limit.per_token}) * the experts of a {kind} ({size})"
        )
    # The forced choice is a run of experts, which begins at a multiple of its length.
    touched = (size - gcd(moe.top_k, size) + moe.top_k - 1) // size + 1
    if moe.router == "balanced" and touched > limit.per_token:
        yield (
            f"moe.{kind}s_per_token is {limit.per_token}; it must be at least {touched} with "
            f"moe.router 'balanced', whose runs of moe.top_k ({moe.top_k}) experts lie in as many "
            f"{kind}s of {size}"
        )

"""Round to tiles so that the busiest rank is as light as floor or ceiling choices allow.

With k_e = f_e // M, rho_e = f_e mod M, and over the runs r of experts B_r = sum k_e, m_r = experts
that may round up: U = min(floor(sum rho_e / M + 1/2), sum m_r) experts round up, which keeps the
total within M/2 of top-k's; L = the smallest L >= max B_r with sum_r min(m_r, L - B_r) >= U is the
lightest possible busiest run. Experts then round up in the order of (-rho_e, e) while U and their
run's cap min(m_r, L - B_r) last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.routing.rounding import KeySums, Rule, may_round_up


def targets(
    freq_E: Tensor, *, tile: int, room: int | Tensor, groups: int, seed: int, key_sums: KeySums
) -> Tensor:
    """Integer arithmetic throughout, so that every rank finds the same targets.

    ValueError if ``groups`` does not divide the number of experts.
    """
    if len(freq_E) % groups:
        raise ValueError(f"balance_groups is {groups}; it must divide the {len(freq_E)} experts")
    floor_E, rest_E = freq_E // tile, freq_E % tile
    may_E = may_round_up(freq_E, tile=tile, room=room)
    base_r = floor_E.view(groups, -1).sum(1)
    may_r = may_E.view(groups, -1).sum(1)
    wanted = torch.minimum((2 * rest_E.sum() + tile) // (2 * tile), may_r.sum())
    cap_r = torch.minimum(may_r, _level(base_r, may_r, wanted, len(freq_E) // groups) - base_r)
    up_E = _fill(rest_E, may_E, cap_r, wanted, groups)
    return (floor_E + up_E) * tile


def _level(base_r: Tensor, may_r: Tensor, wanted: Tensor, experts_per_run: int) -> Tensor:
    """L: the smallest level >= max(base) at which ``wanted`` experts may round up."""
    level = base_r.max() + torch.arange(experts_per_run + 1, device=base_r.device)
    room = torch.minimum(may_r[:, None], level - base_r[:, None]).sum(0)
    return level[0] + (room < wanted).sum()


def _fill(rest_E: Tensor, may_E: Tensor, cap_r: Tensor, wanted: Tensor, groups: int) -> Tensor:
    """[E] bool: the first experts by (-rest, e) that their run's cap and ``wanted`` allow."""
    num_experts = len(rest_E)
    order = torch.argsort(torch.where(may_E, -rest_E, 1), stable=True)
    group_of = torch.arange(num_experts, device=rest_E.device) // (num_experts // groups)
    # Compared, because one_hot would ask the device for the largest index.
    every_group = torch.arange(groups, device=rest_E.device)
    in_group = (group_of[order, None] == every_group) & may_E[order, None]
    place_in_group = in_group.cumsum(0).gather(1, group_of[order, None]).squeeze(1)
    allowed = may_E[order] & (place_in_group <= cap_r[group_of[order]])
    allowed &= allowed.cumsum(0) <= wanted
    up_E = torch.zeros_like(may_E)
    up_E[order] = allowed
    return up_E


# The experts that round up are sum(rest) / M, rounded, or fewer.
RULE = Rule(targets, most_added=lambda num_experts, tile: tile // 2)

"""The targets of `balance` by a sort of the experts."""

from __future__ import annotations

import torch
from torch import Tensor


def targets(freq_E: Tensor, room: Tensor, *, tile: int, groups: int) -> Tensor:
    """See `balance_targets`."""
    floor_E, rest_E = freq_E // tile, freq_E % tile
    # A tile is started, and there are tokens enough to fill it.
    may_E = (rest_E > 0) & ((floor_E + 1) * tile <= room)
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
